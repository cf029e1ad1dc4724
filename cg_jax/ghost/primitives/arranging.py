"""Primitives that rearrange, select or join entries. Each acts on the axes of the factors of a product separately."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax.ghost.factors import Factors, NotSeparableError
from cg_jax.ghost.primitives.base import Primitive, Spread, Static, Step, each, unscaled


def _transpose(step: Step, factors: Factors, _: Static) -> Factors:
    order = step.eqn.params["permutation"]  # result axis i is operand axis order[i]
    inverse = [order.index(axis) for axis in range(len(order))]  # operand axis j is result axis inverse[j]
    return _reordered(factors, inverse)


def _reordered(factors: Factors, order: Sequence[int]) -> Factors:
    """Reorder the axes of the gradient."""

    def arranged(letter: str) -> list[int]:
        return [factors.place(axis) for axis in order if factors.sides[axis] == letter]

    n = arranged("N")
    a = factors.a.transpose([*n, len(n), *arranged("D")])
    b = factors.b.transpose([*n, len(n), *arranged("P")])
    scale = None if factors.scale is None else factors.scale.transpose(order)
    return Factors(a, b, "".join(factors.sides[axis] for axis in order), scale)


def _reshape(step: Step, factors: Factors, _: Static) -> Factors:
    """Split, merge or drop axes, separately for each factor."""
    before, after = step.operand.aval.shape, step.result.aval.shape
    sides, i, j = "", 0, 0
    while i < len(before) or j < len(after):
        # The shortest runs of axes with equal products: the sides of a run must agree.
        lo, ro = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while math.prod(before[lo:i]) != math.prod(after[ro:j]):
            if math.prod(before[lo:i]) < math.prod(after[ro:j]) and i < len(before):
                i += 1
            elif j < len(after):
                j += 1
            else:
                i += 1
        of_run = {s for s, size in zip(factors.sides[ro:j], after[ro:j], strict=True) if size != 1} or set("D")
        if len(of_run) > 1 or math.prod(before[lo:i]) == 0:
            raise NotSeparableError
        sides += of_run.pop() * (i - lo)
    n, d, p = ([size for size, side in zip(before, sides, strict=True) if side == letter] for letter in "NDP")
    t = factors.a.shape[factors.sides.count("N")]
    # Axes of length one may change sides, since that moves no entry.
    scale = None if factors.scale is None else factors.scale.reshape(before)
    return Factors(factors.a.reshape(*n, t, *d), factors.b.reshape(*n, t, *p), sides, scale)


def _broadcast(step: Step, factors: Factors, static: Static) -> Factors:
    """Only new axes of length one. Other new axes would have to be summed."""
    if step.operand.aval.size != step.result.aval.size:
        raise NotSeparableError
    return _reshape(step, factors, static)


def _rev(step: Step, factors: Factors, _: Static) -> Factors:
    for axis in step.eqn.params["dimensions"]:
        factors = factors.on(axis, lambda factor, place: jnp.flip(factor, place))
    scale = None if factors.scale is None else jnp.flip(factors.scale, step.eqn.params["dimensions"])
    return factors._replace(scale=scale)


@unscaled
def _concatenate(step: Step, factors: Factors, _: Static) -> Factors:
    """Slice out the part of the operand."""
    axis = step.eqn.params["dimension"]
    sizes = [atom.aval.shape[axis] for atom in step.eqn.invars]
    start = sum(sizes[: step.position])
    stop = start + sizes[step.position]
    return factors.on(axis, lambda factor, place: jax.lax.slice_in_dim(factor, start, stop, axis=place))


def _padded(factors: Factors, axis: int, start: int, stride: int, size: int) -> Factors:
    """Pad with zeros where a slice took nothing from an axis of this size."""

    def pad(factor: jax.Array, place: int) -> jax.Array:
        length = factor.shape[place]
        after = size - start - (length - 1) * stride - 1
        edges = [(0, 0, 0)] * factor.ndim
        edges[place] = (start, after, stride - 1)
        return jax.lax.pad(factor, jnp.zeros((), factor.dtype), edges)

    return factors.on(axis, pad)


@unscaled
def _slice(step: Step, factors: Factors, _: Static) -> Factors:
    params, shape = step.eqn.params, step.operand.aval.shape
    for axis, (start, stride) in enumerate(
        zip(params["start_indices"], params["strides"] or (1,) * len(shape), strict=True)
    ):
        if factors.shape[axis] != shape[axis]:
            if factors.shape[axis] == 0:
                raise NotSeparableError
            factors = _padded(factors, axis, start, stride, shape[axis])
    return factors


@unscaled
def _split(step: Step, factors: Factors, _: Static) -> Factors:
    axis, sizes = step.eqn.params["axis"], [int(size) for size in step.eqn.params["sizes"]]
    if not sizes[step.output]:
        raise NotSeparableError
    return _padded(factors, axis, sum(sizes[: step.output]), 1, step.operand.aval.shape[axis])


@unscaled
def _to_complex(step: Step, factors: Factors, _: Static) -> Factors:
    """The real part of a complex gradient, or minus the imaginary one, by real factors over twice the positions."""
    axis = factors.sides.count("N")
    a, b = jnp.concatenate([factors.a.real, factors.a.imag], axis), (factors.b.real, factors.b.imag)
    if step.position == 0:
        return factors._replace(a=a, b=jnp.concatenate([b[0], -b[1]], axis))
    return factors._replace(a=a, b=jnp.concatenate([-b[1], -b[0]], axis))


def _same_axes(eqn: Any, spread: Spread) -> tuple[int, ...]:
    return spread(eqn.invars[0])


def _broadcast_axes(eqn: Any, spread: Spread) -> tuple[int, ...]:
    operand, axes = eqn.invars[0], eqn.params["broadcast_dimensions"]
    return tuple(axes[axis] for axis in spread(operand) if operand.aval.shape[axis] != 1)


_IDENTITY = Primitive(is_identity=True, is_linear=True)
_PASSING = dataclasses.replace(_IDENTITY, passes=True)
_COPY = dataclasses.replace(_PASSING, is_copy=True, is_elementwise=True, is_sum=True, spread=_same_axes)
_ARRANGING = Primitive(rearranges=True, is_linear=True, passes=True)
_PLACED = Primitive(is_elementwise=True, passes=True)  # among other entries
ENTRIES = (
    each("copy copy_p", _COPY)
    | each("name sharding_constraint", _PASSING)
    | each("pcast pvary", _IDENTITY)
    | {
        "optimization_barrier": Primitive(is_identity=True, is_many=True),
        "convert_element_type": dataclasses.replace(_PASSING, pull=_to_complex, spread=_same_axes),
        "complex": Primitive(pull=_to_complex, passes=True),
        "transpose": dataclasses.replace(_ARRANGING, pull=_transpose),
        "rev": dataclasses.replace(_ARRANGING, pull=_rev),
        # A rearrangement where it only adds axes of length one.
        "broadcast_in_dim": dataclasses.replace(_ARRANGING, pull=_broadcast, spread=_broadcast_axes),
        "slice": Primitive(pull=_slice, is_linear=True, passes=True),
        "split": Primitive(pull=_split, passes=True),
        "concatenate": dataclasses.replace(_PLACED, pull=_concatenate, is_differentiable=True),
    }
    | each("expand_dims reshape squeeze", dataclasses.replace(_ARRANGING, pull=_reshape))
    | each("dynamic_update_slice scatter scatter-add", _PLACED)
    | each("cumsum reduce_sum", Primitive(is_linear=True, passes=True))
    | each("cumlogsumexp cummax cummin cumprod fft pad reduce_max reduce_min", Primitive(passes=True))
)
