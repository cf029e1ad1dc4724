"""Views of parameters: the equations between a parameter and what an example meets, and the way back for a gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost.capture import Program
from cg_jax.ghost.evaluation import is_var

# Results that are an operand as it is, or rounded.
_IDENTITIES = frozenset(
    {"convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "pcast", "pvary", "sharding_constraint"}
)
# Rearrangements: every entry of the operand stands exactly once in the result.
ISOMETRIES = _IDENTITIES | {"reshape", "transpose", "squeeze", "expand_dims", "rev"}
Read = Callable[[Any], jax.Array]  # the value of a static operand


def is_complex(value: Any) -> bool:
    """Whether an array, or an aval, is of complex numbers."""
    return jnp.issubdtype(value.dtype, jnp.complexfloating)


class Step(NamedTuple):
    """One equation on the way from a parameter to a view."""

    eqn: Any
    position: int  # of the operand on the way
    output: int  # of the result on the way

    @property
    def is_identity(self) -> bool:
        """Whether the result is the operand; a cast between real and complex numbers is none."""
        name, operand, result = self.eqn.primitive.name, self.operand.aval, self.result.aval
        if name == "optimization_barrier":
            return self.position == self.output
        return name in _IDENTITIES and is_complex(operand) == is_complex(result)

    @property
    def operand(self) -> Any:
        """The variable nearer to the parameter."""
        return self.eqn.invars[self.position]

    @property
    def result(self) -> Any:
        """The variable nearer to the view."""
        return self.eqn.outvars[self.output]


def path_to(program: Program, parameter: int, view: Any) -> list[Step] | None:
    """The steps from a parameter to a view, in order; None where there is more than one way."""
    steps: list[Step] = []
    var = view
    while var != program.parameters[parameter]:
        eqn = program.producers.get(var)
        if eqn is None:
            return None
        positions = [
            i for i, atom in enumerate(eqn.invars) if is_var(atom) and parameter in program.reach.get(atom, ())
        ]
        if eqn.primitive.name == "optimization_barrier":  # of many values at once, each its own
            positions = [eqn.outvars.index(var)]
        if len(positions) != 1:
            return None
        steps.append(Step(eqn, positions[0], eqn.outvars.index(var)))
        var = eqn.invars[positions[0]]
    return steps[::-1]


def is_isometric(steps: Sequence[Step]) -> bool:
    """Whether the steps only rearrange a parameter, entry by entry."""
    return all(
        step.is_identity
        or (step.eqn.primitive.name in ISOMETRIES - _IDENTITIES)
        or (step.eqn.primitive.name == "broadcast_in_dim" and step.operand.aval.size == step.result.aval.size)
        for step in steps
    )


def undo(steps: Sequence[Step], like: Any, total: jax.Array, read: Read) -> jax.Array:
    """A gradient with respect to a view as one with respect to the parameter, in the dtype of the gradient.

    `like` is the parameter's value; casts on the way would round what was accumulated in a wider dtype.
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
