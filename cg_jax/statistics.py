"""Sums and norms of the per-example gradients of one batch: dispatch between the engine and vmap(grad)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, explicit, ghost, trees
from cg_jax.moments import GradMoments
from cg_jax.per_example import LossFn, each_devices_own, losses_and_grads

PyTree = Any

METHODS = ("ghost", "vmap")


class BatchStatistics(NamedTuple):
    """What one batch yields; masked rows are zero throughout."""

    losses: jax.Array  # [B]
    sq_norms: PyTree  # ‖gᵢ‖² for each tensor, [B], accumulator dtype
    sum_grads: PyTree  # Σ gᵢ, like the parameters, accumulator dtype


def fill_masked(batch: PyTree, mask: jax.Array) -> PyTree:
    """Each masked row replaced by the first valid one.

    A zero or garbage row could turn its zero weight into 0·∞ = NaN inside the derivative of the loss.
    """
    rows = jnp.where(mask, jnp.arange(mask.size), jnp.argmax(mask))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def _zero_where(condition: jax.Array, tree: PyTree) -> PyTree:
    """Each leaf, or zeros where `condition` (a scalar, or [B] for leaves [B]) holds."""
    return jax.tree.map(lambda leaf: jnp.where(condition, jnp.zeros_like(leaf), leaf), tree)


def _vmap_statistics(loss_fn: LossFn, params: PyTree, batch: PyTree, weights: jax.Array | None) -> BatchStatistics:
    """By vmap(grad): the reference, which builds a B × parameters array."""
    losses, grads = losses_and_grads(loss_fn, params, batch)
    grads = trees.accumulate(grads)
    if weights is not None:
        grads = jax.vmap(lambda w, g: jax.tree.map(lambda leaf: leaf * w.astype(leaf.dtype), g))(weights, grads)
    return BatchStatistics(losses, trees.row_sq_norms(grads), trees.row_sums(grads))


def batch_statistics(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    method: str,
    max_bytes: int | None = None,
) -> BatchStatistics:
    """Losses, squared norms and the sum of the gradients of one batch; the one producer behind everything above."""
    weights = None
    if mask is not None:
        batch, weights = fill_masked(batch, mask), mask.astype(jnp.float32)
    params = each_devices_own(loss_fn, params, batch)
    if method == "ghost":
        losses, sq_norms, sum_grads = ghost.statistics(loss_fn, params, batch, weights, max_bytes)
    else:
        losses, sq_norms, sum_grads = _vmap_statistics(loss_fn, params, batch, weights)
    if mask is not None:
        losses, sq_norms = _zero_where(~mask, (losses, sq_norms))
        sum_grads = _zero_where(~mask.any(), sum_grads)
    return BatchStatistics(losses, sq_norms, sum_grads)


def to_moments(statistics: BatchStatistics, count: Any) -> GradMoments:
    """The sums over the batch, of which `count` rows were valid."""
    losses = statistics.losses.astype(trees.accumulator_dtype(statistics.losses.dtype))
    return GradMoments(
        count=jnp.asarray(count, jnp.int32),
        sum_losses=losses.sum(),
        sum_grads=statistics.sum_grads,
        sum_sq_norms=jax.tree.map(jnp.sum, statistics.sq_norms),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(
    loss_fn: LossFn, method: str, max_bytes: int | None, params: PyTree, batch: PyTree, mask: jax.Array | None
) -> GradMoments:
    statistics = batch_statistics(loss_fn, params, batch, mask, method, max_bytes)
    return to_moments(statistics, statistics.losses.size if mask is None else mask.sum())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sq_norms(loss_fn: LossFn, method: str, max_bytes: int | None, params: PyTree, batch: PyTree) -> PyTree:
    return batch_statistics(loss_fn, params, batch, None, method, max_bytes).sq_norms


def grad_moments(loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None) -> Callable[..., GradMoments]:
    """The function (params, batch, mask=None) → GradMoments: S = Σ gᵢ and Q = Σ ‖gᵢ‖² per tensor, Σ ℓᵢ, and the count.

    gᵢ = ∇ loss_fn(params, batch[i]). Method "ghost" takes one backward pass and builds no array of size B × parameters
    beyond max_bytes; "vmap" is the plain reference, vmap(grad), and does. Both are exact and agree to rounding.

    Inside `jax.shard_map` or `jax.pmap` a device's moments are those of its own examples: `jax.lax.psum(moments, axis)`
    is the moments of all, and `coherence` of that what you want. Under `jax.jit` with sharded arrays nothing is needed.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example. Compiled once for each function object:
            pass the same one again, for a fresh lambda compiles again.
        method: "ghost" or "vmap".
        max_bytes: Method "ghost" works a tensor off in chunks of examples, so that the per-example arrays that it needs
            take at most this many bytes at once (but for one example's own); 64 MiB by default, 256 MiB on an
            accelerator. `explain` says what they are.

    Returns:
        A jitted function of params (any pytree), batch (a pytree whose leaves share a leading axis B) and mask (boolean
        [B]). Rows where mask is False contribute nothing, whatever they hold. A gradient that is not finite makes the
        sums so: see `measure_coherence` for leaving such examples out. Sums are float32, or float64 where the
        parameters are; integer leaves of params are None.

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, a mask of other shape or
            dtype, or a loss that does not depend on params.
        TypeError: loss_fn is no function or does not return a real scalar, or a leaf of params is complex or no array.

    References:
        The sum of squares without the gradients: Goodfellow, Efficient Per-Example Gradient Computations, 2015,
        https://arxiv.org/abs/1510.01799.

    Examples:
        >>> import jax, cg_jax as cg
        >>> moments = cg.grad_moments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]))
        >>> int(moments.count), float(moments.sum_grads), float(moments.sum_sq_norms)
        (3, -12.0, 66.0)
    """
    _validate.function("loss_fn", loss_fn)
    _validate.one_of("method", method, METHODS, "call it as grad_moments(loss_fn)(params, batch)")
    _validate.max_bytes(max_bytes)

    def moments(params: PyTree, batch: PyTree, mask: Any = None) -> GradMoments:
        params, batch, size = _validate.arguments(params, batch)
        if mask is not None:
            mask = jnp.asarray(mask)
            _validate.mask_shape(mask, size)
        of_batch = functools.partial(_moments, loss_fn, method, max_bytes)
        return explicit.relaxed(of_batch, _moments_lie, params, batch, mask)

    return moments


def _moments_lie(params: PyTree, rows: Any) -> GradMoments:
    del rows
    whole: Any = PartitionSpec()
    return GradMoments(whole, whole, params, jax.tree.map(lambda _: whole, params))


def per_example_sq_norms(
    loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None
) -> Callable[[PyTree, PyTree], PyTree]:
    """The function (params, batch) → ‖gᵢ‖² of every example, tensor by tensor; nothing of size B × parameters is built.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example. Compiled once for each function object.
        method: "ghost", or "vmap" for the plain reference.
        max_bytes: As for `grad_moments`.

    Returns:
        A jitted function that returns a pytree like params of [B], float32 (float64 where the parameters are); None for
        integer leaves. The sum over the leaves is ‖gᵢ‖² of the whole gradient.

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, or a loss that does not
            depend on params.
        TypeError: loss_fn is no function or does not return a real scalar, or a leaf of params is complex or no array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.per_example_sq_norms(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]))
        Array([ 1., 16., 49.], dtype=float32)
    """
    _validate.function("loss_fn", loss_fn)
    _validate.one_of("method", method, METHODS, "call it as per_example_sq_norms(loss_fn)(params, batch)")
    _validate.max_bytes(max_bytes)

    def sq_norms(params: PyTree, batch: PyTree) -> PyTree:
        params, batch, _ = _validate.arguments(params, batch)
        of_batch = functools.partial(_sq_norms, loss_fn, method, max_bytes)
        return explicit.relaxed(of_batch, _norms_lie, params, batch)

    return sq_norms


def _norms_lie(params: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(lambda _: PartitionSpec(rows), params)
