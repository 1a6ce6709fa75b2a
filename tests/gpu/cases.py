"""What is compiled for GPUs: calls as users make them, and the kernels they must run.

To add one, add a line to `CASES`. Every kernel of the library has to be in one of them,
which `tests/test_gpu_check.py` sees to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hsrjax

RELU = hsrjax.ReLU(power=2, bias=1.5)


class Case(NamedTuple):
    """A call that is compiled for every card.

    Attributes:
      name: of it, in the table.
      kernels: that must be in the program.
      run: what is jitted.
      arguments: makes what it is given, of which only shapes and dtypes count.
      launches: of kernels in the whole program, at most; None is any number.
      spill: bytes that a kernel may spill.
      in_place: the first argument is given away, and returned first: all its arrays
        must be overwritten, and none be copied on the way.
    """

    name: str
    kernels: tuple[str, ...]
    run: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    launches: int | None = None
    spill: int = 0
    in_place: bool = False


class Sizes(NamedTuple):
    """Of a cache and what is new: K, G, U, S, H and D; D is H where it is None."""

    kv_heads: int = 4
    group: int = 2
    new: int = 1
    keys: int = 131072
    head: int = 64
    value: int | None = None
    dtype: Any = jnp.bfloat16
    tail: int | None = None

    def arrays(self):
        """A cache, and query, key and value of what is new."""
        width = self.value or self.head
        cache = hsrjax.init_cache(
            1,
            self.keys,
            self.kv_heads,
            self.head,
            value_dim=width,
            dtype=self.dtype,
            tail=self.tail,
        )
        new = lambda heads, size: jnp.zeros((1, self.new, heads, size), self.dtype)
        heads = self.kv_heads * self.group
        query, key = new(heads, self.head), new(self.kv_heads, self.head)
        return cache, query, key, new(self.kv_heads, width)


def decode(
    name: str,
    *,
    activation: hsrjax.Activation = RELU,
    method: Any = "auto",
    counted=False,
    spill=0,
    kernels=("hsrjax_attend", "hsrjax_combine"),
    launches=None,
    **sizes,
) -> Case:
    """Attention of what is new to a cache."""

    def run(cache, query, *_):
        return hsrjax.decode_attention(
            query,
            cache,
            activation=activation,
            method=method,
            implementation="triton",
        )[: 1 + counted]

    arrays = lambda: Sizes(**sizes).arrays()
    return Case(name, kernels, run, arrays, launches=launches, spill=spill)


def append(name: str, **sizes) -> Case:
    """A cache grows."""

    def run(cache, _, key, value):
        return hsrjax.extend(cache, key, value, implementation="triton")

    arrays = lambda: Sizes(**sizes).arrays()
    return Case(name, ("hsrjax_append",), run, arrays, in_place=True)


def step(name: str, *, method: Any, launches: int, **sizes) -> Case:
    """A cache grows and what is new attends to it, in one program."""

    def run(cache, query, key, value):
        cache = hsrjax.extend(cache, key, value, implementation="triton")
        out, _ = hsrjax.decode_attention(
            query,
            cache,
            activation=RELU,
            method=method,
            implementation="triton",
        )
        return cache, out

    kernels = "hsrjax_append", "hsrjax_attend", "hsrjax_combine"
    arrays = lambda: Sizes(**sizes).arrays()
    return Case(name, kernels, run, arrays, launches=launches, in_place=True)


def prefill(name: str, *, method: Any, head: int) -> Case:
    """Causal attention over a sequence, without a cache."""
    run = lambda query, key: hsrjax.attention(
        query,
        key,
        key,
        activation=RELU,
        is_causal=True,
        method=method,
        implementation="triton",
    )
    new = lambda heads: jnp.zeros((1, 4096, heads, head), jnp.bfloat16)
    return Case(
        name, ("hsrjax_attend", "hsrjax_combine"), run, lambda: (new(8), new(4))
    )


def gradients(
    name: str,
    *kernels: str,
    method: Any = "hsr",
    activation: hsrjax.Activation = RELU,
    dtype: Any = jnp.bfloat16,
    head: int = 64,
    spill: int = 0,
) -> Case:
    """Of causal attention over a sequence, by queries, keys and values."""

    def loss(query, key, value):
        out = hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            is_causal=True,
            method=method,
            implementation="triton",
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    new = lambda heads: jnp.zeros((1, 4096, heads, head), dtype)
    arrays = lambda: (new(8), new(4), new(4))
    return Case(name, kernels, jax.grad(loss, (0, 1, 2)), arrays, spill=spill)


FLOAT32, FLOAT16, BFLOAT16 = jnp.float32, jnp.float16, jnp.bfloat16
SOFTMAX = hsrjax.Softmax()
BY_MASS: dict[str, Any] = {
    "activation": hsrjax.Softmax(epsilon=0.1),
    "method": "hsr",
    "counted": True,
    "kernels": ("hsrjax_guess", "hsrjax_attend", "hsrjax_combine"),
}
BEST = tuple(f"hsrjax_{x}" for x in ("sample", "offset", "scores", "choose", "rest"))
BY_RANK = BY_MASS | {
    "activation": hsrjax.Softmax(top_r=64),
    "kernels": BEST,
    "launches": 16,
}
MASS_TAIL_8 = BY_MASS | {"activation": hsrjax.Softmax(epsilon=0.1, tail=8)}
MASS_TAIL = BY_MASS | {"activation": hsrjax.Softmax(epsilon=0.1, tail=1)}
RANK_TAIL = BY_MASS | {
    "activation": hsrjax.Softmax(top_r=64, tail=1),
    "kernels": ("hsrjax_sample", "hsrjax_offset", "hsrjax_attend", "hsrjax_combine"),
}
ENTMAX = BY_RANK | {"activation": hsrjax.Entmax()}
OF_ALL = "hsrjax_row_grads", "hsrjax_key_grads"
OF_LISTS = "hsrjax_list_grads", "hsrjax_expand", "hsrjax_add_entries"
WIDE = {"head": 256, "dtype": FLOAT32}
CASES = (
    decode("decode, heads of 64"),
    decode("decode, heads of 64, counted", counted=True),
    decode("decode, heads of 64, hsr", method="hsr"),
    decode("decode, heads of 128", kv_heads=8, group=4, keys=2**20, head=128),
    decode("decode, heads of 20 and 40", head=20, value=40),
    decode("decode, heads of 256", head=256),
    decode("decode, float16", dtype=FLOAT16),
    decode("decode, float32", dtype=FLOAT32),
    decode("decode, heads of 256, float32", **WIDE),
    decode("decode, 16 new", new=16),
    decode("decode, 64 new, heads of 128", new=64, head=128),
    decode("decode, 64 new, float16", new=64, head=128, dtype=FLOAT16),
    decode("decode, 64 new, hsr, float32", method="hsr", new=64, spill=16, **WIDE),
    decode("dense ReLU", method="dense"),
    decode("dense ReLU, 64 new, float32", method="dense", new=64, **WIDE),
    decode("dense softmax", activation=SOFTMAX),
    decode("dense softmax, 64 new", activation=SOFTMAX, new=64, head=128),
    decode("dense softmax, 64 new, float32", activation=SOFTMAX, new=64, **WIDE),
    decode("epsilon", **BY_MASS),
    decode("epsilon, heads of 128", kv_heads=8, group=4, head=128, **BY_MASS),
    decode("epsilon, 4 new, float32", new=4, dtype=FLOAT32, spill=24, **BY_MASS),
    decode("top 64", **BY_RANK),
    decode("top 64, heads of 128", kv_heads=8, group=4, head=128, **BY_RANK),
    decode("top 64, 4 new, float32", new=4, dtype=FLOAT32, **BY_RANK),
    decode("entmax", **ENTMAX),
    decode("epsilon, tail of 8", tail=8, **MASS_TAIL_8),
    decode("epsilon, tail of 1", kv_heads=8, group=4, head=128, tail=1, **MASS_TAIL),
    decode("top 64, tail of 1", tail=1, **RANK_TAIL),
    append("append, heads of 64"),
    append("append 31, heads of 20 and 40", new=31, head=20, value=40),
    append("append 31, float32", new=31, **WIDE),
    step("step, auto", method="auto", launches=8),
    step("step, hsr", method="hsr", launches=8),
    prefill("prefill, hsr", method="hsr", head=64),
    prefill("prefill, dense", method="dense", head=128),
    gradients("gradients, hsr", *OF_LISTS),
    gradients("gradients, hsr, heads of 128", *OF_LISTS, head=128, spill=8),
    gradients("gradients, hsr, float32", *OF_LISTS, dtype=FLOAT32),
    gradients("gradients, dense", *OF_ALL, method="dense"),
    gradients("gradients, softmax", *OF_ALL, method="dense", activation=SOFTMAX),
)


def shapes(case: Case, sharding: Any) -> Any:
    """The arguments of a case as shapes that lie on a device that need not be there."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(case.arguments),
    )
