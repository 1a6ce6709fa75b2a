"""Algorithm 3 of the paper, half-space reporting: Init, insert, delete, and Query.

`query` is a certified cascade: balls around cells (where keys are in spatial order and
that prunes) -> int8 sketch with integer thresholds -> the survivors, compacted into a
fixed number of slots -> their exact float32 scores -> members. Every stage only ever
over-reports, so none is missed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax._src.core import bitset, checks, meshes
from hsrjax._src.core.arrays import dot, positions, put_rows, take_rows
from hsrjax._src.core.bitset import WORD
from hsrjax._src.index.index import Index, group_keys, ids_of
from hsrjax._src.kernels.base import implementations_for, operations
from hsrjax._src.planning import costs, memory

MAX_SPATIAL_DIM = 8
"""Largest head size for which `build` puts keys in spatial order."""
_COUNTED_AT_ONCE = 256
"""Survivors of each query; `count` keeps none of them."""


class Report(NamedTuple):
    """What `query` returns: members of T half-spaces in C slots each.

    Attributes:
      indices: i32[*B, T, C], ids of the members, ascending, padded with max_keys (one
        past the end: gather with mode="fill").
      scores: f32[*B, T, C], <normal, key>, padded with -inf. Differentiable in the
        normals and the keys.
      count: i32[*B, T], true number of members, also above C.
      overflow: bool[*B, T], count > C: indices hold the first C members.
    """

    indices: jax.Array
    scores: jax.Array
    count: jax.Array
    overflow: jax.Array


def build(
    keys: jax.Array, *, max_keys: int | None = None, reorder: bool | None = None
) -> Index:
    """Builds the index over keys: half-space reporting's Init.

    Stores every key as `k = c + s k8 + e` with int8 codes k8 and a bound on |e|.

    Args:
      keys: f[*B, S, H], float32, bfloat16 or float16. NaN and infinite keys are legal:
        their blocks are always looked at.
      max_keys: room for keys inserted later; None is S.
      reorder: put near keys into the same cell, so that balls around cells can rule
        them out; None does so for H <= 8. Ids are positions in `keys` either way.

    Returns:
      `Index` with batch axes *B, in which the ids of the keys are 0 to S - 1.

    Raises:
      ValueError: wrong rank, no keys, H > 1024, max_keys < S, or more room than there
        is memory.
      TypeError: keys are not a supported float array.

    Cost: O(S H) time a row, and O(S log^2 S) more where reordered; P (5 H + 1) bytes of
    memory for float32 keys, P being max_keys rounded up to a multiple of 32, or of 128
    from 1,024 keys on.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4), max_keys=8)
      >>> int(index.size), index.max_keys
      (4, 8)

    Source: Chen et al. 2024, Algorithm 3 (Init); certified sketches take the place of
    the structure of AEM92, see `hsrjax/_src/index/sketch.py`.
    """
    keys = jnp.asarray(keys)
    _check_keys("keys", keys)
    count = keys.shape[-2]
    given = count if max_keys is None else max_keys
    max_keys = checks.check_positive("max_keys", given)
    if max_keys < count:
        raise ValueError(
            f"max_keys must be at least the number of keys, {count}, got {max_keys}; "
            "raise it or build over fewer keys."
        )
    memory.check_room("max_keys", max_keys, keys.shape[:-2], keys.shape[-1], keys.dtype)
    if reorder is None:
        reorder = keys.shape[-1] <= MAX_SPATIAL_DIM
    run = functools.partial(_build, max_keys=max_keys, reorder=reorder)
    return meshes.automatic(run, keys, keys.ndim - 2)(keys)


@functools.partial(jax.jit, static_argnames=("max_keys", "reorder"))
def _build(keys, *, max_keys, reorder):
    index = Index.of(keys, max_keys=max_keys, whole_cells=reorder)
    return group_keys(index)[0] if reorder else index


def insert(index: Index, keys: jax.Array) -> Index:
    """Adds U keys to every row; the first gets the id `size`, and so on.

    Only the blocks that the new keys fall into are sketched again, from the stored
    float keys, so an index that has grown key by key equals one built at once (up to
    the centre and the order of slots, which change no result).

    Args:
      index: from `build`.
      keys: f[*B, U, H] in the index's dtype.

    Returns:
      `Index` with U more keys. Under jit, where the size is not known, keys beyond
      `max_keys` are not stored and are counted in `dropped`.

    Raises:
      ValueError: shapes do not fit the index, U > max_keys, or (outside jit, where the
        size is known) the keys do not fit.
      TypeError: dtype differs from the index's.

    Cost: O((U + 64) H) time a row, however many keys are stored.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4), max_keys=8)
      >>> int(hsrjax.insert(index, jnp.ones((2, 4))).size)
      6

    Source: Chen et al. 2024, Theorem B.11 (dynamic half-space reporting).
    """
    keys = jnp.asarray(keys)
    _check_keys("keys", keys)
    lead = index.size.shape
    expected = (*lead, keys.shape[-2], index.keys.shape[-1])
    checks.check_equal("keys.shape", keys.shape, expected, "to fit the index")
    checks.check_same_dtype("keys", keys, index.keys)
    new, held = keys.shape[-2], checks.values(index.size)
    most = 0 if held is None else int(np.max(held, initial=0))
    if most + new > index.max_keys:
        raise ValueError(
            f"keys must fit into the index: it has room for {index.max_keys} keys and "
            f"holds {most}, got {new} more; build with a larger max_keys."
        )
    run = functools.partial(_insert, implementations=_implementations())
    return meshes.automatic(run, index.size, index.size.ndim)(index, keys)


@functools.partial(jax.jit, static_argnames="implementations")
def _insert(index, keys, *, implementations):
    lengths = jnp.full(index.size.shape, keys.shape[-2], jnp.int32)
    return operations(implementations).append(index, keys, lengths)


def delete(index: Index, ids: jax.Array) -> Index:
    """Removes keys: a deleted key is never reported again and its id never reused.

    Args:
      index: from `build`.
      ids: i32[*B, U], ids as reported: padding, `max_keys`, is no key. Deleting a key
        twice does nothing.

    Returns:
      `Index` without them; their room is not used again. Under jit ids out of range do
      nothing.

    Raises:
      ValueError: shape does not fit, or (outside jit) an id is neither in [0, size) nor
        padding.
      TypeError: ids are not integers.

    Cost: O(max_keys) time a row.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.delete(hsrjax.build(jnp.eye(4)), jnp.array([1]))
      >>> hsrjax.count(index, jnp.ones((1, 4)), jnp.array([0.5]))
      Array([3], dtype=int32)

    Source: Chen et al. 2024, Theorem B.11 (dynamic half-space reporting).
    """
    known, ids = checks.values(ids, index.size), jnp.asarray(ids)
    checks.check_integer("ids", ids)
    lead = index.size.shape
    checks.check_rank("ids", ids, "[*B, U]")
    checks.check_equal("ids.shape[:-1]", ids.shape[:-1], lead, "the index's batch axes")
    if known is not None:
        given, size = known
        wrong = (given < 0) | ((given >= size[..., None]) & (given != index.max_keys))
        if wrong.any():
            raise ValueError(
                "ids must lie in [0, size) of their row, or be the padding "
                f"{index.max_keys} of a report, got {given[wrong][:5].tolist()} with "
                f"size {size.tolist()}; pass ids that `query` reported."
            )
    return meshes.automatic(_delete, index.size, index.size.ndim)(index, ids)


@jax.jit
def _delete(index, ids):
    padded = index.keys.shape[-2]
    safe = jnp.where(ids < 0, padded, ids).astype(jnp.int32)
    gone = jnp.zeros((*index.size.shape, padded, 1), jnp.bool_)
    gone = put_rows(gone, safe, jnp.ones((*ids.shape, 1), jnp.bool_))[..., 0]
    if index.ids is not None:
        gone = jnp.take_along_axis(gone, index.ids, axis=-1)
    return dataclasses.replace(index, alive=index.alive & ~bitset.pack(gone))


def query(
    index: Index,
    normals: jax.Array,
    offsets: jax.Array,
    *,
    capacity: int,
    implementation: str | None = None,
) -> Report:
    """Reports every key in the half-spaces `{k : <normal, k> >= offset}`.

    Membership is the float32 inner product at highest precision, ties included. What is
    smaller than the smallest normal number, 1.2e-38, counts as zero where the hardware
    flushes it, in scores and in offsets.

    Args:
      index: from `build`, `insert`, `delete`; batch axes *B.
      normals: f[*B, T, H], in the units of the keys.
      offsets: f32[*B, T] or anything that broadcasts to it, in the units of the inner
        product. +inf reports nothing, -inf every key whose score is not NaN.
      capacity: C >= 1, slots for members of each query; static.
      implementation: the code that runs, as in `attention`.

    Returns:
      `Report`, whose scores are differentiable in the normals and the keys.

    Raises:
      ValueError: shapes do not fit, capacity < 1, an unknown implementation.
      TypeError: unsupported dtype, or no index.

    Cost: one int8 product over the sketch, of which H bytes a key are read, then O(H)
    for each survivor, a little more than the members; more survivors than slots take
    further passes. Memory: a bit for each query and key, and O(T C H) numbers, a row.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4))
      >>> report = hsrjax.query(index, jnp.ones((1, 4)), 1.0, capacity=3)
      >>> report.indices, int(report.count[0]), bool(report.overflow[0])
      (Array([[0, 1, 2]], dtype=int32), 4, True)

    Source: Chen et al. 2024, Algorithm 3 (Query) and Corollary 3.1.
    """
    capacity = checks.check_positive("capacity", capacity)
    normals, offsets = _check(index, normals, offsets)
    names = _implementations(implementation)
    run = functools.partial(_report, capacity=capacity, implementations=names)
    return meshes.automatic(run, normals, normals.ndim - 1)(index, normals, offsets)


def count(
    index: Index,
    normals: jax.Array,
    offsets: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Number of keys in each half-space `{k : <normal, k> >= offset}`.

    Args:
      index: from `build`, `insert`, `delete`; batch axes *B.
      normals: f[*B, T, H], in the units of the keys.
      offsets: f32[*B, T] or anything that broadcasts to it.
      implementation: the code that runs, as in `attention`.

    Returns:
      i32[*B, T], exact; not differentiable.

    Raises:
      ValueError, TypeError: as `query`.

    Cost: as `query` with 256 slots; no member is kept.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> hsrjax.count(hsrjax.build(jnp.eye(4)), jnp.ones((1, 4)), 1.0)
      Array([4], dtype=int32)

    Source: Chen et al. 2024, Algorithm 3 (Query).
    """
    normals, offsets = _check(index, normals, offsets)
    frozen = jax.lax.stop_gradient((index, normals, offsets))
    run = functools.partial(_count, implementations=_implementations(implementation))
    return meshes.automatic(run, normals, normals.ndim - 1)(*frozen)


# Jitted, as is every entry to this package that runs more than a few operations: called
# outside jit they would otherwise be compiled operation by operation, for seconds.
@functools.partial(jax.jit, static_argnames=("capacity", "implementations"))
def _report(index, normals, offsets, *, capacity, implementations):
    frozen, a, b = jax.lax.stop_gradient((index, normals, offsets))
    words = operations(implementations).scan(frozen, a, b)
    slots, count = _members(frozen, a, b, words, capacity=capacity)
    ids = ids_of(index.ids, slots)
    found = ids < index.keys.shape[-2]
    ids = jnp.where(found, ids, index.max_keys)
    scores = jnp.where(found, _score_slots(index, normals, slots), -jnp.inf)
    return Report(ids, scores, count, count > capacity)


@functools.partial(jax.jit, static_argnames="implementations")
def _count(index, normals, offsets, *, implementations):
    words = operations(implementations).scan(index, normals, offsets)
    ranked = bitset.rank(words)

    def one_pass(i, total):
        member = _survivors(index, normals, offsets, ranked, i, _COUNTED_AT_ONCE)[1]
        return total + jnp.sum(member, axis=-1, dtype=jnp.int32)

    start = jnp.zeros(words.shape[:-1], jnp.int32)
    start = meshes.varying(start, index.keys, normals, offsets, words)
    passes = bitset.passes(words, _COUNTED_AT_ONCE)
    return jax.lax.fori_loop(0, passes, one_pass, start)


def _implementations(name: str | None = None) -> tuple[str, ...]:
    return implementations_for(name, costs.platform())


def _members(index, normals, offsets, words, *, capacity):
    """First `capacity` members (slots ordered by id) and the true count.

    Survivors are scored in as many passes of fixed size as there are survivors, so
    the count is exact and no member is lost however many survive.
    """
    a_pass = max(WORD, -(-5 * capacity // 4))
    past = index.keys.shape[-2]
    lead = words.shape[:-1]
    ranked = bitset.rank(words)

    def one_pass(i, carry):
        ids, slots, total = carry
        chunk, member = _survivors(index, normals, offsets, ranked, i, a_pass)
        chunk_ids = ids_of(index.ids, chunk)
        ids = jnp.concatenate([ids, jnp.where(member, chunk_ids, past)], axis=-1)
        slots = jnp.concatenate([slots, jnp.where(member, chunk, past)], axis=-1)
        ids, slots = jax.lax.sort((ids, slots), num_keys=1)
        total = total + jnp.sum(member, axis=-1, dtype=jnp.int32)
        return ids[..., :capacity], slots[..., :capacity], total

    nothing = jnp.full((*lead, capacity), past, jnp.int32)
    start = (nothing, nothing, jnp.zeros(lead, jnp.int32))
    start = meshes.varying(start, index.keys, normals, offsets, words)
    _, slots, total = jax.lax.fori_loop(
        0, bitset.passes(words, a_pass), one_pass, start
    )
    return slots, total


def _survivors(index, normals, offsets, ranked, i, a_pass):
    """Slots i32[*B, T, C] of pass i over what the scan left, and which are members."""
    slots = bitset.select(ranked, i * a_pass + positions(a_pass, 1))
    scores = _score_slots(index, normals, slots)
    inside = slots < index.keys.shape[-2]
    return slots, inside & (scores >= offsets[..., None])


def _score_slots(index: Index, normals: jax.Array, slots: jax.Array) -> jax.Array:
    """Exact scores f32[*B, T, C] of each query's own slots i32[*B, T, C]."""
    flat = slots.reshape(*slots.shape[:-2], -1)
    keys = take_rows(index.keys, flat).reshape(*slots.shape, -1)
    return dot(normals[..., None, :], keys)[..., 0, :]


def _check(index, normals, offsets) -> tuple[jax.Array, jax.Array]:
    """Static checks; the arrays, offsets broadcast to one per query."""
    if not isinstance(index, Index):
        raise TypeError(
            f"index must come from hsrjax.build, got {type(index).__name__}."
        )
    normals = jnp.asarray(normals)
    checks.check_float("normals", normals)
    checks.check_rank("normals", normals, "[*B, T, H]")
    checks.check_nonempty("normals", normals)
    lead = index.size.shape
    checks.check_equal(
        "normals.shape[:-2]", normals.shape[:-2], lead, "the index's batch axes"
    )
    checks.check_equal(
        "normals.shape[-1]", normals.shape[-1], index.keys.shape[-1], "the keys' size"
    )
    offsets = jnp.asarray(offsets, jnp.float32)
    try:
        return normals, jnp.broadcast_to(offsets, normals.shape[:-1])
    except ValueError:
        raise ValueError(
            f"offsets must broadcast to {normals.shape[:-1]} (one per query), got "
            f"shape {offsets.shape}."
        ) from None


def _check_keys(name: str, keys: jax.Array) -> None:
    """The checks shared by build and insert."""
    checks.check_float(name, keys)
    checks.check_rank(name, keys, "[*B, S, H]")
    checks.check_nonempty(name, keys)
    checks.check_head_dim(name, keys.shape[-1])
