"""Parameters that meet the example through one number: a penalty in the loss, or a norm as a divisor.

Such a use adds a multiple of one vector, the same for all examples, to the gradient of example i,

    gᵢ = hᵢ + Σₖ cᵢₖ vₖ,    vₖ = ∇ of the number k by the parameter, cᵢₖ its cotangent,

with hᵢ from all other uses. So ‖gᵢ‖² = ‖hᵢ‖² + 2 Σₖ cᵢₖ ⟨hᵢ, vₖ⟩ + ‖Σₖ cᵢₖ vₖ‖². The inner product does not need hᵢ to
be built. Near an optimum hᵢ and cᵢₖ vₖ may cancel. Then only rounding remains, which is relative to each of them. If
the terms of any example cancel, the gradients are built instead.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax.ghost import instances
from cg_jax.ghost.passes import ByParameter, Pass, Tensors
from cg_jax.ghost.plan import RulePlan
from cg_jax.ghost.tensors import ByGradients

# ‖gᵢ‖² over ‖hᵢ‖² + ‖Σ cᵢₖ vₖ‖², below which too few digits are left.
_CANCELS = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class ByNumbers:
    """A tensor that meets the example through numbers, and perhaps through `others`, its other uses."""

    plan: RulePlan
    others: Tensors | None

    def sq_norms(self, of: Pass) -> ByParameter:
        """By the formula, or from built gradients if its terms cancel for any example."""
        parameter, numbers = self.plan.parameter, self._numbers(of)
        own = trees.total([c * d * jnp.vdot(v, w) for c, v in numbers for d, w in numbers])
        if self.others is None:
            return {parameter: own}
        sq_norms = self.others.sq_norms(of)[parameter]
        apart = sq_norms + trees.total([jnp.square(c) * jnp.vdot(v, v) for c, v in numbers])
        inner = [c * trees.total(self.others.along(of, {parameter: v})) for c, v in numbers]
        cheap = sq_norms + own + 2 * sum(inner)
        return {parameter: jax.lax.cond((cheap < _CANCELS * apart).any(), lambda: self._built(of), lambda: cheap)}

    def sums(self, of: Pass) -> ByParameter:
        """Σᵢ hᵢ + Σₖ (Σᵢ cᵢₖ) vₖ."""
        total = trees.total([c.sum() * v for c, v in self._numbers(of)])
        if self.others is None:
            return {self.plan.parameter: total}
        return {self.plan.parameter: self.others.sums(of)[self.plan.parameter] + total}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:
        """Σᵢ wᵢ hᵢ + Σₖ (Σᵢ wᵢ cᵢₖ) vₖ."""
        own = weights[self.plan.parameter]
        total = trees.total([(c * own.astype(c.dtype)).sum() * v for c, v in self._numbers(of)])
        if self.others is None:
            return {self.plan.parameter: total}
        return {self.plan.parameter: self.others.weighted_sums(of, weights)[self.plan.parameter] + total}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:
        """⟨hᵢ, u⟩ + Σₖ cᵢₖ ⟨vₖ, u⟩."""
        own = [c * jnp.vdot(v, direction[self.plan.parameter]) for c, v in self._numbers(of)]
        return own if self.others is None else [*own, *self.others.along(of, direction)]

    def _built(self, of: Pass) -> jax.Array:
        """The squared norms from built gradients. This runs in a branch, so nothing is shared."""
        assert self.plan.exact is not None
        return ByGradients(self.plan.exact).norms_and_sums(of)[0][0]

    def _numbers(self, of: Pass) -> list[tuple[jax.Array, jax.Array]]:
        """(cᵢₖ [B], vₖ) of every number, in the accumulator dtype."""
        return of.once(self, lambda: _numbers(of, self.plan))


def _numbers(of: Pass, tensor: RulePlan) -> list[tuple[jax.Array, jax.Array]]:
    views = list(dict.fromkeys(use.site.eqn.invars[position] for use, position in tensor.numbers))
    cotangents: dict[Any, Any] = dict.fromkeys(views, 0)
    for use, position in tensor.numbers:

        def one(trace: Any, use: Any = use, position: int = position) -> jax.Array:
            ((_, part),) = instances.of_use(use, (position,), of.env, trace)
            return part.reshape(())

        cotangents[use.site.eqn.invars[position]] += jax.vmap(one)(of.traces[use.key])
    dtype = of.dtype(tensor.parameter)
    outs, pull = instances.view_pullback(of, (tensor.parameter,), views)
    numbers = []
    for k, view in enumerate(views):
        (v,) = pull([jnp.ones_like(out) if j == k else jnp.zeros_like(out) for j, out in enumerate(outs)])
        numbers.append((cotangents[view].astype(dtype), v.astype(dtype)))
    return numbers
