"""Gradients that stay sums of products when a view of a parameter is undone.

A view that is linear in one parameter keeps a gradient G = Σₜ aₜ bₜᵀ a sum of products, with other factors: a scale of
rows or columns, a selection of them, a slice, a concatenation or a product with another matrix (LoRA) acts on one of
the two factors alone. So no gradient of an example is built for them. A mask, or the derivative of what is
done entry by entry, multiplies G itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost.factors import Factors, NotSeparableError
from cg_jax.ghost.views import Read, Step, is_complex

# Entry by entry in the one operand, whose derivative then scales the gradient.
ENTRYWISE = frozenset(
    """
    abs atan2 clamp cos cosh div erf exp exp2 expm1 integer_pow log log1p logistic max min mul neg pow rsqrt select_n
    sin sinh sqrt square tan tanh
    """.split()  # noqa: SIM905
)


def pull(steps: Sequence[Step], factors: Factors, read: Read, spread: Callable[[Any], tuple[int, ...]]) -> Factors:
    """The factors of a view's gradient, as those of the parameter's; NotSeparableError where it has none.

    `spread` tells the axes along which a static operand is not the same throughout.
    """
    for step in reversed(steps):
        name = step.eqn.primitive.name
        if step.is_identity:
            continue
        if name in ("add", "add_any", "sub", "neg"):
            factors = _signed(step, factors)
        elif name in ENTRYWISE:
            factors = _entrywise(step, factors, read, spread)
        elif name in _PULLS and (factors.scale is None or name in _REARRANGES):
            factors = _PULLS[name](step, factors, read)
        else:
            raise NotSeparableError
    return factors


def _signed(step: Step, factors: Factors) -> Factors:
    if step.operand.aval.shape != step.result.aval.shape:
        raise NotSeparableError
    negative = step.eqn.primitive.name == "neg" or (step.eqn.primitive.name == "sub" and step.position == 1)
    return factors._replace(b=-factors.b) if negative else factors


def _entrywise(step: Step, factors: Factors, read: Read, spread: Callable[[Any], tuple[int, ...]]) -> Factors:
    """By the derivative: of a factor where it varies along the axes of one alone, else of the gradient."""
    eqn, shape = step.eqn, step.result.aval.shape
    if step.operand.aval.shape != shape or (is_complex(step.operand.aval) and eqn.primitive.name != "mul"):
        raise NotSeparableError
    if eqn.primitive.name == "mul":
        other = eqn.invars[1 - step.position]
        along, value = spread(other), read(other)
    else:
        along = tuple(range(len(shape)))
        operands = [read(atom) for atom in eqn.invars]

        def result(x: jax.Array) -> jax.Array:
            return _compat.bind(eqn, [x if i == step.position else each for i, each in enumerate(operands)])[0]

        x = operands[step.position]
        value = jax.jvp(result, (x,), (jnp.ones_like(x),))[1]
    sides = {factors.sides[axis] for axis in along}
    value = jnp.broadcast_to(value, shape)
    if len(sides - {"N"}) == 2:
        if is_complex(value):
            raise NotSeparableError
        return factors._replace(scale=value if factors.scale is None else factors.scale * value)
    side = "D" if "D" in sides else "P"
    # The axes of that factor, with length 1 where the value is the same; the positions come after those of both.
    kept = value[tuple(slice(None) if i in along else slice(1) for i in range(len(shape)))]
    order = [i for letter in ("N", side) for i, s in enumerate(factors.sides) if s == letter]
    kept = kept.transpose([*order, *(i for i in range(len(shape)) if i not in order)])
    kept = kept.reshape(kept.shape[: len(order)])
    kept = jnp.expand_dims(kept, factors.sides.count("N"))
    field = "a" if side == "D" else "b"
    factor = getattr(factors, field)
    return factors._replace(**{field: factor * jnp.broadcast_to(kept, factor.shape).astype(_wider(factor, kept))})


def _wider(factor: jax.Array, value: jax.Array) -> Any:
    """The dtype of a factor times a value: that of the factor, unless it would lose an imaginary part."""
    return jnp.result_type(factor, jnp.complex64) if is_complex(value) else factor.dtype


def _transpose(step: Step, factors: Factors, read: Read) -> Factors:
    del read
    order = step.eqn.params["permutation"]  # result axis i is operand axis order[i]
    inverse = [order.index(axis) for axis in range(len(order))]  # operand axis j is result axis inverse[j]
    return _reordered(factors, inverse)


def _reordered(factors: Factors, order: Sequence[int]) -> Factors:
    """With the gradient's axes in another order."""

    def arranged(letter: str) -> list[int]:
        return [factors.place(axis) for axis in order if factors.sides[axis] == letter]

    n = arranged("N")
    a = factors.a.transpose([*n, len(n), *arranged("D")])
    b = factors.b.transpose([*n, len(n), *arranged("P")])
    scale = None if factors.scale is None else factors.scale.transpose(order)
    return Factors(a, b, "".join(factors.sides[axis] for axis in order), scale)


def _reshape(step: Step, factors: Factors, read: Read) -> Factors:
    """Axes are split, merged or dropped, those of each factor by themselves."""
    del read
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
    # Axes of length one may change sides, which moves no entry.
    scale = None if factors.scale is None else factors.scale.reshape(before)
    return Factors(factors.a.reshape(*n, t, *d), factors.b.reshape(*n, t, *p), sides, scale)


def _broadcast(step: Step, factors: Factors, read: Read) -> Factors:
    """New axes of length one; others would have to be summed."""
    if step.operand.aval.size != step.result.aval.size:
        raise NotSeparableError
    return _reshape(step, factors, read)


def _rev(step: Step, factors: Factors, read: Read) -> Factors:
    del read
    for axis in step.eqn.params["dimensions"]:
        factors = factors.on(axis, lambda factor, place: jnp.flip(factor, place))
    scale = None if factors.scale is None else jnp.flip(factors.scale, step.eqn.params["dimensions"])
    return factors._replace(scale=scale)


def _concatenate(step: Step, factors: Factors, read: Read) -> Factors:
    """The part of the operand."""
    del read
    axis = step.eqn.params["dimension"]
    sizes = [atom.aval.shape[axis] for atom in step.eqn.invars]
    start = sum(sizes[: step.position])
    stop = start + sizes[step.position]
    return factors.on(axis, lambda factor, place: jax.lax.slice_in_dim(factor, start, stop, axis=place))


def _padded(factors: Factors, axis: int, start: int, stride: int, size: int) -> Factors:
    """Zeros where a slice did not take from an axis of that size."""

    def pad(factor: jax.Array, place: int) -> jax.Array:
        length = factor.shape[place]
        after = size - start - (length - 1) * stride - 1
        edges = [(0, 0, 0)] * factor.ndim
        edges[place] = (start, after, stride - 1)
        return jax.lax.pad(factor, jnp.zeros((), factor.dtype), edges)

    return factors.on(axis, pad)


def _slice(step: Step, factors: Factors, read: Read) -> Factors:
    del read
    params, shape = step.eqn.params, step.operand.aval.shape
    for axis, (start, stride) in enumerate(
        zip(params["start_indices"], params["strides"] or (1,) * len(shape), strict=True)
    ):
        if factors.shape[axis] != shape[axis]:
            if factors.shape[axis] == 0:
                raise NotSeparableError
            factors = _padded(factors, axis, start, stride, shape[axis])
    return factors


def _split(step: Step, factors: Factors, read: Read) -> Factors:
    del read
    axis, sizes = step.eqn.params["axis"], [int(size) for size in step.eqn.params["sizes"]]
    if not sizes[step.output]:
        raise NotSeparableError
    return _padded(factors, axis, sum(sizes[: step.output]), 1, step.operand.aval.shape[axis])


def _gather(step: Step, factors: Factors, read: Read) -> Factors:
    """Rows or columns by their indices: what was taken twice adds up."""
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
    places, mode = read(eqn.invars[1])[:, 0], jax.lax.GatherScatterMode.from_any(eqn.params["mode"])
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


def _dot_general(step: Step, factors: Factors, read: Read) -> Factors:
    """A product with another matrix: it acts on the factor that its free axes are of."""
    eqn, position = step.eqn, step.position
    contract, batch = eqn.params["dimension_numbers"]
    other = read(eqn.invars[1 - position])
    mine, theirs = contract[position], contract[1 - position]
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    free = [[i for i in range(ranks[k]) if i not in (*contract[k], *batch[k])] for k in (0, 1)]
    lead, first = len(batch[0]), len(free[0])
    # Where the free axes of the operand, and of the other, stand in the result.
    own = [lead + i + (first if position == 1 else 0) for i in range(len(free[position]))]
    others = [lead + i + (0 if position == 1 else first) for i in range(len(free[1 - position]))]
    sides = {factors.sides[axis] for axis in others} or {"P"}
    if batch[0] or len(sides) > 1 or "N" in sides:
        raise NotSeparableError
    (side,) = sides
    factor = factors.a if side == "D" else factors.b
    places = [factors.place(axis) for axis in others]
    moved = jnp.tensordot(
        factor, other.astype(_wider(factor, other)), (places, free[1 - position]), precision=eqn.params["precision"]
    )
    # Now [*rest of the factor, *contracted axes of the other, in their order], to be in the operand's order.
    operand_sides = {axis: factors.sides[place] for axis, place in zip(free[position], own, strict=True)}
    operand_sides |= dict.fromkeys(mine, side)
    order_of_contracted = sorted(range(len(theirs)), key=lambda k: theirs[k])  # as tensordot leaves them
    names = [axis for axis in free[position] if operand_sides[axis] == side] + [mine[k] for k in order_of_contracted]
    lead_axes = moved.ndim - len(names)
    moved = moved.transpose(*range(lead_axes), *(lead_axes + names.index(axis) for axis in sorted(names)))
    letters = "".join(operand_sides[axis] for axis in range(ranks[position]))
    return Factors(moved, factors.b, letters) if side == "D" else Factors(factors.a, moved, letters)


def _to_complex(step: Step, factors: Factors, read: Read) -> Factors:
    """The real part of a complex gradient, or minus the imaginary one, by real factors over twice the positions."""
    del read
    axis = factors.sides.count("N")
    a, b = jnp.concatenate([factors.a.real, factors.a.imag], axis), (factors.b.real, factors.b.imag)
    if step.position == 0:
        return factors._replace(a=a, b=jnp.concatenate([b[0], -b[1]], axis))
    return factors._replace(a=a, b=jnp.concatenate([-b[1], -b[0]], axis))


_REARRANGES = {"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "rev"}
_PULLS: dict[str, Callable[[Step, Factors, Read], Factors]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "rev": _rev,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "gather": _gather,
    "dot_general": _dot_general,
    "convert_element_type": _to_complex,
    "complex": _to_complex,
}
