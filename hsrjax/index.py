"""The half-space reporting structure: build (the paper's Init), insert and delete.

Keys live in slots; 32 slots are a block. A block knows its 8-bit sketch
(`hsrjax.bounds`). For head sizes up to 8 `build` also puts keys that are near each
other into the same cell, 128 slots with balls around them, because there balls rule out
whole cells; above that no geometric bound does, at any cell size, unless the keys lie
in few dimensions.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, checks, memory
from hsrjax.bitset import WORD
from hsrjax.rows import put_rows, take_rows
from hsrjax.spatial import sample_median, spatial_order

MAX_SPATIAL_DIM = 8
"""Largest head size for which `build` puts keys in spatial order."""

_CELL = 4
"""Blocks of a cell, where there are at least `_MANY_BLOCKS`; else one."""
_MANY_BLOCKS = 32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "sketch", "balls", "alive", "ids", "size", "dropped"],
    meta_fields=["max_keys"],
)
@dataclasses.dataclass(frozen=True)
class Index:
    """Keys ready for half-space reporting; a pytree with leading batch axes *B.

    P below is `max_keys` rounded up to a multiple of 32.

    Attributes:
      keys: f[*B, P, H], by slot, in the dtype given.
      sketch: the certified 8-bit sketch of the keys.
      balls: around each cell's keys, or None where keys are not in spatial order.
      alive: u32[*B, P/32], a bit for each slot in use and not deleted.
      ids: i32[*B, P], the id of each slot, or None where slot and id are the same.
      size: i32[*B], ids given out so far (deleted keys included).
      dropped: i32[*B], keys that found no room. Not zero means: keys are missing.
      max_keys: room, static.
    """

    keys: jax.Array
    sketch: bounds.Sketch
    balls: bounds.Balls | None
    alive: jax.Array
    ids: jax.Array | None
    size: jax.Array
    dropped: jax.Array
    max_keys: int

    @property
    def every_id(self) -> jax.Array:
        """The id of each slot, i32[*B, P], or [1, ..., 1, P] where it is the slot."""
        if self.ids is None:
            return bitset.positions(self.keys.shape[-2], self.keys.ndim - 1)
        return self.ids


def build(
    keys: jax.Array, *, max_keys: int | None = None, reorder: bool | None = None
) -> Index:
    """Builds the index over keys: half-space reporting's Init.

    Stores every key k as c + s k8 + e with int8 codes k8 and a bound on |e|.

    Args:
      keys: f[*B, S, H], float32, bfloat16 or float16. NaN and infinite keys are legal:
        their blocks are always looked at.
      max_keys: room for keys inserted later; None is S.
      reorder: put near keys into the same cell, so that balls around cells can rule
        them out; None does so for H <= 8. Ids are positions in `keys` either way.

    Returns:
      Index. Cost O(S H), and O(S log^2 S) more where reordered; P (5 H + 1) bytes
      for float32 keys, P being max_keys rounded up to a multiple of 32, or of 128 from
      1,024 keys on.

    Raises:
      ValueError: wrong rank, no keys, H > 1024, max_keys < S, or more room than there
        is memory.
      TypeError: keys are not a supported float array.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4), max_keys=8)
      >>> int(index.size), index.max_keys
      (4, 8)

    Source: Chen et al. 2024, Algorithm 3 (Init); the structure of AEM92 is replaced by
    certified sketches, see `hsrjax.bounds`.
    """
    keys = jnp.asarray(keys)
    check_keys("keys", keys)
    count = keys.shape[-2]
    max_keys = count if max_keys is None else max_keys
    checks.check_positive("max_keys", max_keys)
    if max_keys < count:
        raise ValueError(
            f"max_keys must be at least the number of keys, {count}, got {max_keys}; "
            "raise it or build over fewer keys."
        )
    memory.check_room("max_keys", max_keys, keys.shape[:-2], keys.shape[-1], keys.dtype)
    if reorder is None:
        reorder = keys.shape[-1] <= MAX_SPATIAL_DIM
    return _build(keys, max_keys=max_keys, reorder=reorder)


@functools.partial(jax.jit, static_argnames=("max_keys", "reorder"))
def _build(keys, *, max_keys, reorder):
    lead, count = keys.shape[:-2], keys.shape[-2]
    # Cells need whole numbers of blocks; without them P stays as small as it can be.
    padded = _padded(max_keys) if reorder else -(-max_keys // WORD) * WORD
    stored = jnp.pad(keys, [(0, 0)] * len(lead) + [(0, padded - count), (0, 0)])
    slot = jnp.arange(padded, dtype=jnp.int32)
    alive = bitset.pack(jnp.broadcast_to(slot < count, stored.shape[:-1]))
    size = jnp.full(lead, count, jnp.int32)
    centre = sample_median(jax.lax.stop_gradient(keys), size)
    index = Index(
        keys=stored,
        sketch=_sketch(stored, alive, centre),
        balls=None,
        alive=alive,
        ids=None,
        size=size,
        dropped=jnp.zeros(lead, jnp.int32),
        max_keys=max_keys,
    )
    return in_spatial_order(index)[0] if reorder else index


def in_spatial_order(index: Index) -> tuple[Index, jax.Array]:
    """The same keys with the same ids, near ones in the same cell.

    Returns:
      Index, and the slot i32[*B, P] that each slot's key had before.
    """
    frozen = jax.lax.stop_gradient(index.keys)
    order = spatial_order(frozen, index.size)
    keys = jnp.take_along_axis(index.keys, order[..., None], axis=-2)
    valid = jnp.take_along_axis(bitset.unpack(index.alive), order, axis=-1)
    centre = sample_median(frozen, index.size)
    blocks = keys.shape[-2] // WORD
    whole = blocks >= _MANY_BLOCKS and blocks % _CELL == 0
    size = WORD * (_CELL if whole else 1)
    frozen = jax.lax.stop_gradient(keys)
    balls = bounds.bound_cells(frozen, valid, centre, size=size)
    alive = bitset.pack(valid)
    reordered = dataclasses.replace(
        index,
        keys=keys,
        sketch=_sketch(keys, alive, centre),
        balls=balls,
        alive=alive,
        ids=ids_of(index.ids, order),
    )
    return reordered, order


def _sketch(keys: jax.Array, alive: jax.Array, centre: jax.Array) -> bounds.Sketch:
    """The sketch of keys f[*B, P, H] in use."""
    lead, h = keys.shape[:-2], keys.shape[-1]
    blocks = jax.lax.stop_gradient(keys).reshape(*lead, -1, WORD, h)
    valid = bitset.unpack(alive).reshape(*lead, -1, WORD)
    codes, scale, spread, radius = bounds.sketch_blocks(blocks, valid, centre)
    codes = jnp.moveaxis(codes.reshape(*lead, -1, h), -1, -2)
    return bounds.Sketch(codes, scale, spread, radius, centre)


def empty(
    lead: tuple[int, ...], head_dim: int, *, max_keys: int, dtype=jnp.float32
) -> Index:
    """An index without keys, with room for `max_keys` in each of the `lead` rows."""
    blocks = _padded(max_keys) // WORD
    # Fresh arrays each: a cache is donated whole, and no buffer twice.
    zeros = functools.partial(jnp.zeros, (*lead, blocks), jnp.float32)
    return Index(
        keys=jnp.zeros((*lead, blocks * WORD, head_dim), dtype),
        sketch=bounds.Sketch(
            codes=jnp.zeros((*lead, head_dim, blocks * WORD), jnp.int8),
            scale=jnp.ones((*lead, blocks), jnp.float32),
            spread=zeros(),
            radius=zeros(),
            centre=jnp.zeros((*lead, head_dim), jnp.float32),
        ),
        balls=None,
        alive=jnp.zeros((*lead, blocks), jnp.uint32),
        ids=None,
        size=jnp.zeros(lead, jnp.int32),
        dropped=jnp.zeros(lead, jnp.int32),
        max_keys=max_keys,
    )


def insert(index: Index, keys: jax.Array) -> Index:
    """Adds keys; they get the ids size, size + 1, ... of their row.

    Only the blocks that the new keys fall into are sketched again, from the stored
    float keys, so an index that has grown key by key equals one built at once (up to
    the centre and the order of slots, which change no result).

    Args:
      index: from `build`.
      keys: f[*B, U, H] in the index's dtype.

    Returns:
      Index with U more keys. Keys beyond `max_keys` are not stored and are counted in
      `dropped`. Cost O((U + 64) H), whatever the number of keys stored.

    Raises:
      ValueError: shapes do not fit the index, U > max_keys, or (outside jit, where the
        size is known) the keys do not fit.
      TypeError: dtype differs from the index's.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4), max_keys=8)
      >>> int(hsrjax.insert(index, jnp.ones((2, 4))).size)
      6

    Source: Chen et al. 2024, Theorem B.11 (dynamic half-space reporting).
    """
    keys = jnp.asarray(keys)
    check_keys("keys", keys)
    lead = index.size.shape
    expected = (*lead, keys.shape[-2], index.keys.shape[-1])
    checks.check_equal("keys.shape", keys.shape, expected, "to fit the index")
    check_dtype_of("keys", keys, index.keys)
    new = keys.shape[-2]
    if checks.concrete(index.size) and int(index.size.max()) + new > index.max_keys:
        raise ValueError(
            f"keys must fit into the index: it has room for {index.max_keys} keys and "
            f"holds {int(index.size.max())}, got {new} more; build with a larger "
            "max_keys."
        )
    return append(index, keys, jnp.full(lead, new, jnp.int32))


@jax.jit
def append(index: Index, keys: jax.Array, lengths: jax.Array) -> Index:
    """`insert` for rows of which only the first lengths i32[*B] keys are real."""
    new, h = keys.shape[-2:]
    lead, padded = index.size.shape, index.keys.shape[-2]
    step = bitset.positions(new, len(lead) + 1)
    slots = index.size[..., None] + step
    stored = (step < lengths[..., None]) & (slots < index.max_keys)
    slots = jnp.where(stored, slots, padded)
    all_keys = put_rows(index.keys, slots, keys)
    size = index.size + jnp.sum(stored, axis=-1, dtype=jnp.int32)

    touched = min((new + WORD - 2) // WORD + 1, padded // WORD)
    first = index.size // WORD
    block = first[..., None] + bitset.positions(touched, len(lead) + 1)
    slot = block[..., None] * WORD + bitset.positions(WORD, len(lead) + 2)
    fresh = (slot >= index.size[..., None, None]) & (slot < size[..., None, None])
    old = take_rows(index.alive[..., None], block)[..., 0]
    words = old | bitset.pack(fresh.reshape(*lead, -1))
    valid = bitset.unpack(words).reshape(*lead, touched, WORD)

    flat = take_rows(jax.lax.stop_gradient(all_keys), slot.reshape(*lead, -1))
    blocks = flat.reshape(*lead, touched, WORD, h)
    centre = _first_centre(index, jax.lax.stop_gradient(keys), lengths)
    codes, scale, spread, radius = bounds.sketch_blocks(blocks, valid, centre)
    sketch = index.sketch
    code_blocks = sketch.codes.reshape(*lead, h, -1, WORD)
    codes = jnp.moveaxis(codes, -1, -3)  # [*B, H, touched, 32]
    column = jnp.broadcast_to(block[..., None, :], (*lead, h, touched))
    put = lambda target, rows: put_rows(target[..., None], block, rows[..., None])[
        ..., 0
    ]
    balls = index.balls
    if balls is not None:
        cell = block // (balls.size // WORD)
        balls = bounds.widen_cells(balls, blocks, valid, cell)
    return dataclasses.replace(
        index,
        keys=all_keys,
        sketch=bounds.Sketch(
            codes=put_rows(code_blocks, column, codes).reshape(sketch.codes.shape),
            scale=put(sketch.scale, scale),
            spread=put(sketch.spread, spread),
            radius=put(sketch.radius, radius),
            centre=centre,
        ),
        balls=balls,
        alive=put(index.alive, words),
        size=size,
        dropped=index.dropped + jnp.maximum(lengths - (size - index.size), 0),
    )


def delete(index: Index, ids: jax.Array) -> Index:
    """Removes keys: a deleted key is never reported again and its id never reused.

    Args:
      index: from `build`.
      ids: i32[*B, U], ids as reported. Deleting a key twice does nothing.

    Returns:
      Index. Under jit ids out of range do nothing. Cost O(max_keys).

    Raises:
      ValueError: shape does not fit, or (outside jit) an id is not in [0, size).
      TypeError: ids are not integers.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.delete(hsrjax.build(jnp.eye(4)), jnp.array([1]))
      >>> hsrjax.count(index, jnp.ones((1, 4)), jnp.array([0.5]))
      Array([3], dtype=int32)

    Source: Chen et al. 2024, Theorem B.11 (dynamic half-space reporting).
    """
    ids = jnp.asarray(ids)
    checks.check_integer("ids", ids)
    lead = index.size.shape
    checks.check_rank("ids", ids, "[*B, U]")
    checks.check_equal("ids.shape[:-1]", ids.shape[:-1], lead, "the index's batch axes")
    if checks.concrete(ids, index.size) and ids.size:
        low, high = int(ids.min()), int((ids - index.size[..., None]).max())
        if low < 0 or high >= 0:
            raise ValueError(
                f"ids must lie in [0, size) of their row, got ids from {low} to "
                f"{int(ids.max())} with size {index.size.tolist()}; pass ids that "
                "`query` reported."
            )
    return _delete(index, ids)


@jax.jit
def _delete(index, ids):
    padded = index.keys.shape[-2]
    safe = jnp.where(ids < 0, padded, ids).astype(jnp.int32)
    gone = jnp.zeros((*index.size.shape, padded, 1), jnp.bool_)
    gone = put_rows(gone, safe, jnp.ones((*ids.shape, 1), jnp.bool_))[..., 0]
    if index.ids is not None:
        gone = jnp.take_along_axis(gone, index.ids, axis=-1)
    return dataclasses.replace(index, alive=index.alive & ~bitset.pack(gone))


def ids_of(ids: jax.Array | None, slots: jax.Array) -> jax.Array:
    """Ids of slots i32[*B, ..., C]; the slot past the end stays past the end."""
    if ids is None:
        return slots
    past = ids.shape[-1]
    flat = jnp.minimum(slots, past - 1).reshape(*ids.shape[:-1], -1)
    found = jnp.take_along_axis(ids, flat, axis=-1, mode="promise_in_bounds")
    return jnp.where(slots < past, found.reshape(slots.shape), past)


def check_keys(name: str, keys: jax.Array) -> None:
    """The checks shared by build and insert."""
    checks.check_float(name, keys)
    checks.check_rank(name, keys, "[*B, S, H]")
    checks.check_nonempty(name, keys)
    checks.check_head_dim(name, keys.shape[-1])


def check_dtype_of(name: str, keys: jax.Array, stored: jax.Array) -> None:
    """Raises TypeError unless keys have the dtype of what is stored."""
    if keys.dtype != stored.dtype:
        raise TypeError(
            f"{name} must have the stored dtype {stored.dtype}, got {keys.dtype}; "
            f"cast it with {name}.astype({stored.dtype})."
        )


def _first_centre(index: Index, keys: jax.Array, lengths: jax.Array) -> jax.Array:
    """The centre is chosen once, from a first batch large enough to be typical."""
    if keys.shape[-2] < WORD:
        return index.sketch.centre
    first = (index.size == 0) & (lengths >= keys.shape[-2] // 2)
    every = jnp.full_like(lengths, keys.shape[-2])
    return jnp.where(first[..., None], sample_median(keys, every), index.sketch.centre)


def _padded(max_keys: int) -> int:
    blocks = -(-max_keys // WORD)
    if blocks >= _MANY_BLOCKS:
        blocks = -(-blocks // _CELL) * _CELL
    return blocks * WORD
