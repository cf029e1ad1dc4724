"""Coherence by random signs, which needs only ordinary backward passes of any loss."""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from cg_jax import _validate, trees
from cg_jax._loss import checked_loss, require_dependence
from cg_jax._types import PyTree
from cg_jax.estimators.base import Estimator, OfRows, Problem, all_finite, of_few, where_squares_fit
from cg_jax.gradients import fill_masked
from cg_jax.metrics import Coherence
from cg_jax.moments import GradMoments


class SignsState(NamedTuple):
    """Sums over batches and devices. All fields are scalars except sum_grads and sq_signed."""

    count: jax.Array
    sum_losses: jax.Array
    sum_grads: PyTree  # Σ gᵢ, like the parameters
    sq_signed: PyTree  # Σ_b ‖Σᵢ εᵢ gᵢ‖² of each tensor, the mean of two draws
    number: jax.Array  # of batches
    sum_both: jax.Array  # Σ_b of the two draws' squares, all tensors together
    sum_sq_half_differences: jax.Array  # Σ_b of ((the one draw's square − the other's)/2)²


@dataclasses.dataclass(frozen=True)
class Signs(Estimator):
    """Q ≈ Σ_b ‖Σᵢ εᵢ gᵢ‖² with random signs εᵢ = ±1, averaged over two draws: three backward passes per batch.

    E‖Σ εᵢ gᵢ‖² = Σ ‖gᵢ‖², with one term for each batch on each device. Use it for losses that do not suit the engine.
    Sums over a batch have the dtype of the model, so use `Exact` for float16 and narrower dtypes. alpha_stderr is the
    error due to the random signs, around the exact α of the same examples.

    Args:
        seed: Seed of the signs, ≥ 0. A new seed does not recompile.

    Raises:
        ValueError: seed < 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _validate.at_least("seed", self.seed, 0)

    def split(self) -> tuple[Self, PyTree]:
        """The seed is an array, so that a new one does not recompile."""
        return dataclasses.replace(self, seed=0), jnp.asarray(int(self.seed) % 2**32, jnp.uint32)

    def of_batch(self, problem: Problem, rows: PyTree, ids: jax.Array) -> tuple[SignsState, OfRows]:
        """S, and ‖Σ εᵢ gᵢ‖² of two draws. The two draws of the same examples differ only by the signs."""
        mask = ids >= 0
        rows = fill_masked(rows, mask)
        require_dependence(problem.loss_fn, problem.params, rows, problem.has_aux)
        kept, rest = trees.partition(problem.params)
        kept, loss = jax.tree.map(jnp.asarray, kept), checked_loss(problem.loss_fn, rest, has_aux=problem.has_aux)
        losses, pull = jax.vjp(lambda p: jax.vmap(loss, (None, 0))(p, rows), kept)
        weights = jnp.concatenate([jnp.ones_like(losses)[None], _draws(problem, losses, ids)])
        totals = [trees.accumulate(pull(jnp.where(mask, w, 0))[0]) for w in weights]
        total, *signed = totals
        squares = [trees.sq_norms(each) for each in signed]
        one, other = map(trees.total, squares)
        losses = jnp.where(mask, losses, 0).astype(trees.accumulator_dtype(losses.dtype))
        state = SignsState(
            count=mask.sum().astype(jnp.int32),
            sum_losses=losses.sum(),
            sum_grads=total,
            sq_signed=jax.tree.map(lambda q, r: (q + r) / 2, *squares),
            number=mask.any().astype(jnp.int32),
            sum_both=one + other,
            sum_sq_half_differences=((one - other) / 2) ** 2,
        )
        is_bad = ~all_finite(losses, one, other, total)
        return state, OfRows(jnp.broadcast_to(is_bad, ids.shape), jnp.zeros(ids.shape, one.dtype))

    def moments(self, state: SignsState) -> GradMoments:
        """The moments with the sum of the squares as the estimate of Q."""
        return GradMoments(state.count, state.sum_losses, state.sum_grads, sum_sq_norms=state.sq_signed)

    def finalize(self, state: SignsState, num_skipped: Any) -> Coherence:
        """α from the estimate of Q. Its error follows from the difference between the draws."""
        measured = super().finalize(state, num_skipped)
        mean = state.sum_both / state.number.astype(state.sum_both.dtype)
        error = where_squares_fit(mean, jnp.sqrt(state.sum_sq_half_differences)) / (state.sum_both / 2)
        return dataclasses.replace(measured, alpha_stderr=measured.alpha * of_few(error, state.number))


def _draws(problem: Problem, losses: jax.Array, ids: jax.Array) -> jax.Array:
    """Two signs for every row, [2, B]. They do not depend on its batch. Every device draws its own."""
    key = jax.random.key(problem.arrays)
    if problem.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(problem.axis))
    return jax.vmap(lambda i: jax.random.rademacher(jax.random.fold_in(key, i), (2,), losses.dtype), 0, 1)(ids)
