"""What is done entry by entry."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost.factors import Factors, NotSeparableError, is_complex, wider
from cg_jax.ghost.primitives.base import Primitive, Spread, Static, Step, each


def _signed(step: Step, factors: Factors, _: Static) -> Factors:
    """The cotangent, or minus it."""
    if step.operand.aval.shape != step.result.aval.shape:
        raise NotSeparableError
    negative = step.eqn.primitive.name == "neg" or (step.eqn.primitive.name == "sub" and step.position == 1)
    return factors._replace(b=-factors.b) if negative else factors


def _entrywise(step: Step, factors: Factors, static: Static) -> Factors:
    """By the derivative: of a factor where it varies along the axes of one alone, else of the gradient."""
    eqn, shape = step.eqn, step.result.aval.shape
    if step.operand.aval.shape != shape or (is_complex(step.operand.aval) and eqn.primitive.name != "mul"):
        raise NotSeparableError
    if eqn.primitive.name == "mul":
        other = eqn.invars[1 - step.position]
        along, value = static.spread(other), static.read(other)
    else:
        along = tuple(range(len(shape)))
        operands = [static.read(atom) for atom in eqn.invars]

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
    return factors._replace(**{field: factor * jnp.broadcast_to(kept, factor.shape).astype(wider(factor, kept))})


def _spread(eqn: Any, spread: Spread) -> tuple[int, ...]:
    """The axes along which any operand is not the same."""
    return tuple(sorted(set().union(*map(spread, eqn.invars))))


# Of each operand the derivative scales its gradient.
_FUNCTION = Primitive(pull=_entrywise, spread=_spread, passes=True)
_OF_TWO = dataclasses.replace(_FUNCTION, is_elementwise=True)
_SUM = Primitive(
    pull=_signed,
    spread=_spread,
    passes=True,
    is_elementwise=True,
    is_widened=True,
    is_linear=True,
    is_differentiable=True,
)
ENTRIES = (
    each("add add_any", dataclasses.replace(_SUM, is_sum=True))
    | {
        "sub": _SUM,
        "neg": Primitive(pull=_signed, spread=_spread, passes=True, is_linear=True),
        "mul": dataclasses.replace(_OF_TWO, is_widened=True, is_linear=True, is_differentiable=True),
        "div": dataclasses.replace(_OF_TWO, is_widened=True, is_differentiable=True),
        "rem": Primitive(is_elementwise=True),
    }
    | each("max min select_n", dataclasses.replace(_OF_TWO, is_differentiable=True))
    | each("atan2 clamp pow", _OF_TWO)
    | each("abs cos cosh erf exp exp2 expm1 integer_pow log log1p logistic rsqrt", _FUNCTION)
    | each("sin sinh sqrt square tan tanh", _FUNCTION)
    | each("conj erf_inv erfc imag lgamma real", Primitive(passes=True))
    | each("ceil floor is_finite nextafter round sign stop_gradient", Primitive(passes=False))
)
