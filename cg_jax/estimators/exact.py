"""The exact coherence, and the infinitesimal jackknife's standard error."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from cg_jax import _validate, trees
from cg_jax._types import PyTree
from cg_jax.estimators.base import Estimator, OfRows, Problem
from cg_jax.gradients import METHODS
from cg_jax.moments import GradMoments
from cg_jax.statistics import aligned, batch_statistics, to_moments


@dataclasses.dataclass(frozen=True)
class Exact(Estimator):
    """α = ‖S‖² / (m Q) from the exact S = Σ gᵢ and Q = Σ ‖gᵢ‖². The state is a `GradMoments`.

    Args:
        method: "ghost", or "vmap" for the plain reference.
        confidence: Compute alpha_stderr, the infinitesimal jackknife's standard error of α over new samples of m
            examples: √(Σ uᵢ²)/m with uᵢ = (2 (gᵢ·ḡ) − α ‖gᵢ‖² − ‖ḡ‖²)/q̄, where q̄ = Q/m. This takes one more pass over
            the data.

    Raises:
        ValueError: Unknown method.

    References:
        Efron, Nonparametric Estimates of Standard Error, Biometrika 68, 1981.
    """

    method: str = "ghost"
    confidence: bool = False

    flags_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _validate.one_of("method", self.method, METHODS)

    def split(self) -> tuple[Self, PyTree]:
        """The programs do not depend on confidence."""
        return dataclasses.replace(self, confidence=False), None

    @property
    def revisits(self) -> bool:
        """Whether the data is read a second time, for the jackknife."""
        return self.confidence

    def of_batch(self, problem: Problem, rows: PyTree, ids: jax.Array) -> tuple[GradMoments, OfRows]:
        """The moments and the squared norm of every row, by the engine or by vmap."""
        mask = ids >= 0
        batch = batch_statistics(problem.loss_fn, problem.params, rows, mask, self.method, has_aux=problem.has_aux)
        sq_norms = trees.total(batch.sq_norms)
        is_finite = jnp.isfinite(sq_norms) & jnp.isfinite(batch.losses)
        return to_moments(batch, mask.sum()), OfRows(~is_finite, sq_norms)

    def moments(self, state: GradMoments) -> GradMoments:
        """The state itself."""
        return state

    def revisit(self, problem: Problem, measured: PyTree, rows: PyTree, ids: jax.Array, values: jax.Array) -> jax.Array:
        """Σ uᵢ² over a batch. uᵢ/m is the derivative of α with respect to the weight of example i."""
        mean_grad, alpha, mean_sq_norm = measured
        mask = (ids >= 0) & (values >= 0)
        products, _ = aligned(problem.loss_fn, problem.params, rows, mean_grad, mask, problem.has_aux)
        square = trees.total(trees.sq_norms(mean_grad))
        moved = jnp.where(mask, (2 * products.astype(values.dtype) - alpha * values - square) / mean_sq_norm, 0)
        return jnp.sum(moved**2)

    def conclude(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """√(Σ uᵢ²)/m, or NaN for one example."""
        return jnp.where(count > 1, jnp.sqrt(total) / count.astype(total.dtype), jnp.nan)
