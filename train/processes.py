"""Where arrays live: one device, all of this machine's, or those of several processes.

Every process runs the same program on the same batches and holds its devices' part of
them. The first one, the leader, alone writes files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.config import TrainConfig


def join(coordinator: str, *, number: int | None, index: int | None) -> None:
    """Makes this process one of several that train together.

    Args:
        coordinator: host:port of the first process; empty lets jax find out, which it
            can on TPU pods and under Slurm and Open MPI.
        number: of processes; None lets jax find out.
        index: of this process, from 0; None likewise.

    Raises:
        ValueError: the processes cannot be joined.
    """
    try:
        jax.distributed.initialize(coordinator or None, number, index)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"cannot join the other processes ({reason}): give --coordinator HOST:PORT "
            "of the first one, --num-processes and --process-index"
        ) from error


def is_leader() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """Runs a block in the leader, and then in the others, who find its files there."""
    if not is_leader():
        multihost_utils.sync_global_devices("leader first")
    yield
    if is_leader() and jax.process_count() > 1:
        multihost_utils.sync_global_devices("leader first")


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def shardings(config: TrainConfig) -> tuple[Any, Any]:
    """Where a batch and the state live: (batch sharding, state sharding).

    Raises:
        ValueError: the batch cannot be split, or several processes share no devices.
    """
    devices = jax.devices()
    if not config.data_parallel:
        if jax.process_count() > 1:
            raise ValueError("several processes split the batch: use --data-parallel")
        one = jax.sharding.SingleDeviceSharding(devices[0])
        return one, one
    rows = config.batch // config.accumulate
    if rows % len(devices):
        fitting = math.ceil(rows / len(devices)) * len(devices) * config.accumulate
        raise ValueError(
            f"data_parallel needs a batch that is a multiple of the {len(devices)} "
            f"devices, got {config.batch}: use --batch {fitting}"
            if config.accumulate == 1
            else f"data_parallel needs a batch that is a multiple of accumulate times "
            f"the {len(devices)} devices, got {config.batch}: use --batch {fitting}"
        )
    mesh = jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )
    split = NamedSharding(mesh, PartitionSpec("data"))
    return split, NamedSharding(mesh, PartitionSpec())


def place(tree: Any, sharding: Any) -> Any:
    """Puts arrays that every process has whole where they belong."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(put, tree)
