"""Elementwise primitives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost.factors import Factors, NotSeparableError, is_complex, wider
from cg_jax.ghost.primitives.base import Primitive, Spread, Static, Step, each


def _pull_sum(step: Step, factors: Factors, _: Static) -> Factors:
    if step.operand.aval.shape != step.result.aval.shape:
        raise NotSeparableError
    return factors


def _pull_negative(step: Step, factors: Factors, static: Static) -> Factors:
    factors = _pull_sum(step, factors, static)
    return factors._replace(b=-factors.b)


def _pull_difference(step: Step, factors: Factors, static: Static) -> Factors:
    return (_pull_sum if step.position == 0 else _pull_negative)(step, factors, static)


def _pull_product(step: Step, factors: Factors, static: Static) -> Factors:
    other = step.eqn.invars[1 - step.position]
    return _scaled(step, factors, static.spread(other), lambda: static.read(other))


def _pull_function(step: Step, factors: Factors, static: Static) -> Factors:
    """Scale by the derivative, which may differ in every entry."""
    if is_complex(step.operand.aval):
        raise NotSeparableError

    def derivative() -> jax.Array:
        operands = [static.read(atom) for atom in step.eqn.invars]

        def result(x: jax.Array) -> jax.Array:
            return _compat.bind(step.eqn, [x if i == step.position else o for i, o in enumerate(operands)])[0]

        x = operands[step.position]
        return jax.jvp(result, (x,), (jnp.ones_like(x),))[1]

    return _scaled(step, factors, tuple(range(len(step.result.aval.shape))), derivative)


def _scaled(step: Step, factors: Factors, along: tuple[int, ...], factor_of: Callable[[], jax.Array]) -> Factors:
    """Multiply by a value that varies along some axes: one factor if the axes belong to it alone, else the gradient."""
    shape = step.result.aval.shape
    if step.operand.aval.shape != shape:
        raise NotSeparableError
    value = jnp.broadcast_to(factor_of(), shape)
    sides = {factors.sides[axis] for axis in along}
    if len(sides - {"N"}) == 2:
        if is_complex(value):
            raise NotSeparableError
        return factors._replace(scale=value if factors.scale is None else factors.scale * value)
    side = "D" if "D" in sides else "P"
    # The axes of that factor, of length 1 where the value is constant. The positions come after the axes of both.
    kept = value[tuple(slice(None) if i in along else slice(1) for i in range(len(shape)))]
    order = [i for letter in ("N", side) for i, s in enumerate(factors.sides) if s == letter]
    kept = kept.transpose([*order, *(i for i in range(len(shape)) if i not in order)])
    kept = kept.reshape(kept.shape[: len(order)])
    kept = jnp.expand_dims(kept, factors.sides.count("N"))
    field = "a" if side == "D" else "b"
    factor = getattr(factors, field)
    return factors._replace(**{field: factor * jnp.broadcast_to(kept, factor.shape).astype(wider(factor, kept))})


def _spread(eqn: Any, spread: Spread) -> tuple[int, ...]:
    """The axes along which any operand is not constant."""
    return tuple(sorted(set().union(*map(spread, eqn.invars))))


_FUNCTION = Primitive(pull=_pull_function, spread=_spread, passes=True)
_OF_TWO = dataclasses.replace(_FUNCTION, is_elementwise=True)
_SUM = Primitive(
    is_elementwise=True,
    is_sum=True,
    is_widened=True,
    is_linear=True,
    pull=_pull_sum,
    spread=_spread,
    passes=True,
    is_differentiable=True,
)
ENTRIES = (
    each("add add_any", _SUM)
    | {
        "sub": dataclasses.replace(_SUM, is_sum=False, pull=_pull_difference),
        "neg": Primitive(is_linear=True, pull=_pull_negative, spread=_spread, passes=True),
        "mul": dataclasses.replace(_SUM, is_sum=False, pull=_pull_product),
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
