"""Look-ups of parameters. A row that a gather takes twice receives the sum of both cotangents, which is squared."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cg_jax.ghost.factors import Factors, NotSeparableError
from cg_jax.ghost.norm import Norm, of_table
from cg_jax.ghost.primitives.base import Primitive, Static, Step, unscaled
from cg_jax.ghost.product import sizes

_MODES = (
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)


def slice_rule(eqn: Any, view: int) -> Norm | None:
    """A slice at a position given by the example. The gradient is the cotangent at that position."""
    return Norm(lambda operands, cotangent: jnp.square(cotangent).sum()) if view == 0 else None


def gather_rule(eqn: Any, view: int) -> Norm | None:
    """lax.gather with any dimension numbers, at positions given by the example.

    The indexed axes and the batching axes of the table form one row number. The other axes form the rows. A window
    longer than one along the indexed axes is cut into rows, so windows may partly overlap.
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
    """The axes of the table in the output window, in order."""
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    return [axis for axis in range(len(table)) if axis not in dropped]


def _starts(indices: jax.Array, table: tuple[int, ...], params: Any) -> tuple[dict[int, jax.Array], jax.Array]:
    """(starts of windows, [*batch] for each axis of the table; whether a window is inside the table [*batch])."""
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
    """The row number at every position [*batch, *lengths]. `lengths` are those of the window along the axes `cut`."""
    ids = jnp.zeros((*batch, *lengths), jnp.int32)
    for axis in keys:
        place = starts[axis].reshape(*batch, *[1] * len(cut))
        if axis in cut:
            inner = lax.broadcasted_iota(jnp.int32, lengths, cut.index(axis))
            place = place + inner.reshape(*[1] * len(batch), *lengths)
        ids = ids * table[axis] + place
    return ids


@unscaled
def _pull_gather(step: Step, factors: Factors, static: Static) -> Factors:
    """Scatter rows or columns to their indices. Rows that were taken twice add up."""
    eqn, shape = step.eqn, step.operand.aval.shape
    numbers, indices = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    sizes = tuple(1 if i == axis else size for i, size in enumerate(shape))
    rest = tuple(i for i in range(len(step.result.aval.shape)) if i != axis)
    if (
        step.position != 0
        or axis < 0
        or numbers.collapsed_slice_dims != (axis,)
        or numbers.operand_batching_dims
        or tuple(eqn.params["slice_sizes"]) != sizes
        or len(indices) != 2
        or tuple(numbers.offset_dims) != rest
    ):
        raise NotSeparableError
    places, mode = static.read(eqn.invars[1])[:, 0], jax.lax.GatherScatterMode.from_any(eqn.params["mode"])
    if jnp.iinfo(places.dtype).bits < 32:  # the axis may be longer than they can count
        places = places.astype(jnp.int32)
    clips = mode == jax.lax.GatherScatterMode.CLIP
    places = jnp.clip(places, 0, shape[axis] - 1) if clips else jnp.where(places < 0, shape[axis], places)

    def scatter(factor: jax.Array, place: int) -> jax.Array:
        rows = jnp.moveaxis(factor, place, 0)
        zeros = jnp.zeros((shape[axis], *rows.shape[1:]), rows.dtype)
        return jnp.moveaxis(zeros.at[places].add(rows, mode="drop"), 0, place)

    if factors.sides[axis] == "N":  # would be a product of sums
        raise NotSeparableError
    return factors.on(axis, scatter)


def _dropping(eqn: Any) -> dict[str, Any]:
    """The backward pass drops what is out of range, unless clipped; the forward pass fills in or reads elsewhere."""
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return {}
    return {"mode": lax.GatherScatterMode.FILL_OR_DROP, "fill_value": 0}


ENTRIES = {
    "gather": Primitive(rule=gather_rule, transposed=_dropping, pull=_pull_gather, passes=True, is_differentiable=True),
    "dynamic_slice": Primitive(rule=slice_rule, passes=True),
}
