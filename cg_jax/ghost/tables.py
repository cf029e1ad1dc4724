"""Parameters that are looked up: what a gather takes twice gets the sum of both cotangents, which is squared then."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cg_jax.ghost.product import sizes

# (dynamic operands, cotangent) → (row numbers [R], values [R, E]).
Rows = Callable[[list[jax.Array], jax.Array], tuple[jax.Array, jax.Array]]

# Up to this many ids all pairs are compared; sorting more of them is faster.
_PAIRS = 512
_MODES = (
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)


class Norm(NamedTuple):
    """A use whose view's gradient places or adds up cotangents; for one example."""

    sq_norm: Callable[[list[jax.Array], jax.Array], jax.Array]  # (dynamic operands, cotangent) → ‖g‖²
    rows: Rows | None = None  # of a table, (dynamic operands, cotangent) → what is added to which of its rows


def of_table(rows: Rows) -> Norm:
    """The rule of a use that adds values to rows of a table."""
    return Norm(lambda operands, cotangent: sq_norm_of_rows(*rows(operands, cotangent)), rows)


def sq_norm_of_rows(ids: jax.Array, values: jax.Array) -> jax.Array:
    """‖g‖² of a gradient that is Σ values [R, E] at the rows `ids` [R]."""
    if values.size == 0:
        return jnp.zeros((), values.dtype)
    return jnp.square(jax.ops.segment_sum(values, _labels(ids), ids.size)).sum()


def lift_norm(rule: Norm, is_slice: bool) -> Norm | None:
    """The rule of a use in the body of a scan, from operands and cotangents [length, ...] of all steps.

    A slice is another in each step. Of a table that is the same in all of them rows add up over the steps; of anything
    else there is no rule.
    """
    if is_slice:
        return Norm(lambda operands, cotangent: jax.vmap(rule.sq_norm)(operands, cotangent).sum())
    rows = rule.rows
    if rows is None:
        return None

    def of_steps(operands: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, values = jax.vmap(rows)(operands, cotangent)
        return ids.reshape(-1), values.reshape(ids.size, values.shape[-1])

    return of_table(of_steps)


def dynamic_slice(eqn: Any, view: int) -> Norm | None:
    """A slice at a place that the example names: the gradient is the cotangent, put there."""
    return Norm(lambda operands, cotangent: jnp.square(cotangent).sum()) if view == 0 else None


def gather(eqn: Any, view: int) -> Norm | None:
    """lax.gather with any dimension numbers, at places that the example names.

    The axes of the table that the indices choose from, and the batching axes, make one row number; the others are the
    rows. A window longer than one along the former is cut into rows, so that windows may overlap in part.
    """
    numbers, table, params = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.params
    if view != 0 or params["mode"] not in _MODES:
        return None
    lengths, offset, window = params["slice_sizes"], numbers.offset_dims, _window_axes(table, numbers)
    chosen = [axis for axis in range(len(table)) if axis in numbers.start_index_map and lengths[axis] < table[axis]]
    keys = sorted({*chosen, *numbers.operand_batching_dims})
    if math.prod(sizes(table, keys)) >= 2**31:
        return None
    cut = [axis for axis in window if axis in chosen]
    order = [*cut, *(axis for axis in window if axis not in chosen)]

    def rows(operands: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = [axis for axis in range(cotangent.ndim) if axis not in offset]
        values = cotangent.transpose(*batch, *(offset[window.index(axis)] for axis in order))
        starts, inside = _starts(operands[0], table, params)
        values = jnp.where(inside.reshape(*inside.shape, *[1] * len(order)), values, 0)
        ids = _row_numbers(starts, inside.shape, table, keys, cut, sizes(lengths, cut))
        return ids.reshape(-1), values.reshape(ids.size, math.prod(sizes(lengths, order[len(cut) :])))

    return of_table(rows)


def _window_axes(table: tuple[int, ...], numbers: Any) -> list[int]:
    """The axes of the table that the window in the output has, in order."""
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    return [axis for axis in range(len(table)) if axis not in dropped]


def _starts(indices: jax.Array, table: tuple[int, ...], params: Any) -> tuple[dict[int, jax.Array], jax.Array]:
    """(where windows begin, [*batch] by axis of the table, whether a window is inside the table [*batch])."""
    if jnp.iinfo(indices.dtype).bits < 32:  # the table may be longer than they can count
        indices = indices.astype(jnp.int32)
    starts, inside = {}, jnp.ones(indices.shape[:-1], bool)
    for k, axis in enumerate(params["dimension_numbers"].start_index_map):
        end = table[axis] - params["slice_sizes"][axis]
        start = jnp.clip(indices[..., k], 0, end)
        if params["mode"] != lax.GatherScatterMode.CLIP:
            inside &= start == indices[..., k]
        starts[axis] = start.astype(jnp.int32)
    numbers = params["dimension_numbers"]
    for axis, position in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        starts[axis] = lax.broadcasted_iota(jnp.int32, indices.shape[:-1], position)
    return starts, inside


def _row_numbers(
    starts: dict[int, jax.Array],
    batch: tuple[int, ...],
    table: tuple[int, ...],
    keys: list[int],
    cut: list[int],
    lengths: tuple[int, ...],
) -> jax.Array:
    """The number of the row at every place [*batch, *lengths]; `lengths` are the window's along the axes `cut`."""
    ids = jnp.zeros((*batch, *lengths), jnp.int32)
    for axis in keys:
        place = starts[axis].reshape(*batch, *[1] * len(cut))
        if axis in cut:
            inner = lax.broadcasted_iota(jnp.int32, lengths, cut.index(axis))
            place = place + inner.reshape(*[1] * len(batch), *lengths)
        ids = ids * table[axis] + place
    return ids


def _labels(ids: jax.Array) -> jax.Array:
    """Numbers below R for ids [R], equal where the ids are."""
    if ids.size <= _PAIRS:
        return jnp.argmax(ids[:, None] == ids[None], axis=1).astype(jnp.int32)
    order = jnp.argsort(ids)
    changes = jnp.diff(ids[order]) != 0
    return jnp.zeros_like(ids).at[order[1:]].set(jnp.cumsum(changes).astype(ids.dtype))
