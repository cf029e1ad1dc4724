"""Parameters that meet the example through one number: a penalty in the loss, a norm that something is divided by.

Such a use adds to the gradient of example i a multiple of one vector that is the same for all examples,

    gᵢ = hᵢ + Σₖ cᵢₖ vₖ,    vₖ = ∇ of the number k by the parameters, cᵢₖ its cotangent,

with hᵢ from all other uses. So ‖gᵢ‖² = ‖hᵢ‖² + 2 Σₖ cᵢₖ ⟨hᵢ, vₖ⟩ + ‖Σₖ cᵢₖ vₖ‖², and hᵢ need not be built for the inner
product: ⟨hᵢ, vₖ⟩ is the derivative of the loss along vₖ through those uses, one forward step of theirs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax.ghost import instances
from cg_jax.ghost.backward import Traces
from cg_jax.ghost.capture import Program, Use
from cg_jax.ghost.plan import Plan, Yield


def add(program: Program, env: dict[Any, Any], todo: Plan, traces: Traces, made: dict[int, Yield]) -> dict[int, Yield]:
    """The squared norms and sums of the tensors concerned, those of the scalar uses added."""
    if not todo.scalars:
        return {}
    views = list(dict.fromkeys(use.site.eqn.invars[position] for use, position in todo.scalars))
    cotangents = {view: jnp.zeros(()) for view in views}
    for use, position in todo.scalars:
        view = use.site.eqn.invars[position]
        cotangents[view] = cotangents[view] + _cotangents(use, position, env, traces)
    parameters = sorted(set().union(*(program.reach[view] for view in views)))
    directions = _directions(program, env, views, parameters)
    found = {}
    for parameter in parameters:
        sq_norms, total = made[parameter]
        along = [(cotangents[view].astype(sq_norms.dtype), directions[view][parameter]) for view in views]
        for k, (c, v) in enumerate(along):
            inner = _inner(program, env, todo.others[parameter], parameter, v, traces)
            total = total + c.sum() * v
            sq_norms = sq_norms + 2 * c * inner
            for d, w in along[: k + 1]:
                twice = 1 if w is v else 2
                sq_norms = sq_norms + twice * c * d * jnp.vdot(v, w)
        found[parameter] = jnp.maximum(sq_norms, 0), total
    return found


def _cotangents(use: Use, position: int, env: dict[Any, Any], traces: Traces) -> jax.Array:
    """The cotangents [B] of a number, by its use's own vjp."""

    def one(trace: Any) -> jax.Array:
        ((_, part),) = instances.of_use(use, (position,), env, trace)
        return part.reshape(())

    return jax.vmap(one)(traces[use.key])


def _directions(
    program: Program, env: dict[Any, Any], views: list[Any], parameters: list[int]
) -> dict[Any, dict[int, jax.Array]]:
    """The gradient of every number by every parameter, in the accumulator dtype."""
    variables = [program.parameters[i] for i in parameters]
    numbers = instances.view_values(program, env, variables, views)
    outs, pull = jax.vjp(numbers, [env[variable] for variable in variables])
    found = {}
    for k, view in enumerate(views):
        (grads,) = pull([jnp.ones_like(out) if j == k else jnp.zeros_like(out) for j, out in enumerate(outs)])
        found[view] = dict(zip(parameters, trees.accumulate(grads), strict=True))
    return found


def _inner(
    program: Program,
    env: dict[Any, Any],
    uses: tuple[tuple[Use, int], ...],
    parameter: int,
    direction: jax.Array,
    traces: Traces,
) -> jax.Array:
    """⟨hᵢ, v⟩ [B] over a parameter's other uses."""
    if not uses:
        return jnp.zeros((), direction.dtype)
    variable, views = program.parameters[parameter], [use.site.eqn.invars[position] for use, position in uses]
    seen = instances.view_values(program, env, [variable], views)
    _, tangents = jax.jvp(seen, ([env[variable]],), ([direction.astype(env[variable].dtype)],))
    total = jnp.zeros((), direction.dtype)
    for (use, position), tangent in zip(uses, tangents, strict=True):
        total = total + _along(use, position, env, tangent, traces).astype(direction.dtype)
    return total


def _along(use: Use, position: int, env: dict[Any, Any], tangent: jax.Array, traces: Traces) -> jax.Array:
    """Σ ⟨cotangent, derivative of the outputs⟩ [B] of one use, along a tangent of its view."""

    def one(trace: Any) -> jax.Array:
        seen, cotangents = trace
        outputs, views = instances.outputs_by_views(use.site, (position,), env, seen)
        _, moved = jax.jvp(lambda views: outputs(views, jnp.zeros(())), (views,), ([tangent],))
        parts = [
            jnp.vdot(c.astype(trees.accumulator_dtype(c.dtype)), m.astype(trees.accumulator_dtype(m.dtype)))
            for c, m in zip(cotangents, moved, strict=True)
        ]
        return trees.total(parts)

    return jax.vmap(one)(traces[use.key])
