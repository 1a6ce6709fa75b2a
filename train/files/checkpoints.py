"""The checkpoints of a run: orbax folders, written atomically.

    RUN/checkpoints/STEP/  items: model (what models/ loads), optimizer, progress

A checkpoint appears under its number by a rename once it is complete, so a killed run
leaves no half-written one. `models/files/runs.py` owns the format and reads it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from models.files import runs
from train.config import TrainConfig
from train.files.folder import CheckpointError
from train.step import TrainState

# What orbax, tensorstore and json raise when files are damaged or cannot be written.
_ORBAX_ERRORS = (ValueError, OSError, KeyError, TypeError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, out: Path, *, keep: int) -> None:
        """Opens RUN/checkpoints, which is made when needed.

        Args:
            out: run folder.
            keep: newest checkpoints to keep.
        """
        self.folder = out.resolve() / runs.CHECKPOINTS
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    def _check_room(self, arrays: Any) -> None:
        """Raises CheckpointError where the disk has no room for the arrays."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + (1 << 20)
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise CheckpointError(
                f"the disk of {self.folder} has {free / 1e6:.1f} MB left and a "
                f"checkpoint needs {needed / 1e6:.1f} MB. {self.how_to_go_on()}"
            )

    def how_to_go_on(self) -> str:
        """What is safe and how to continue, for messages about what went wrong."""
        newest, out = self.latest(), self.folder.parent
        if newest is None:
            return f"No checkpoint had been written: delete {out} and start again"
        return (
            f"The last good checkpoint is {self.path(newest)}: once that is mended, "
            f"continue with: python -m train --resume --out {out}"
        )

    def path(self, step: int) -> Path:
        """Folder of one checkpoint."""
        return self.folder / str(step)

    def save(self, state: TrainState, *, data: dict[str, Any], **progress: Any) -> None:
        """Writes a checkpoint and drops the oldest beyond those to keep.

        Args:
            state: what to save; its step names the checkpoint.
            data: position in the data.
            **progress: JSON values to keep with it.

        Raises:
            CheckpointError: it could not be written, or holds NaN or infinity.
        """
        host = jax.device_get((state.params, state.rest, state.opt_state, state.step))
        params, rest, opt_state, step = host
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise CheckpointError(
                f"the parameters after step {int(step)} are not finite: not saved"
            )
        model = nnx.to_pure_dict(nnx.merge_state(params, rest))
        key_data = np.asarray(jax.random.key_data(state.key)).tolist()
        content = {"step": int(step), "data": data, "key": key_data, **progress}
        content["loss_average"] = float(state.loss_average)
        self._check_room((model, opt_state))
        try:
            self._manager.save(
                int(step),
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),
                    optimizer=ocp.args.StandardSave(_by_path(opt_state)),
                    progress=ocp.args.JsonSave(content),
                ),
            )
        except _ORBAX_ERRORS as error:
            raise CheckpointError(
                f"cannot write the checkpoint {self.path(int(step))} "
                f"({_first_line(error)}): is the disk full? {self.how_to_go_on()}"
            ) from error

    def restore(
        self, step: int, *, config: TrainConfig, template: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            step: which one.
            config: of the run.
            template: a state of the same run, for the structure of its optimizer.

        Returns:
            The state on the host, and the JSON values, among them `data`.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        shapes = nnx.to_pure_dict(nnx.merge_state(template.params, template.rest))
        optimizer = _by_path(template.opt_state)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(_empty(shapes)),
                    optimizer=ocp.args.StandardRestore(_empty(optimizer)),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = dict(restored["progress"])
            if progress["step"] != step:
                raise ValueError(f"it says that it is of step {progress['step']}")
            model = runs.restore_model(config.model, restored["model"])
            _, params, rest = nnx.split(model, nnx.Param, ...)
            key = jax.random.wrap_key_data(jnp.asarray(progress["key"], jnp.uint32))
            opt_state = _from_path(template.opt_state, restored["optimizer"])
            # Checkpoints of before there was one begin it anew.
            average = jnp.float32(progress.get("loss_average", math.inf))
        except _ORBAX_ERRORS as error:
            raise CheckpointError(self._damaged(step, error)) from error
        state = TrainState(params, rest, opt_state, jnp.int32(step), average, key)
        return state, progress

    def _damaged(self, step: int, error: BaseException) -> str:
        """What to do about a checkpoint that cannot be read."""
        others = [other for other in self._manager.all_steps() if other != step]
        remedy = (
            f"delete that folder to resume from step {max(others)}"
            if others
            else "start a new run in another --out"
        )
        return (
            f"the checkpoint {self.path(step)} is damaged or of another model "
            f"({_first_line(error)}): {remedy}"
        )


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree under their paths, as orbax can store them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _from_path(template: Any, values: dict[str, Any]) -> Any:
    """Inverse of `_by_path`; ValueError unless shapes and dtypes are as expected."""
    leaves = []
    for path, leaf in _by_path(template).items():
        value = values[path]
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{path} is {value.shape}, not {leaf.shape}")
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _empty(tree: Any) -> Any:
    """Host arrays of the same shapes and dtypes: orbax then restores to the host."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
