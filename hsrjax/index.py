"""The half-space reporting structure: build (the paper's Init), insert and delete.

Keys live in slots; 32 slots are a block. A block knows its 8-bit sketch
(`hsrjax.bounds`) and, for head sizes up to 8, the box around its keys. For those small
heads `build` also puts keys that are near each other into the same block, because there
boxes prune whole blocks; above that no geometric bound does, at any block size.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, checks, memory
from hsrjax.bitset import WORD

MAX_BOX_DIM = 8
"""Largest head size for which `build` reorders keys and keeps boxes."""

_CENTRE_SAMPLE = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "sketch", "boxes", "alive", "ids", "size", "dropped"],
    meta_fields=["max_keys"],
)
@dataclasses.dataclass(frozen=True)
class Index:
    """Keys ready for half-space reporting; a pytree with leading batch axes *B.

    P below is `max_keys` rounded up to a multiple of 32.

    Attributes:
      keys: f[*B, P, H], by slot, in the dtype given.
      sketch: the certified 8-bit sketch of the keys.
      boxes: f32[*B, P/32, 2, H], or None where keys are not reordered.
      alive: u32[*B, P/32], a bit for each slot in use and not deleted.
      ids: i32[*B, P], the id of each slot, or None where slot and id are the same.
      size: i32[*B], ids given out so far (deleted keys included).
      dropped: i32[*B], keys that found no room. Not zero means: keys are missing.
      max_keys: room, static.
    """

    keys: jax.Array
    sketch: bounds.Sketch
    boxes: jax.Array | None
    alive: jax.Array
    ids: jax.Array | None
    size: jax.Array
    dropped: jax.Array
    max_keys: int


def build(
    keys: jax.Array, *, max_keys: int | None = None, reorder: bool | None = None
) -> Index:
    """Builds the index over keys: half-space reporting's Init.

    Stores every key k as c + s k8 + e with int8 codes k8 and a bound on |e|.

    Args:
      keys: f[*B, S, H], float32, bfloat16 or float16. NaN and infinite keys are legal:
        their blocks are always looked at.
      max_keys: room for keys inserted later; None is S.
      reorder: put near keys into the same block of 32; None does so where boxes are
        kept (H <= 8). Ids are positions in `keys` either way.

    Returns:
      Index. Cost O(S H), and O(S log^2 S) more where reordered; P (5 H + 1) bytes
      for float32 keys, P being max_keys rounded up to a multiple of 32.

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
        reorder = keys.shape[-1] <= MAX_BOX_DIM
    return _build(keys, max_keys=max_keys, reorder=reorder)


@functools.partial(jax.jit, static_argnames=("max_keys", "reorder"))
def _build(keys, *, max_keys, reorder):
    lead, (count, h) = keys.shape[:-2], keys.shape[-2:]
    padded = _padded(max_keys)
    stored, ids = keys, None
    if reorder:
        order = spatial_order(jax.lax.stop_gradient(keys))
        stored = jnp.take_along_axis(keys, order[..., None], axis=-2)
        tail = jnp.arange(count, padded, dtype=jnp.int32)
        tail = jnp.broadcast_to(tail, (*lead, tail.size))
        ids = jnp.concatenate([order, tail], axis=-1)
    stored = jnp.pad(stored, [(0, 0)] * len(lead) + [(0, padded - count), (0, 0)])
    slot = jnp.arange(padded, dtype=jnp.int32)
    valid = jnp.broadcast_to(slot < count, stored.shape[:-1])
    centre = sample_median(jax.lax.stop_gradient(keys))
    blocks = jax.lax.stop_gradient(stored).reshape(*lead, -1, WORD, h)
    valid_blocks = valid.reshape(*lead, -1, WORD)
    codes, scale, spread, radius = bounds.sketch_blocks(blocks, valid_blocks, centre)
    codes = jnp.moveaxis(codes.reshape(*lead, -1, h), -1, -2)
    boxes = bounds.box_blocks(blocks, valid_blocks) if reorder else None
    return Index(
        keys=stored,
        sketch=bounds.Sketch(codes, scale, spread, radius, centre),
        boxes=boxes,
        alive=bitset.pack(valid),
        ids=ids,
        size=jnp.full(lead, count, jnp.int32),
        dropped=jnp.zeros(lead, jnp.int32),
        max_keys=max_keys,
    )


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
        boxes=None,
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
    boxes = index.boxes
    if boxes is not None:
        fresh_boxes = bounds.box_blocks(blocks, valid).reshape(*lead, touched, 2 * h)
        boxes = put_rows(boxes.reshape(*lead, -1, 2 * h), block, fresh_boxes)
        boxes = boxes.reshape(*lead, -1, 2, h)
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
        boxes=boxes,
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


def spatial_order(keys: jax.Array) -> jax.Array:
    """Order i32[*B, S] in which runs of 32 keys are near each other.

    A balanced k-d tree, built level by level: every node is sorted along the
    coordinate in which it is widest and cut in half. Cost O(S log^2 S).
    """
    lead, (count, h) = keys.shape[:-2], keys.shape[-2:]
    levels = max(0, (-(-count // WORD) - 1).bit_length())
    padded = WORD << levels
    points = jnp.nan_to_num(keys.astype(jnp.float32)).reshape(-1, count, h)
    points = jnp.pad(points, [(0, 0), (0, padded - count), (0, 0)])
    rows = points.shape[0]
    order = jnp.arange(padded, dtype=jnp.int32)
    order = jnp.broadcast_to(order, (rows, padded))
    for level in range(levels):
        nodes = order.reshape(rows, 1 << level, -1)
        inside = (nodes < count)[..., None]
        here = jnp.take_along_axis(points, order[..., None], axis=1)
        here = here.reshape(*nodes.shape, h)
        low = jnp.min(jnp.where(inside, here, jnp.inf), axis=2)
        high = jnp.max(jnp.where(inside, here, -jnp.inf), axis=2)
        widest = jnp.argmax(high - low, axis=-1).astype(jnp.int32)
        axis = jnp.take_along_axis(here, widest[..., None, None], axis=-1)
        axis = jnp.where(inside, axis, jnp.inf)[..., 0]
        by_axis = jnp.argsort(axis, axis=-1).astype(jnp.int32)
        order = jnp.take_along_axis(nodes, by_axis, axis=-1).reshape(rows, padded)
    # Padding sorts last in its node, hence last of all.
    return order[:, :count].reshape(*lead, count)


def sample_median(keys: jax.Array) -> jax.Array:
    """Coordinate-wise median f32[*B, H] of at most 256 keys, evenly spaced.

    A few huge or NaN keys cannot move it, so they spoil only their own blocks.
    """
    stride = max(1, keys.shape[-2] // _CENTRE_SAMPLE)
    sample = jnp.sort(keys[..., ::stride, :].astype(jnp.float32), axis=-2)
    median = sample[..., sample.shape[-2] // 2, :]
    return jnp.where(jnp.isfinite(median), median, 0.0)


def take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[*B, S, D] at rows i32[*B, C]: [*B, C, D]; rows past the end are zeros."""
    one = lambda t, r: t.at[r].get(mode="fill", fill_value=0)
    return _over_rows(one, table, rows)


def gather_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table f[*B, S, D] at rows i32[*B, ..., C]: f32[*B, ..., C, D], the fast way.

    Rows past the end are zeros.
    """
    size, width = table.shape[-2:]
    count = table.size // (size * width)

    def batched(table, rows):
        flat = rows.reshape(*table.shape[:-2], -1)
        return take_rows(table, flat).astype(jnp.float32).reshape(*rows.shape, width)

    def vectorized(table, rows):
        # Left to itself, XLA's CPU backend copies a row number by number. With one
        # index a row and a product in the loop it uses vectors, in a third of the time.
        # It cannot know that the factor is one.
        first = size * jnp.arange(count, dtype=jnp.int32)[:, None]
        at = (jnp.minimum(rows, size - 1).reshape(count, -1) + first).reshape(-1)
        one = (at >= 0).astype(jnp.float32)[:, None]
        found = table.reshape(-1, width).at[at].get(mode="promise_in_bounds")
        found = (found.astype(jnp.float32) * one).reshape(*rows.shape, width)
        return jnp.where((rows < size)[..., None], found, 0.0)

    if count * size >= 2**31:
        return batched(table, rows)
    return jax.lax.platform_dependent(table, rows, cpu=vectorized, default=batched)


def put_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Writes values[*B, C, D] into table[*B, S, D]; rows past the end are dropped."""
    one = lambda t, r, v: t.at[r].set(v, mode="drop")
    return _over_rows(one, table, rows, values)


def add_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values[*B, C, D] to table[*B, S, D]; rows past the end are dropped."""
    one = lambda t, r, v: t.at[r].add(v, mode="drop")
    return _over_rows(one, table, rows, values)


def _over_rows(one, *arrays):
    rows = arrays[1]
    for _ in range(rows.ndim - 1):
        one = jax.vmap(one)
    return one(*arrays)


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
    return jnp.where(first[..., None], sample_median(keys), index.sketch.centre)


def _padded(max_keys: int) -> int:
    return -(-max_keys // WORD) * WORD
