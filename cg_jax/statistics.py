"""Sums, norms and alignments of the per-example gradients of one batch, by the engine or by vmap(grad)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _compat, _validate, trees
from cg_jax._loss import LossFn
from cg_jax._per_batch import PerBatch, direction_of, mask_of, rows_specs, weights_of
from cg_jax._types import PyTree
from cg_jax.gradients import METHODS, example_gradients, zero_where
from cg_jax.moments import GradMoments


class BatchStatistics(NamedTuple):
    """Losses, norms and sums of one batch. Masked rows are zero in all fields."""

    losses: jax.Array  # [B], accumulator dtype
    sq_norms: PyTree  # ‖gᵢ‖² for each tensor, [B], accumulator dtype
    sum_grads: PyTree  # Σ gᵢ, like the parameters, accumulator dtype
    aux: PyTree  # the auxiliary values of loss_fn, [B, ...], or None


def batch_statistics(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    method: str,
    max_bytes: int | None = None,
    has_aux: bool = False,
) -> BatchStatistics:
    """Losses, squared norms and the sum of the gradients of one batch."""
    of = example_gradients(loss_fn, params, batch, mask, method, max_bytes, has_aux, norms_inside=True)
    losses, sq_norms, sum_grads, aux = trees.accumulate(of.losses), of.sq_norms(), of.sums(), of.aux
    if mask is not None:
        losses, sq_norms, aux = zero_where(~mask, (losses, sq_norms, aux))
        sum_grads = zero_where(~mask.any(), sum_grads)
    return BatchStatistics(losses, sq_norms, sum_grads, aux)


def to_moments(of_batch: BatchStatistics, count: Any) -> GradMoments:
    """The sums over the batch, which has `count` valid rows."""
    return GradMoments(
        count=jnp.asarray(count, jnp.int32),
        sum_losses=of_batch.losses.sum(),
        sum_grads=of_batch.sum_grads,
        sum_sq_norms=jax.tree.map(jnp.sum, of_batch.sq_norms),
    )


def _grad_moments(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    weights: jax.Array | None,
    method: str,
    max_bytes: int | None,
    has_aux: bool,
) -> tuple[GradMoments, PyTree]:
    if weights is not None:
        loss_fn, batch = _times_weight(loss_fn, has_aux), (batch, weights)
    of_batch = batch_statistics(loss_fn, params, batch, mask, method, max_bytes, has_aux)
    moments = to_moments(of_batch, of_batch.losses.size if mask is None else mask.sum())
    return moments, of_batch.aux


def _times_weight(loss_fn: LossFn, has_aux: bool) -> LossFn:
    """The loss of an example and its weight, w · ℓ, whose gradient is w · g."""

    def weighted(params: PyTree, row: tuple[PyTree, jax.Array]) -> Any:
        example, weight = row
        out = loss_fn(params, example)
        if not has_aux:
            return _scaled(out, weight)
        _validate.pair(out)
        return _scaled(out[0], weight), out[1]

    return weighted


def _scaled(loss: Any, weight: jax.Array) -> Any:
    """loss · weight in the accumulator dtype. What is no real scalar is returned as it is, for its own error."""
    if not hasattr(loss, "dtype") or not trees.is_differentiable(loss):
        return loss
    dtype = trees.accumulator_dtype(loss.dtype)
    return loss.astype(dtype) * weight.astype(dtype)


def _moments_specs(params: PyTree, rows: Any, **_: Any) -> tuple[Any, PartitionSpec]:
    whole: Any = PartitionSpec()
    return GradMoments(whole, whole, params, jax.tree.map(lambda _: whole, params)), PartitionSpec(rows)


def _per_example_sq_norms(
    loss_fn: LossFn, params: PyTree, batch: PyTree, method: str, max_bytes: int | None, has_aux: bool
) -> tuple[PyTree, PyTree]:
    of_batch = batch_statistics(loss_fn, params, batch, None, method, max_bytes, has_aux)
    return of_batch.sq_norms, of_batch.aux


def aligned(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    mask: jax.Array | None = None,
    has_aux: bool = False,
) -> tuple[jax.Array, PyTree]:
    """(gᵢ · direction [B] in the accumulator dtype, auxiliary values [B, ...])."""
    of = example_gradients(loss_fn, params, batch, mask, "ghost", has_aux=has_aux)
    kept, _ = trees.partition(params)
    along = jax.tree.map(lambda v, p: v.astype(trees.accumulator_dtype(p.dtype)), trees.partition(direction)[0], kept)
    return of.alignments(_compat.vary_like(along, kept)), of.aux


def _alignments(
    loss_fn: LossFn, params: PyTree, batch: PyTree, direction: PyTree, has_aux: bool
) -> tuple[jax.Array, PyTree]:
    return aligned(loss_fn, params, batch, direction, has_aux=has_aux)


_MOMENTS = PerBatch(_grad_moments, _moments_specs, {"mask": mask_of, "weights": weights_of})
_SQ_NORMS = PerBatch(_per_example_sq_norms, rows_specs)
_ALIGNMENTS = PerBatch(_alignments, rows_specs, {"direction": direction_of})


def grad_moments(
    loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The function (params, batch, mask=None, state=None, weights=None) → GradMoments: S = Σ gᵢ, Q = Σ ‖gᵢ‖², Σ ℓᵢ.

    gᵢ = ∇ loss_fn(params, batch[i]); Q is per tensor. With weights w, any real numbers [B], the examples have the
    losses wᵢ ℓᵢ: then S = Σ wᵢ gᵢ, Q = Σ wᵢ² ‖gᵢ‖² (the weights are squared) and Σ wᵢ ℓᵢ, and count still counts
    examples. Method "ghost" takes one backward pass and builds no array of size B × parameters
    beyond max_bytes. Method "vmap" is the plain reference, vmap(grad), and builds it. Both are exact and agree up to
    rounding.

    Inside `jax.shard_map` or `jax.pmap`, the moments on a device are those of its own examples. The moments of all
    examples are `jax.lax.psum(moments, axis)`; call `coherence` on those. Under `jax.jit` with sharded arrays nothing
    more is needed.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example, or loss_fn(params, example, state) if a
            state is given. Any callable: a function, a partial, a bound method, an object with __call__. As with
            `jax.jit`, values that it reads from outside are read once, when it is compiled. It is compiled once for
            each object, by identity. Pass the same object each time, since a new lambda compiles again. A bound method
            is identified by its function and its owner. The programs are freed with loss_fn. Those of an object that
            takes no weak reference (__slots__) are freed with the function returned here.
        method: "ghost" or "vmap".
        max_bytes: The most bytes that the per-example arrays of a tensor take at once in method "ghost", which works in
            chunks of examples (of at least one). The default is 64 MiB, or 256 MiB on an accelerator. `explain` shows
            these arrays.
        has_aux: loss_fn returns (loss, aux), as for `jax.value_and_grad`. aux is any pytree of arrays, and has no
            gradient.

    Returns:
        A jitted function of params (any pytree), batch (a pytree whose leaves share a leading axis B), mask (boolean
        [B]), state (any pytree of arrays, without a batch axis) and, by keyword, weights (real [B]). Rows where mask is
        False contribute nothing, whatever they contain. State is an input of loss_fn that is not differentiated, such
        as running averages. New values of it do not recompile. New values that loss_fn closes over would. A non-finite
        gradient makes the sums non-finite, also with weight 0: see `measure_coherence` for skipping such examples. Sums
        are float32, or float64 if the parameters are. Integer leaves of params are None. A squared norm above the range
        (a norm of 1.8e19 in float32) is infinite, and one below it is zero.

        With has_aux it returns (GradMoments, aux), where aux has a leading axis B. Masked rows of aux are zero, except
        random keys.

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, a mask or weights of another
            shape or dtype, or a loss that does not depend on params.
        TypeError: loss_fn is not a function or does not return a real scalar (with has_aux, a pair of it and aux), or a
            leaf of params is complex or not an array.

    References:
        For squared norms without the gradients: Goodfellow, Efficient Per-Example Gradient Computations, 2015,
        https://arxiv.org/abs/1510.01799.

    Examples:
        >>> import jax, cg_jax as cg
        >>> moments = cg.grad_moments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]))
        >>> int(moments.count), float(moments.sum_grads), float(moments.sum_sq_norms)
        (3, -12.0, 66.0)
    """
    of_batch = _of_loss(_MOMENTS, loss_fn, method, max_bytes, has_aux)

    def moments(params: PyTree, batch: PyTree, mask: Any = None, state: PyTree = None, *, weights: Any = None) -> Any:
        return of_batch(params, batch, state, mask=mask, weights=weights)

    return moments


def per_example_sq_norms(
    loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None, has_aux: bool = False
) -> Callable[..., PyTree]:
    """The function (params, batch, state=None) → ‖gᵢ‖² of every example, tensor by tensor.

    It builds no array of size B × parameters.

    Args:
        loss_fn: As for `grad_moments`.
        method: "ghost", or "vmap" for the plain reference.
        max_bytes: As for `grad_moments`.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function that returns a pytree like params of [B], float32 (float64 if the parameters are), with None
        for integer leaves. The sum over the leaves is ‖gᵢ‖² of the whole gradient. With has_aux it returns (squared
        norms, aux), where each leaf of aux is [B, ...].

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, or a loss that does not
            depend on params.
        TypeError: loss_fn is not a function or does not return a real scalar (with has_aux, a pair of it and aux), or a
            leaf of params is complex or not an array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.per_example_sq_norms(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]))
        Array([ 1., 16., 49.], dtype=float32)
    """
    of_batch = _of_loss(_SQ_NORMS, loss_fn, method, max_bytes, has_aux)

    def sq_norms(params: PyTree, batch: PyTree, state: PyTree = None) -> PyTree:
        return of_batch(params, batch, state)

    return sq_norms


def alignments(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
    """The function (params, batch, direction, state=None) → aᵢ = gᵢ · v = Σₜ bₜᵀ vᵀ aₜ, [B].

    No per-example gradient is built: the inputs aₜ and cotangents bₜ of one backward pass are enough. If v is the mean
    gradient ḡ, then Σ aᵢ / m = ‖ḡ‖². An example with small or negative aᵢ pulls against the others. The cost is about
    that of one plain gradient, for every loss that has one, also with a `jax.custom_vjp`.

    Args:
        loss_fn: As for `grad_moments`.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function of params, batch, direction (like params, of any floating dtype; integer leaves are ignored
        and may be None) and state. The result is float32, or float64 if the parameters are. With has_aux it returns
        (alignments, aux), where each leaf of aux is [B, ...].

    Raises:
        ValueError: Empty batch, leading axes that disagree, a direction of other structure or shapes than params, or a
            loss that does not depend on params.
        TypeError: loss_fn is not a function or does not return a real scalar (with has_aux, a pair of it and aux), or a
            leaf of params is complex or not an array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.alignments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]), 2.0)
        Array([ -2.,  -8., -14.], dtype=float32)
    """
    of_batch = _ALIGNMENTS.of(loss_fn, has_aux)

    def aligned_with(params: PyTree, batch: PyTree, direction: PyTree, state: PyTree = None) -> Any:
        return of_batch(params, batch, state, direction=direction)

    return aligned_with


def _of_loss(
    family: PerBatch, loss_fn: LossFn, method: str, max_bytes: int | None, has_aux: bool
) -> Callable[..., Any]:
    """A function of (params, batch) by a method."""
    _validate.function("loss_fn", loss_fn)  # first: it is the first argument
    _validate.one_of("method", method, METHODS, f"call it as {family.name}(loss_fn)(params, batch)")
    _validate.max_bytes(max_bytes)
    return family.of(loss_fn, has_aux, method=method, max_bytes=max_bytes)
