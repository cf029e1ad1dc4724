"""Views of parameters that are rearrangements: norms pass through, and sums are carried back exactly."""

from collections.abc import Sequence
from typing import Any

import jax

from cg_jax import _compat
from cg_jax.ghost.capture import Program

# Rearrangements: every entry of the operand stands exactly once in the result.
_ISOMETRIES = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "convert_element_type"}
)


def isometric_view(program: Program, view: Any) -> list[Any] | None:
    """The equations that rearrange one parameter into `view`, entry by entry, in order; None if there is more to it."""
    if view in program.parameters:
        return []
    for eqn in program.static:
        if view in eqn.outvars:
            rearranges = eqn.primitive.name in _ISOMETRIES or _keeps_size(eqn)
            source = eqn.invars[0]
            before = isometric_view(program, source) if rearranges and source in program.reach else None
            return None if before is None else [*before, eqn]
    return None


def _keeps_size(eqn: Any) -> bool:
    """Whether a broadcast only adds axes of length one."""
    return eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.size == eqn.outvars[0].aval.size


def undo_view(eqns: Sequence[Any], parameter: Any, view: Any, cotangent: jax.Array) -> jax.Array:
    """A gradient with respect to an isometric view, as one with respect to the parameter, in the cotangent's dtype."""

    def rearrange(value: jax.Array) -> jax.Array:
        env = {parameter: value}
        for eqn in eqns:
            operand = env[eqn.invars[0]]
            # A cast would round what was accumulated in a wider dtype.
            casts = eqn.primitive.name == "convert_element_type"
            env[eqn.outvars[0]] = operand if casts else _compat.bind(eqn, [operand, *eqn.invars[1:]])[0]
        return env[view]

    like = jax.eval_shape(lambda value: value.astype(cotangent.dtype), parameter.aval)
    (out,) = jax.linear_transpose(rearrange, like)(cotangent)
    return out
