"""The results of an equation that carry a tangent, given the operands that do, exactly as in jax.grad.

A value is *active* if jax.grad carries a tangent to it from a parameter. stop_gradient, sign and similar primitives end
activity, and a rule with `symbolic_zeros=True` may do so. Most primitives pass activity on to every inexact result. For
the others, the equation is differentiated with a probe on each of its results.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cg_jax import _compat
from cg_jax.ghost import primitives


def is_inexact(var: Any) -> bool:
    """Whether a variable holds real or complex numbers, so that it may carry a tangent."""
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact)


def passes_on(eqn: Any) -> bool:
    """Whether every inexact operand passes a tangent on to every inexact result."""
    # Unless a custom rule asks for symbolic zeros, it receives zeros, and its result is a tangent.
    return bool(primitives.of(eqn).passes) or eqn.params.get("symbolic_zeros") is False


def active_outputs(eqn: Any, operands: Sequence[int]) -> tuple[int, ...]:
    """Positions of the results that carry a tangent if the operands at these positions do."""
    operands = [i for i in operands if is_inexact(eqn.invars[i])]
    inexact = tuple(k for k, out in enumerate(eqn.outvars) if is_inexact(out))
    if not operands or primitives.of(eqn).passes is False:
        return ()
    if passes_on(eqn):
        return inexact
    return tuple(k for k, active in zip(inexact, _probed(eqn, operands, inexact), strict=True) if active)


def _probed(eqn: Any, operands: Sequence[int], outputs: Sequence[int]) -> list[bool]:
    """The active results of one equation according to JAX. All are active if JAX cannot differentiate it."""
    active = [False] * len(outputs)

    def probe(k: int, value: Any) -> Any:
        @jax.custom_jvp
        def identity(x: Any) -> Any:
            return x

        def rule(primals: Any, tangents: Any) -> Any:
            active[k] = not isinstance(tangents[0], SymbolicZero)
            return primals[0], jnp.zeros_like(primals[0])

        identity.defjvp(rule, symbolic_zeros=True)
        return identity(value)

    def outputs_of(differentiated: list[Any], values: list[Any]) -> list[Any]:
        values = list(values)
        for position, value in zip(operands, differentiated, strict=True):
            values[position] = value
        outs = _compat.bind(eqn, values)
        return [probe(k, outs[position]) for k, position in enumerate(outputs)]

    def differentiate(values: list[Any]) -> Any:
        return jax.vjp(lambda some: outputs_of(some, values), [values[i] for i in operands])[0]

    try:
        jax.eval_shape(differentiate, [atom.aval for atom in eqn.invars])
    except (ValueError, TypeError, NotImplementedError):
        return [True] * len(outputs)
    return active


def has_reverse_mode(eqn: Any, positions: Sequence[int]) -> bool:
    """Whether JAX can differentiate one equation, in reverse mode, with respect to the operands at `positions`.

    It rejects some primitives (a while loop). A loss may contain them where no gradient passes.
    """
    if primitives.of(eqn).is_differentiable:
        return True

    def gradient(operands: list[Any]) -> Any:
        def outputs(views: list[Any]) -> list[Any]:
            values = list(operands)
            for position, view in zip(positions, views, strict=True):
                values[position] = view
            return [out for out in _compat.bind(eqn, values) if jnp.issubdtype(out.dtype, jnp.inexact)]

        outs, pull = jax.vjp(outputs, [operands[position] for position in positions])
        return pull(outs)

    avals = [atom.aval for atom in eqn.invars]
    try:
        jax.eval_shape(gradient, avals)
    except (ValueError, TypeError, NotImplementedError):
        return False
    return True
