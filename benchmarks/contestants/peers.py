"""Other people's attention, and which of it can do what.

A peer is imported only when it is measured. One that is not installed or fails is
reported with the reason, never left out silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.contestants import peers_jax, peers_torch
from benchmarks.contestants.peers_jax import NSA_BLOCK, NSA_BLOCKS
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Arrays, Contestant, Open, Unavailable, one_line

Task = Literal["decode", "prefill", "train"]

MEMORY_GIB = 12.0
"""Implementations that would hold more than this at once are not run."""
_COPIES = {"decode": 3, "prefill": 3, "train": 5}
_OTHER = "other: approximates by its own rules"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One implementation of somebody else.

    Attributes:
      package: distribution whose version is reported.
      module: what is imported.
      definition: "relu" and "softmax" are scored against float64.
      tasks: prepares a decode step, causal attention, or causal attention with its
        gradients; a text says why it cannot. Tasks that are not named do not concern
        it.
      gib: about what it holds at once beside its operands.
      detail: how it is called.
      finish: turns its results into arrays.
    """

    package: str
    module: str
    definition: str
    tasks: dict[Task, Callable[[Any, Inputs], Open] | str]
    gib: Callable[[Task, Inputs], float] = lambda task, inputs: 0.0
    detail: str = ""
    finish: Callable[[Any], Arrays] = peers_jax.finish


def score_gib(task: Task, inputs: Inputs) -> float:
    """Of the score matrices of all heads, in as many copies as eager code makes."""
    b, t, n, _ = inputs.query.shape
    return 4 * _COPIES[task] * b * t * n * inputs.key.shape[1] / 2**30


def _one_head(task: Task, inputs: Inputs) -> float:
    b, _, n, _ = inputs.query.shape
    return score_gib(task, inputs) / (b * n)


def _gathered(task: Task, inputs: Inputs) -> float:
    """ejkernel lays the selected keys and values of every query side by side."""
    selected = 2 * NSA_BLOCKS * NSA_BLOCK
    copies = {"decode": 1, "prefill": 1, "train": 2}
    return 4 * copies[task] * inputs.query.size * selected / 2**30


PEERS: dict[str, Peer] = {
    "jax-softmax": Peer(
        "jax",
        "jax",
        "softmax",
        peers_jax.DOT_PRODUCT,
        gib=score_gib,
        detail="jax.nn.dot_product_attention",
    ),
    "jax-cudnn": Peer(
        "jax",
        "jax",
        "softmax",
        peers_jax.CUDNN,
        detail="jax.nn.dot_product_attention, implementation cudnn",
    ),
    "flash-attention-jax": Peer(
        "flash-attention-jax",
        "flash_attention_jax",
        "softmax",
        peers_jax.FLASH,
    ),
    "tokamax": Peer(
        "tokamax",
        "tokamax",
        "softmax",
        peers_jax.TOKAMAX,
        detail="dot_product_attention, xla_chunked",
    ),
    "ejkernel-nsa": Peer(
        "ejkernel",
        "ejkernel.kernels._xla.native_sparse_attention",
        _OTHER,
        peers_jax.NATIVE_SPARSE,
        gib=_gathered,
        detail="native_sparse_attention, 16 blocks of 64",
    ),
    "torch-sdpa": Peer(
        "torch",
        "torch",
        "softmax",
        peers_torch.SDPA,
        detail="F.scaled_dot_product_attention",
        finish=peers_torch.finish,
    ),
    "torch-relu": Peer(
        "torch",
        "torch",
        "relu",
        peers_torch.RELU,
        gib=_one_head,
        detail="eager, a head at a time",
        finish=peers_torch.finish,
    ),
    "nsa-pytorch": Peer(
        "native-sparse-attention-pytorch",
        "native_sparse_attention_pytorch",
        _OTHER,
        {
            "decode": peers_torch.native_sparse_decode,
            "prefill": "attends only inside its own layer, without given q, k, v",
            "train": "attends only inside its own layer, without given q, k, v",
        },
        detail="forward_inference with its projections, 16 blocks of 64",
        finish=peers_torch.finish,
    ),
    "entmax15": Peer(
        "entmax",
        "entmax",
        "other: 1.5-entmax",
        {"train": peers_torch.entmax("entmax15")},
        gib=_one_head,
        detail="entmax15 on torch scores, a head at a time",
        finish=peers_torch.finish,
    ),
    "entmax-bisect": Peer(
        "entmax",
        "entmax",
        "other: 1.5-entmax",
        {"train": peers_torch.entmax("entmax_bisect")},
        gib=_one_head,
        detail="entmax_bisect on torch scores, a head at a time",
        finish=peers_torch.finish,
    ),
}


def names(task: Task) -> list[str]:
    """The peers that a task concerns, whether or not they can do it."""
    return [name for name, peer in PEERS.items() if task in peer.tasks]


def contestants(chosen: list[str], task: Task, inputs: Inputs) -> list[Contestant]:
    """The peers as contestants; what they cannot do is said when their turn comes."""
    return [
        Contestant(
            name=name,
            definition=peer.definition,
            prepare=lambda peer=peer: _prepare(peer, task, inputs),
            finish=peer.finish,
            ours=False,
            detail=peer.detail,
        )
        for name, peer in ((name, PEERS[name]) for name in chosen)
    ]


def _prepare(peer: Peer, task: Task, inputs: Inputs) -> Open:
    found = peer.tasks[task]
    if isinstance(found, str):
        raise Unavailable(found)
    if inputs.dtype != "float32" and peer.finish is peers_torch.finish:
        raise Unavailable("is measured in float32 alone")
    check_memory(peer.gib(task, inputs))
    return found(load(peer.module), inputs)


def load(module: str) -> Any:
    """Imports a peer; `Unavailable` says why that is impossible."""
    try:
        with _tokamax_tamed() if module == "tokamax" else contextlib.nullcontext():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            raise Unavailable("not installed") from error
        raise Unavailable(f"import failed: {one_line(error)}") from error
    except Exception as error:  # anything may happen in somebody else's import
        raise Unavailable(f"import failed: {one_line(error)}") from error


@contextlib.contextmanager
def _tokamax_tamed():
    """Lets tokamax be imported beside tyro and leave this command line alone.

    It checks types by typeguard 2, and no other can read its annotations; tyro needs
    typeguard 4. And it reads the process's command line unless absl has done so.
    """
    typeguard: Any = importlib.import_module("typeguard")
    checked = typeguard.typechecked
    typeguard.typechecked = lambda *args, **options: args[0] if args else lambda f: f
    try:
        yield
    finally:
        typeguard.typechecked = checked
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()


def check_memory(gib: float) -> None:
    """Raises `Unavailable` where so much would not fit."""
    if gib > MEMORY_GIB:
        raise Unavailable(f"not run: needs about {gib:.0f} GiB")
