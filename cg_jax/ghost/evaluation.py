"""Evaluate equations of a jaxpr."""

from collections.abc import Sequence
from typing import Any

import jax

from cg_jax import _compat


def differentiated(positions: Sequence[int], operands: Sequence[Any], zero: jax.Array) -> list[Any]:
    """The operands of an equation. Those at `positions` are differentiated if `zero` is.

    The result of a rule with symbolic_zeros=True depends on which operands carry a tangent, so they must be those of
    jax.grad. The compiler folds the added zero away.
    """
    values = list(operands)
    for i in positions:
        values[i] = values[i] + zero.astype(values[i].dtype)
    return values


def is_var(atom: Any) -> bool:
    """Whether an operand is a variable."""
    return not _compat.is_literal(atom)


def leading_to(variables: Sequence[Any], eqns: Sequence[Any]) -> list[Any]:
    """The equations that `variables` depend on, and those with a side effect, in order."""
    wanted, kept = set(variables), []
    for eqn in reversed(eqns):
        if eqn.effects or any(out in wanted for out in eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if is_var(atom))
    return kept[::-1]


def evaluate(eqns: Sequence[Any], env: dict[Any, Any]) -> None:
    """Evaluate equations, in order, into `env`."""
    for eqn in eqns:
        env.update(zip(eqn.outvars, evaluated(eqn, env), strict=True))


def evaluated(eqn: Any, env: dict[Any, Any]) -> list[Any]:
    """The results of one equation."""
    return _compat.bind(eqn, read_all(eqn.invars, env))


def read_all(atoms: Sequence[Any], env: dict[Any, Any]) -> list[Any]:
    """The values of the operands of an equation."""
    return [atom.val if _compat.is_literal(atom) else env[atom] for atom in atoms]
