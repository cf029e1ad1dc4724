"""What a measurement adds up of each batch, and what follows from the sums: one way for each estimator of coherence.

"exact" takes S = Σ gᵢ and Q = Σ ‖gᵢ‖² as they are. "signs" and "batch" estimate Q, from squared norms of sums over
batches, and hand on moments with the estimate in its place, so that all ratios follow from moments by `coherence`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._loss import LossFn, checked_loss, require_dependence, require_dependence_on, with_state
from cg_jax.metrics import Coherence, coherence
from cg_jax.moments import GradMoments
from cg_jax.per_example import aligned
from cg_jax.statistics import batch_statistics, fill_masked, to_moments

PyTree = Any

ESTIMATORS = ("exact", "signs", "batch")


class Spread(NamedTuple):
    """Sums of numbers whose variance says how far an estimate may be off; all scalars."""

    number: jax.Array
    total: jax.Array
    squares: jax.Array

    def mean(self) -> jax.Array:
        """The mean; NaN of no numbers."""
        return self.total / self.number.astype(self.total.dtype)

    def variance(self) -> jax.Array:
        """The unbiased variance; NaN below two numbers."""
        number = self.number.astype(self.total.dtype)
        variance = jnp.maximum(self.squares / number - self.mean() ** 2, 0) * number / (number - 1)
        return jnp.where(self.number > 1, variance, jnp.nan)


class Sums(NamedTuple):
    """What a measurement adds up."""

    moments: GradMoments
    spread: Spread
    previous: PyTree  # "batch": the mean gradient of the batch before; else None


class OfRows(NamedTuple):
    """What a batch says of each of its rows, [B]."""

    bad: jax.Array  # its id where its loss or gradient is not finite, else −1
    again: jax.Array  # the ids that are to be added once more without the bad ones, else −1
    sq_norms: jax.Array  # ‖gᵢ‖², −1 where bad; "exact" only


class Inputs(NamedTuple):
    """What every batch is measured with."""

    params: PyTree
    state: PyTree  # what loss_fn takes beside them, or None
    seed: jax.Array  # of the random signs


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Static configuration of an estimator."""

    name: str
    method: str
    batch_size: int
    guard: bool  # set a batch aside that holds what is not finite, until it is resolved
    axis: str | None  # of the shard_map that it runs in
    has_aux: bool  # of loss_fn; what it returns beside the loss is dropped

    @property
    def by_example(self) -> bool:
        """Whether loss_fn is the loss of one example."""
        return self.name != "batch"

    def shapes(self, loss_fn: LossFn, inputs: Inputs, rows: PyTree) -> Sums:
        """The shapes of the sums of one batch."""
        ids = jax.ShapeDtypeStruct(jax.tree.leaves(rows)[0].shape[:1], jnp.int32)
        of_batch = functools.partial(dataclasses.replace(self, axis=None).of_batch, loss_fn)
        sums: Sums = jax.eval_shape(of_batch, inputs, (rows, ids))[0]
        return sums._replace(previous=sums.moments.sum_grads) if not self.by_example else sums

    def of_batch(self, loss_fn: LossFn, inputs: Inputs, batch: tuple[PyTree, jax.Array]) -> tuple[Sums, OfRows]:
        """(the sums of a batch, what it says of its rows), given (rows, their ids, −1 where masked)."""
        rows, ids = batch
        sums, bad, sq_norms = _SUMS[self.name](self, with_state(loss_fn, inputs.state), inputs, rows, ids)
        bad &= ids >= 0
        spoilt = bad.any() & self.guard
        sums = jax.tree.map(lambda leaf: jnp.where(spoilt, jnp.zeros_like(leaf), leaf), sums)
        again = jnp.where(spoilt & ~bad, ids, -1)
        return sums, OfRows(jnp.where(bad, ids, -1), again, jnp.where(bad, -1, sq_norms))

    def finish(self, sums: Sums, num_skipped: Any) -> Coherence:
        """The coherence that follows from the sums of all batches."""
        moments, stderr = _FINISH[self.name](self, sums)
        found = coherence(moments, num_skipped=num_skipped)
        return found if stderr is None else dataclasses.replace(found, alpha_stderr=stderr(found))


def _no_spread(like: jax.Array) -> Spread:
    return Spread(jnp.zeros((), jnp.int32), jnp.zeros_like(like), jnp.zeros_like(like))


def _finite(*values: PyTree) -> jax.Array:
    """Whether all values are finite; their sum may not be."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values)]).all()


def _exact_sums(
    how: Estimator, loss_fn: LossFn, inputs: Inputs, rows: PyTree, ids: jax.Array
) -> tuple[Sums, jax.Array, jax.Array]:
    """By the engine, or vmap: S and Q, and the squared norm of every row."""
    mask = ids >= 0
    found = batch_statistics(loss_fn, inputs.params, rows, mask, how.method, has_aux=how.has_aux)
    sq_norms = trees.total(found.sq_norms)
    moments = to_moments(found, mask.sum())
    finite = jnp.isfinite(sq_norms) & jnp.isfinite(found.losses)
    return Sums(moments, _no_spread(sq_norms[0]), None), ~finite, sq_norms


def _exact(how: Estimator, sums: Sums) -> tuple[GradMoments, None]:
    return sums.moments, None


def _signs_sums(
    how: Estimator, loss_fn: LossFn, inputs: Inputs, rows: PyTree, ids: jax.Array
) -> tuple[Sums, jax.Array, jax.Array]:
    """S, and the mean of ‖Σ εᵢ gᵢ‖² over two draws of signs, by one forward and three backward passes.

    Of two draws from the same examples the difference is by the signs alone.
    """
    mask = ids >= 0
    rows = fill_masked(rows, mask)
    require_dependence(loss_fn, inputs.params, rows, how.has_aux)
    kept, rest = trees.partition(inputs.params)
    kept, loss = jax.tree.map(jnp.asarray, kept), checked_loss(loss_fn, rest, has_aux=how.has_aux)
    losses, pull = jax.vjp(lambda p: jax.vmap(loss, (None, 0))(p, rows), kept)
    weights = jnp.concatenate([jnp.ones_like(losses)[None], _signs_of(how, inputs, losses, ids)])
    totals = [trees.accumulate(pull(jnp.where(mask, w, 0))[0]) for w in weights]
    # Where no row counts, what was done to the first may still be NaN.
    total, *signed = jax.tree.map(lambda leaf: jnp.where(mask.any(), leaf, 0), totals)
    squares = [trees.sq_norms(each) for each in signed]
    one, other = map(trees.total, squares)
    losses = jnp.where(mask, losses, 0).astype(trees.accumulator_dtype(losses.dtype))
    norms = jax.tree.map(lambda q, r: (q + r) / 2, *squares)
    moments = GradMoments(mask.sum().astype(jnp.int32), losses.sum(), total, norms)
    spread = Spread(mask.any().astype(jnp.int32), one + other, ((one - other) / 2) ** 2)
    bad = ~_finite(losses, one, other, total)
    return Sums(moments, spread, None), jnp.broadcast_to(bad, ids.shape), jnp.zeros(ids.shape, one.dtype)


def _signs_of(how: Estimator, inputs: Inputs, losses: jax.Array, ids: jax.Array) -> jax.Array:
    """Two signs of every row, [2, B], the same whatever batch it is in; of every device its own."""
    key = jax.random.key(inputs.seed)
    if how.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(how.axis))
    return jax.vmap(lambda i: jax.random.rademacher(jax.random.fold_in(key, i), (2,), losses.dtype), 0, 1)(ids)


def _signs(how: Estimator, sums: Sums) -> tuple[GradMoments, Any]:
    """The squares add up to an estimate of Q, off by what the draws differ by."""
    error = _where_squares_fit(sums.spread.mean(), jnp.sqrt(sums.spread.squares)) / (sums.spread.total / 2)
    error = _of_few(error, sums.spread.number)
    return sums.moments, lambda found: found.alpha * error


def _of_few(error: jax.Array, number: jax.Array) -> jax.Array:
    """A standard error that was estimated from `number` squares: their root is too small on average, for normal numbers
    by √(2/n) Γ((n + 1)/2) / Γ(n/2), which is 0.80 for one square and 0.92 for three.
    """
    n = number.astype(error.dtype)
    gammas = jax.scipy.special.gammaln((n + 1) / 2) - jax.scipy.special.gammaln(n / 2)
    return error / (jnp.sqrt(2 / n) * jnp.exp(gammas))


def _where_squares_fit(size: jax.Array, error: jax.Array) -> jax.Array:
    """`error`, NaN where squares of numbers of that size leave the range of the dtype."""
    limits = jnp.finfo(size.dtype)
    low, high = limits.tiny**0.5 * 100, limits.max**0.5 / 100
    return jnp.where((size > low) & (size < high), error, jnp.nan)


def _batch_sums(
    how: Estimator, loss_fn: LossFn, inputs: Inputs, rows: PyTree, ids: jax.Array
) -> tuple[Sums, jax.Array, jax.Array]:
    """k times the mean gradient of the batch, and its squared norm."""
    kept, rest = trees.partition(inputs.params)
    kept = jax.tree.map(jnp.asarray, kept)
    mean_loss = checked_loss(loss_fn, rest, "the mean loss of a batch", how.has_aux)
    require_dependence_on(mean_loss, kept, rows)
    loss, grads = jax.value_and_grad(mean_loss)(kept, rows)
    grads = trees.accumulate(grads)
    norms, k = trees.sq_norms(grads), ids.shape[0]
    loss = loss.astype(trees.accumulator_dtype(loss.dtype))
    moments = GradMoments(jnp.int32(k), k * loss, jax.tree.map(lambda g: k * g, grads), norms)
    bad = jnp.broadcast_to(~_finite(loss, trees.total(norms)), ids.shape)
    return Sums(moments, _no_spread(loss), None), bad, jnp.zeros(ids.shape, loss.dtype)


def add_batch(total: Sums, found: Sums, k: int) -> Sums:
    """The sums of "batch" with one more batch.

    Half the squared distance of every second batch to the one before it goes into the spread: its mean is the variance
    of a mean gradient over the batches.
    """
    grads = jax.tree.map(lambda g: g / k, found.moments.sum_grads)
    apart = trees.total(trees.sq_norms(jax.tree.map(jnp.subtract, grads, total.previous))) / 2
    added = found.moments.count > 0
    second = added & (total.moments.count // k % 2 == 1)
    pair = Spread(second.astype(jnp.int32), jnp.where(second, apart, 0), jnp.where(second, apart**2, 0))
    previous = jax.tree.map(lambda new, old: jnp.where(added, new, old), grads, total.previous)
    moments, spread = trees.add((total.moments, total.spread), (found.moments, pair))
    return Sums(moments, spread, previous)


def _batch(how: Estimator, sums: Sums) -> tuple[GradMoments, Any]:
    """Q such that α is the α of single examples that the mean gradients of disjoint batches of k of m imply.

    With V = mean ‖G‖² − ‖ḡ‖² over the N = m/k batches and c = (m − k)/(k (m − 1)), the variance over single examples is
    V/c: α = ‖ḡ‖² / (‖ḡ‖² + V/c).
    """
    m, k = sums.moments.count.astype(sums.spread.total.dtype), how.batch_size
    number = m / k
    c = jnp.where(number > 1, (m - k) / (k * (m - 1)), jnp.nan)

    def of_tensor(total: jax.Array, squares: jax.Array) -> jax.Array:
        square = trees.sq_norms(total / m.astype(total.dtype))  # the square of S may leave the range, this does not
        return m * (square + (squares / number - square) / c.astype(square.dtype))

    sum_sq_norms = jax.tree.map(of_tensor, sums.moments.sum_grads, sums.moments.sum_sq_norms)

    def stderr(found: Coherence) -> jax.Array:
        # V is N − 1 squared distances; each scatters as the half squared distances of pairs do.
        error = jnp.sqrt(sums.spread.variance() / (number - 1)) * (number - 1) / number
        error = _where_squares_fit(sums.spread.mean(), error)
        error = _of_few(error, sums.spread.number - 1)
        return found.alpha**2 * error / (c * found.mean_grad_norm**2)

    return sums.moments._replace(sum_sq_norms=sum_sq_norms), stderr


_SUMS = {"exact": _exact_sums, "signs": _signs_sums, "batch": _batch_sums}
_FINISH = {"exact": _exact, "signs": _signs, "batch": _batch}


def deviations(how: Estimator, loss_fn: LossFn, inputs: PyTree, batch: PyTree) -> tuple[jax.Array, None]:
    """(Σ ((2 aᵢ − α qᵢ − ‖ḡ‖²)/q̄)² over a batch, nothing of its rows): aᵢ = gᵢ · ḡ, qᵢ = ‖gᵢ‖², q̄ their mean.

    The infinitesimal jackknife: a number of these, over m, is what α moves by when example i weighs a little more.
    """
    (params, state, mean_grad, alpha, mean_sq_norm), (rows, ids, sq_norms) = inputs, batch
    mask = (ids >= 0) & (sq_norms >= 0)
    products, _ = aligned(with_state(loss_fn, state), params, fill_masked(rows, mask), mean_grad, how.has_aux)
    square = trees.total(trees.sq_norms(mean_grad))
    moved = jnp.where(mask, (2 * products.astype(sq_norms.dtype) - alpha * sq_norms - square) / mean_sq_norm, 0)
    return jnp.sum(moved**2), None
