"""Sums and norms of the per-example gradients of one batch, by the engine or by vmap(grad)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, ghost, trees
from cg_jax._loss import LossFn, each_devices_own
from cg_jax._per_batch import PerBatch, mask_of, rows_specs
from cg_jax._types import PyTree
from cg_jax.moments import GradMoments
from cg_jax.per_example import losses_and_grads

METHODS = ("ghost", "vmap")


class BatchStatistics(NamedTuple):
    """Losses, norms and sums of one batch. Masked rows are zero in all fields."""

    losses: jax.Array  # [B], accumulator dtype
    sq_norms: PyTree  # ‖gᵢ‖² for each tensor, [B], accumulator dtype
    sum_grads: PyTree  # Σ gᵢ, like the parameters, accumulator dtype
    aux: PyTree  # the auxiliary values of loss_fn, [B, ...], or None


def fill_masked(batch: PyTree, mask: jax.Array) -> PyTree:
    """Replace each masked row by the first valid one.

    A zero or garbage row could turn its zero weight into 0·∞ = NaN inside the derivative of the loss.
    """
    rows = jnp.where(mask, jnp.arange(mask.size), jnp.argmax(mask))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def _zero_where(condition: jax.Array, tree: PyTree) -> PyTree:
    """Zeros where `condition` (a scalar, or [B] for leaves [B, ...]) holds. Random keys do not change."""

    def zeroed(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        shaped = (
            condition.reshape(condition.shape + (1,) * (leaf.ndim - condition.ndim)) if condition.ndim else condition
        )
        return jnp.where(shaped, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(zeroed, tree)


def _vmap_statistics(
    loss_fn: LossFn, params: PyTree, batch: PyTree, weights: jax.Array | None, has_aux: bool
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """The reference by vmap(grad), which builds an array of size B × parameters."""
    losses, grads, aux = losses_and_grads(loss_fn, params, batch, has_aux)
    grads = trees.accumulate(grads)
    if weights is not None:
        grads = jax.vmap(lambda w, g: jax.tree.map(lambda leaf: leaf * w.astype(leaf.dtype), g))(weights, grads)
    return losses, trees.row_sq_norms(grads), trees.row_sums(grads), aux


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
    weights = None
    if mask is not None:
        batch, weights = fill_masked(batch, mask), mask.astype(jnp.float32)
    params = each_devices_own(loss_fn, params, batch, has_aux)
    if method == "ghost":
        of = ghost.one_pass(loss_fn, params, batch, weights, max_bytes, has_aux)
        losses, sq_norms, sum_grads, aux = of.losses, ghost.sq_norms(of), ghost.sums(of), of.aux
    else:
        losses, sq_norms, sum_grads, aux = _vmap_statistics(loss_fn, params, batch, weights, has_aux)
    losses = trees.accumulate(losses)
    if mask is not None:
        losses, sq_norms, aux = _zero_where(~mask, (losses, sq_norms, aux))
        sum_grads = _zero_where(~mask.any(), sum_grads)
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
    method: str,
    max_bytes: int | None,
    has_aux: bool,
) -> tuple[GradMoments, PyTree]:
    of_batch = batch_statistics(loss_fn, params, batch, mask, method, max_bytes, has_aux)
    moments = to_moments(of_batch, of_batch.losses.size if mask is None else mask.sum())
    return moments, of_batch.aux


def _moments_specs(params: PyTree, rows: Any, **_: Any) -> tuple[Any, PartitionSpec]:
    whole: Any = PartitionSpec()
    return GradMoments(whole, whole, params, jax.tree.map(lambda _: whole, params)), PartitionSpec(rows)


def _per_example_sq_norms(
    loss_fn: LossFn, params: PyTree, batch: PyTree, method: str, max_bytes: int | None, has_aux: bool
) -> tuple[PyTree, PyTree]:
    of_batch = batch_statistics(loss_fn, params, batch, None, method, max_bytes, has_aux)
    return of_batch.sq_norms, of_batch.aux


_MOMENTS = PerBatch(_grad_moments, _moments_specs, {"mask": mask_of})
_SQ_NORMS = PerBatch(_per_example_sq_norms, rows_specs)


def grad_moments(
    loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The function (params, batch, mask=None, state=None) → GradMoments: S = Σ gᵢ and Q = Σ ‖gᵢ‖² per tensor, Σ ℓᵢ.

    gᵢ = ∇ loss_fn(params, batch[i]). Method "ghost" takes one backward pass and builds no array of size B × parameters
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
        [B]) and state (any pytree of arrays, without a batch axis). Rows where mask is False contribute nothing,
        whatever they contain. State is an input of loss_fn that is not differentiated, such as running averages. New
        values of it do not recompile. New values that loss_fn closes over would. A non-finite gradient makes the sums
        non-finite: see `measure_coherence` for skipping such examples. Sums are float32, or float64 if the parameters
        are. Integer leaves of params are None. A squared norm above the range (a norm of 1.8e19 in float32) is
        infinite, and one below it is zero.

        With has_aux it returns (GradMoments, aux), where aux has a leading axis B. Masked rows of aux are zero, except
        random keys.

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, a mask of another shape or
            dtype, or a loss that does not depend on params.
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

    def moments(params: PyTree, batch: PyTree, mask: Any = None, state: PyTree = None) -> Any:
        return of_batch(params, batch, state, mask=mask)

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


def _of_loss(
    family: PerBatch, loss_fn: LossFn, method: str, max_bytes: int | None, has_aux: bool
) -> Callable[..., Any]:
    """A function of (params, batch) by a method."""
    _validate.function("loss_fn", loss_fn)  # first: it is the first argument
    _validate.one_of("method", method, METHODS, f"call it as {family.name}(loss_fn)(params, batch)")
    _validate.max_bytes(max_bytes)
    return family.of(loss_fn, has_aux, method=method, max_bytes=max_bytes)
