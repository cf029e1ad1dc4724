"""Coherence from the mean gradients of disjoint batches, for losses of a whole batch."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._loss import checked_loss, require_dependence_on
from cg_jax._types import PyTree
from cg_jax.estimators.base import Estimator, OfRows, Problem, all_finite, of_few, where_squares_fit
from cg_jax.metrics import Coherence
from cg_jax.moments import GradMoments


class BatchSums(NamedTuple):
    """The sums of one batch of k examples."""

    count: jax.Array  # k, or 0 for no batch
    sum_losses: jax.Array  # k times the mean loss
    sum_grads: PyTree  # k times the mean gradient
    sq_means: PyTree  # ‖mean gradient‖² of each tensor


class BatchState(NamedTuple):
    """Sums over batches. All fields are scalars except sum_grads, sq_means and previous."""

    count: jax.Array
    number: jax.Array  # of batches
    sum_losses: jax.Array
    sum_grads: PyTree
    sq_means: PyTree  # Σ_b ‖mean gradient of batch b‖² of each tensor
    # Over pairs of batches, each second one with the one before it:
    sum_apart: jax.Array  # Σ of half the squared distance of their mean gradients
    sum_sq_apart: jax.Array  # Σ of its square
    previous: PyTree  # the mean gradient of the last batch, like the parameters


@dataclasses.dataclass(frozen=True)
class Batch(Estimator):
    """α = c α_W / (1 − α_W (1 − c)), c = (m − k)/(k (m − 1)), α_W that of mean gradients of disjoint batches of k.

    loss_fn(params, batch) is the mean loss of a batch. It may normalise over the batch (BatchNorm in training). Batches
    must be random: shuffle data that is sorted by class. Batches that are not whole are skipped and counted in
    num_skipped; m counts the examples used. Every batch ends with an all-reduce. α is NaN for a single batch.
    alpha_stderr follows from the distances between pairs of batches. It is NaN below 4 batches, and too large if norms
    differ much between examples.
    """

    by_example: ClassVar[bool] = False
    like_params: ClassVar[tuple[str, ...]] = ("sum_grads", "previous")

    def of_batch(self, problem: Problem, rows: PyTree, ids: jax.Array) -> tuple[BatchSums, OfRows]:
        """k times the mean gradient of the batch, and its squared norm."""
        kept, rest = trees.partition(problem.params)
        kept = jax.tree.map(jnp.asarray, kept)
        mean_loss = checked_loss(problem.loss_fn, rest, "the mean loss of a batch", problem.has_aux)
        require_dependence_on(mean_loss, kept, rows)
        loss, grads = jax.value_and_grad(mean_loss)(kept, rows)
        grads = trees.accumulate(grads)
        sq_means, k = trees.sq_norms(grads), ids.shape[0]
        loss = loss.astype(trees.accumulator_dtype(loss.dtype))
        is_bad = jnp.broadcast_to(~all_finite(loss, trees.total(sq_means)), ids.shape)
        sums = BatchSums(jnp.int32(k), k * loss, jax.tree.map(lambda g: k * g, grads), sq_means)
        return sums, OfRows(is_bad, jnp.zeros(ids.shape, loss.dtype))

    def init(self, sums: BatchSums) -> BatchState:
        """The shapes of sums over no batch."""
        loss, count = sums.sum_losses, sums.count
        return BatchState(count, count, loss, sums.sum_grads, sums.sq_means, loss, loss, sums.sum_grads)

    def update(self, state: BatchState, sums: BatchSums) -> BatchState:
        """The state with one more batch.

        It sums half the squared distance of every second batch to the one before it. The mean of that is the variance
        of a mean gradient over the batches.
        """
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1).astype(g.dtype), sums.sum_grads)
        apart = trees.total(trees.sq_norms(jax.tree.map(jnp.subtract, grads, state.previous))) / 2
        is_added = sums.count > 0
        is_second = is_added & (state.number % 2 == 1)
        totals = (state.sum_losses, state.sum_grads, state.sq_means)
        sum_losses, sum_grads, sq_means = trees.add(totals, (sums.sum_losses, sums.sum_grads, sums.sq_means))
        return BatchState(
            count=state.count + sums.count,
            number=state.number + is_added.astype(jnp.int32),
            sum_losses=sum_losses,
            sum_grads=sum_grads,
            sq_means=sq_means,
            sum_apart=state.sum_apart + jnp.where(is_second, apart, 0),
            sum_sq_apart=state.sum_sq_apart + jnp.where(is_second, apart**2, 0),
            previous=jax.tree.map(lambda new, old: jnp.where(is_added, new, old), grads, state.previous),
        )

    def moments(self, state: BatchState) -> GradMoments:
        """Moments whose Q gives the α of single examples, implied by mean gradients of disjoint batches of k of m.

        With V = mean ‖G‖² − ‖ḡ‖² over the N = m/k batches and c = (m − k)/(k (m − 1)), the variance over single
        examples is V/c: α = ‖ḡ‖² / (‖ḡ‖² + V/c).
        """
        m, number, c = _sizes(state)

        def of_tensor(total: jax.Array, squares: jax.Array) -> jax.Array:
            square = trees.sq_norms(total / m.astype(total.dtype))  # ‖S‖² may leave the range; this does not
            return m * (square + (squares / number - square) / c.astype(square.dtype))

        sum_sq_norms = jax.tree.map(of_tensor, state.sum_grads, state.sq_means)
        return GradMoments(state.count, state.sum_losses, state.sum_grads, sum_sq_norms)

    def finalize(self, state: BatchState, num_skipped: Any) -> Coherence:
        """V consists of N − 1 squared distances, each with the variance of half the squared distance of a pair."""
        measured = super().finalize(state, num_skipped)
        _, number, c = _sizes(state)
        pairs = (state.number // 2).astype(state.sum_apart.dtype)
        mean = state.sum_apart / pairs
        variance = jnp.maximum(state.sum_sq_apart / pairs - mean**2, 0) * pairs / (pairs - 1)
        variance = jnp.where(pairs > 1, variance, jnp.nan)
        error = jnp.sqrt(variance / (number - 1)) * (number - 1) / number
        error = of_few(where_squares_fit(mean, error), state.number // 2 - 1)
        stderr = measured.alpha**2 * error / (c * measured.mean_grad_norm**2)
        return dataclasses.replace(measured, alpha_stderr=stderr)


def _sizes(state: BatchState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m, N, c)."""
    m, number = (each.astype(state.sum_apart.dtype) for each in (state.count, state.number))
    k = m / number
    return m, number, jnp.where(number > 1, (m - k) / (k * (m - 1)), jnp.nan)
