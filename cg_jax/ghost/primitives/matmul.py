"""Matrix products, with a parameter on either side."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax.ghost.factors import Factors, NotSeparableError, wider
from cg_jax.ghost.primitives.base import Primitive, Static, Step, size_of, unscaled
from cg_jax.ghost.product import Product, sizes


def rule(eqn: Any, view: int) -> Product:
    """lax.dot_general with any dimension numbers, the parameter on either side."""
    contract, batch = (tuple(map(tuple, pair)) for pair in eqn.params["dimension_numbers"])
    shapes = tuple(var.aval.shape for var in eqn.invars)
    return _product(contract, batch, shapes, eqn.params["precision"], view)


@functools.lru_cache(maxsize=4096)
def _product(contract: Any, batch: Any, shapes: tuple[tuple[int, ...], ...], precision: Any, view: int) -> Product:
    other = 1 - view
    rank = len(shapes[view])
    # Contracted axes in the view's order, as all of its axes.
    pairs = sorted(zip(*contract, strict=True), key=lambda pair: pair[view])
    contract = tuple(tuple(pair[k] for pair in pairs) for k in (0, 1))
    free = [[i for i in range(len(s)) if i not in contract[k] and i not in batch[k]] for k, s in enumerate(shapes)]
    named = {
        "N": sizes(shapes[view], batch[view]),
        "T": sizes(shapes[other], free[other]),
        "D": sizes(shapes[view], contract[view]),
        "P": sizes(shapes[view], free[view]),
    }
    n, t, d, p = (math.prod(named[name]) for name in "NTDP")

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = x.transpose(*batch[other], *free[other], *contract[other]).reshape(n, t, d)
        # The output's axes are the batch, then the left side's, then the right side's.
        if view == 0:
            return a, cotangent.reshape(n, p, t).transpose(0, 2, 1)
        return a, cotangent.reshape(n, t, p)

    def to_view(gradient: jax.Array) -> jax.Array:
        order = (*batch[view], *contract[view], *free[view])
        spread = gradient.reshape(*named["N"], *named["D"], *named["P"])
        return spread.transpose(*(order.index(axis) for axis in range(len(order))))

    sides = None
    if tuple(batch[view]) == tuple(sorted(batch[view])):
        sides = "".join("D" if i in contract[view] else "N" if i in batch[view] else "P" for i in range(rank))
    product = Product(factors, to_view, (n, t, d, p), precision, keeps_entries=True, sides=sides)
    return product._replace(is_shared=True)


@unscaled
def _pull(step: Step, factors: Factors, static: Static) -> Factors:
    """A product with another matrix acts on the factor that has its free axes."""
    eqn, position = step.eqn, step.position
    contract, batch = eqn.params["dimension_numbers"]
    other = static.read(eqn.invars[1 - position])
    mine, theirs = contract[position], contract[1 - position]
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    free = [[i for i in range(ranks[k]) if i not in (*contract[k], *batch[k])] for k in (0, 1)]
    lead, first = len(batch[0]), len(free[0])
    # The positions of the free axes of both operands in the result.
    own = [lead + i + (first if position == 1 else 0) for i in range(len(free[position]))]
    others = [lead + i + (0 if position == 1 else first) for i in range(len(free[1 - position]))]
    sides = {factors.sides[axis] for axis in others} or {"P"}
    if batch[0] or len(sides) > 1 or "N" in sides:
        raise NotSeparableError
    (side,) = sides
    factor = factors.a if side == "D" else factors.b
    places = [factors.place(axis) for axis in others]
    moved = jnp.tensordot(
        factor, other.astype(wider(factor, other)), (places, free[1 - position]), precision=eqn.params["precision"]
    )
    # Now [*rest of the factor, *contracted axes of the other, in their order]. Reorder to the order of the operand.
    operand_sides = {axis: factors.sides[place] for axis, place in zip(free[position], own, strict=True)}
    operand_sides |= dict.fromkeys(mine, side)
    order_of_contracted = sorted(range(len(theirs)), key=lambda k: theirs[k])  # as tensordot leaves them
    names = [axis for axis in free[position] if operand_sides[axis] == side] + [mine[k] for k in order_of_contracted]
    lead_axes = moved.ndim - len(names)
    moved = moved.transpose(*range(lead_axes), *(lead_axes + names.index(axis) for axis in sorted(names)))
    letters = "".join(operand_sides[axis] for axis in range(ranks[position]))
    return Factors(moved, factors.b, letters) if side == "D" else Factors(factors.a, moved, letters)


def _operations(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * size_of(eqn.outvars) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


ENTRIES = {
    "dot_general": Primitive(
        rule=rule,
        of_complex=True,
        is_linear=True,
        pull=_pull,
        passes=True,
        is_differentiable=True,
        operations=_operations,
    )
}
