"""Views of parameters: the equations between a parameter and its use, and the way back for a gradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost import primitives
from cg_jax.ghost.capture import Program
from cg_jax.ghost.evaluation import is_var
from cg_jax.ghost.factors import Factors, NotSeparableError
from cg_jax.ghost.primitives import Read, Static, Step


def path_to(program: Program, parameter: int, view: Any) -> list[Step] | None:
    """The steps from a parameter to a view, in order. None if there is more than one path."""
    steps: list[Step] = []
    var = view
    while var != program.parameters[parameter]:
        eqn = program.producers.get(var)
        if eqn is None:
            return None
        positions = [
            i for i, atom in enumerate(eqn.invars) if is_var(atom) and parameter in program.reach.get(atom, ())
        ]
        if primitives.of(eqn).is_many:  # many operands at once, each with its own result
            positions = [eqn.outvars.index(var)]
        if len(positions) != 1:
            return None
        steps.append(Step(eqn, positions[0], eqn.outvars.index(var)))
        var = eqn.invars[positions[0]]
    return steps[::-1]


def is_isometric(steps: Sequence[Step]) -> bool:
    """Whether the steps only rearrange a parameter, entry by entry."""
    return all(
        step.is_identity or (primitives.of(step.eqn).rearranges and step.operand.aval.size == step.result.aval.size)
        for step in steps
    )


def undo(steps: Sequence[Step], like: Any, total: jax.Array, read: Read) -> jax.Array:
    """Map the gradient of a view to the gradient of the parameter, in the dtype of the gradient.

    `like` is the value of the parameter. It is widened, since casts on the path would round the accumulated gradient.
    """

    def widen(value: Any) -> Any:
        return value.astype(total.dtype) if jnp.issubdtype(jnp.result_type(value), jnp.floating) else value

    def forward(value: jax.Array) -> jax.Array:
        for step in steps:
            if not step.is_identity:
                operands = [
                    widen(read(atom)) if i != step.position else value for i, atom in enumerate(step.eqn.invars)
                ]
                changed = {"preferred_element_type": None} if "preferred_element_type" in step.eqn.params else {}
                value = _compat.bind(step.eqn, operands, **changed)[step.output]
        return value

    if all(step.is_identity for step in steps):
        return total
    _, pull = jax.vjp(forward, _compat.vary(widen(like), _compat.varying_axes(total)))
    return pull(total)[0]


def pull(steps: Sequence[Step], factors: Factors, static: Static) -> Factors:
    """Map the factors of the gradient of a view to those of the parameter. NotSeparableError if it has none.

    Through a view that is linear in one parameter, a gradient G = Σₜ aₜ bₜᵀ stays a sum of products with other factors.
    A scale of rows or columns, a selection of them, a slice, a concatenation or a product with another matrix (LoRA)
    acts on only one of the two factors. So no per-example gradient is built for them. A mask, or the derivative of an
    elementwise function, multiplies G itself.
    """
    for step in reversed(steps):
        if step.is_identity:
            continue
        of_step = primitives.of(step.eqn).pull
        if of_step is None:
            raise NotSeparableError
        factors = of_step(step, factors, static)
    return factors
