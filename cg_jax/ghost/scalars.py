"""Parameters that meet the example through one number: a penalty in the loss, a norm that something is divided by.

Such a use adds to the gradient of example i a multiple of one vector that is the same for all examples,

    gᵢ = hᵢ + Σₖ cᵢₖ vₖ,    vₖ = ∇ of the number k by the parameter, cᵢₖ its cotangent,

with hᵢ from all other uses. So ‖gᵢ‖² = ‖hᵢ‖² + 2 Σₖ cᵢₖ ⟨hᵢ, vₖ⟩ + ‖Σₖ cᵢₖ vₖ‖², and hᵢ need not be built for the inner
product. Near an optimum hᵢ and cᵢₖ vₖ may cancel, and rounding, which is relative to each of them, is all that is left.
Where any example's terms cancel, the gradients are built instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax.ghost import instances
from cg_jax.ghost.backward import Traces
from cg_jax.ghost.capture import Program
from cg_jax.ghost.plan import RulePlan
from cg_jax.ghost.products import Yield

# ‖gᵢ‖² over ‖hᵢ‖² + ‖Σ cᵢₖ vₖ‖², below which too few digits are left.
_CANCELS = 0.05


def add(
    program: Program,
    env: dict[Any, Any],
    tensor: RulePlan,
    traces: Traces,
    others: Yield | None,
    inner: Callable[[jax.Array], jax.Array],
    exact: Callable[[], jax.Array],
) -> Yield:
    """The squared norms and sum of a tensor, those of its numbers added to those of its other uses.

    `inner` gives ⟨hᵢ, v⟩ [B] of a direction v, `exact` the squared norms from gradients that are built.
    """
    along = _along(program, env, tensor, traces)
    own = trees.total([c * d * jnp.vdot(v, w) for c, v in along for d, w in along])
    total = trees.total([c.sum() * v for c, v in along])
    if others is None:
        return own, total
    sq_norms, sum_of_others = others
    apart = sq_norms + trees.total([jnp.square(c) * jnp.vdot(v, v) for c, v in along])
    cheap = sq_norms + own + 2 * sum(c * inner(v) for c, v in along)
    return jax.lax.cond((cheap < _CANCELS * apart).any(), exact, lambda: cheap), sum_of_others + total


def _along(
    program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces
) -> list[tuple[jax.Array, jax.Array]]:
    """(cᵢₖ [B], vₖ) of every number, in the accumulator dtype."""
    views = list(dict.fromkeys(use.site.eqn.invars[position] for use, position in tensor.numbers))
    cotangents: dict[Any, Any] = dict.fromkeys(views, 0)
    for use, position in tensor.numbers:

        def one(trace: Any, use: Any = use, position: int = position) -> jax.Array:
            ((_, part),) = instances.of_use(use, (position,), env, trace)
            return part.reshape(())

        cotangents[use.site.eqn.invars[position]] += jax.vmap(one)(traces[use.key])
    dtype = trees.accumulator_dtype(program.parameters[tensor.parameter].aval.dtype)
    outs, pull = instances.view_pullback(program, env, (tensor.parameter,), views)
    found = []
    for k, view in enumerate(views):
        (v,) = pull([jnp.ones_like(out) if j == k else jnp.zeros_like(out) for j, out in enumerate(outs)])
        found.append((cotangents[view].astype(dtype), v.astype(dtype)))
    return found
