"""Sums and norms of the per-example gradients of one batch: dispatch between the engine and vmap(grad)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, ghost, trees
from cg_jax._loss import LossFn, each_devices_own
from cg_jax._per_batch import PerBatch, mask_of, rows_specs
from cg_jax.moments import GradMoments
from cg_jax.per_example import losses_and_grads

PyTree = Any

METHODS = ("ghost", "vmap")


class BatchStatistics(NamedTuple):
    """What one batch yields; masked rows are zero throughout."""

    losses: jax.Array  # [B], accumulator dtype
    sq_norms: PyTree  # ‖gᵢ‖² for each tensor, [B], accumulator dtype
    sum_grads: PyTree  # Σ gᵢ, like the parameters, accumulator dtype
    aux: PyTree  # what loss_fn returned beside the loss, [B, ...], or None


def fill_masked(batch: PyTree, mask: jax.Array) -> PyTree:
    """Each masked row replaced by the first valid one.

    A zero or garbage row could turn its zero weight into 0·∞ = NaN inside the derivative of the loss.
    """
    rows = jnp.where(mask, jnp.arange(mask.size), jnp.argmax(mask))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def _zero_where(condition: jax.Array, tree: PyTree) -> PyTree:
    """Each leaf, or zeros where `condition` (a scalar, or [B] for leaves [B, ...]) holds; random keys as they are."""

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
    """By vmap(grad): the reference, which builds a B × parameters array."""
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
    """Losses, squared norms and the sum of the gradients of one batch; the one producer behind everything above."""
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


def to_moments(statistics: BatchStatistics, count: Any) -> GradMoments:
    """The sums over the batch, of which `count` rows were valid."""
    return GradMoments(
        count=jnp.asarray(count, jnp.int32),
        sum_losses=statistics.losses.sum(),
        sum_grads=statistics.sum_grads,
        sum_sq_norms=jax.tree.map(jnp.sum, statistics.sq_norms),
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
    statistics = batch_statistics(loss_fn, params, batch, mask, method, max_bytes, has_aux)
    moments = to_moments(statistics, statistics.losses.size if mask is None else mask.sum())
    return moments, statistics.aux


def _moments_specs(params: PyTree, rows: Any, **_: Any) -> tuple[Any, PartitionSpec]:
    whole: Any = PartitionSpec()
    return GradMoments(whole, whole, params, jax.tree.map(lambda _: whole, params)), PartitionSpec(rows)


def _per_example_sq_norms(
    loss_fn: LossFn, params: PyTree, batch: PyTree, method: str, max_bytes: int | None, has_aux: bool
) -> tuple[PyTree, PyTree]:
    statistics = batch_statistics(loss_fn, params, batch, None, method, max_bytes, has_aux)
    return statistics.sq_norms, statistics.aux


_MOMENTS = PerBatch(_grad_moments, _moments_specs, {"mask": mask_of})
_SQ_NORMS = PerBatch(_per_example_sq_norms, rows_specs)


def grad_moments(
    loss_fn: LossFn, method: str = "ghost", *, max_bytes: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The function (params, batch, mask=None, state=None) → GradMoments: S = Σ gᵢ and Q = Σ ‖gᵢ‖² per tensor, Σ ℓᵢ.

    gᵢ = ∇ loss_fn(params, batch[i]). Method "ghost" takes one backward pass and builds no array of size B × parameters
    beyond max_bytes; "vmap" is the plain reference, vmap(grad), and does. Both are exact and agree to rounding.

    Inside `jax.shard_map` or `jax.pmap` a device's moments are those of its own examples: `jax.lax.psum(moments, axis)`
    is the moments of all, and `coherence` of that what you want. Under `jax.jit` with sharded arrays nothing is needed.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example; loss_fn(params, example, state) where a
            state is given. Any callable: a function, a partial, a bound method, an object with __call__. As with
            `jax.jit`, what it reads from outside is read once, when it is compiled. It is known by its identity, and
            compiled once for each object: pass the same one again, for a fresh lambda compiles again. Of a bound method
            the owner is what counts. What was compiled goes when loss_fn does; that of an object that takes no weak
            reference (__slots__) goes with the function returned here.
        method: "ghost" or "vmap".
        max_bytes: Method "ghost" works a tensor off in chunks of examples, so that the per-example arrays that it needs
            take at most this many bytes at once (but for one example's own); 64 MiB by default, 256 MiB on an
            accelerator. `explain` says what they are.
        has_aux: loss_fn returns (loss, aux), as for `jax.value_and_grad`; aux is any pytree of arrays, and has no
            gradient.

    Returns:
        A jitted function of params (any pytree), batch (a pytree whose leaves share a leading axis B), mask (boolean
        [B]) and state (any pytree of arrays, without a batch axis). Rows where mask is False contribute nothing,
        whatever they hold. State is what loss_fn needs and what is not differentiated, such as running averages: new
        values compile nothing again, as new values that loss_fn closes over would. A gradient that is not finite makes
        the sums so: see `measure_coherence` for leaving such examples out. Sums are float32, or float64 where the
        parameters are; integer leaves of params are None. A squared norm above the range (a norm of 1.8e19 in float32)
        is infinite, and one below it zero.

        With has_aux, (GradMoments, aux with a leading axis B); masked rows of aux are zero, random keys apart.

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, a mask of other shape or
            dtype, or a loss that does not depend on params.
        TypeError: loss_fn is no function or does not return a real scalar (with has_aux, and something beside it), or a
            leaf of params is complex or no array.

    References:
        The sum of squares without the gradients: Goodfellow, Efficient Per-Example Gradient Computations, 2015,
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

    Nothing of size B × parameters is built.

    Args:
        loss_fn: As for `grad_moments`.
        method: "ghost", or "vmap" for the plain reference.
        max_bytes: As for `grad_moments`.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function that returns a pytree like params of [B], float32 (float64 where the parameters are); None for
        integer leaves. The sum over the leaves is ‖gᵢ‖² of the whole gradient. With has_aux, (that, the auxiliary
        values [B, ...]).

    Raises:
        ValueError: Unknown method, max_bytes < 1, empty batch, leading axes that disagree, or a loss that does not
            depend on params.
        TypeError: loss_fn is no function or does not return a real scalar (with has_aux, and something beside it), or a
            leaf of params is complex or no array.

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
