"""Robust averages of the gradients of single examples: Σ wᵢ gᵢ with weights from the statistics of the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _compat, _validate, trees
from cg_jax._loss import LossFn
from cg_jax._per_batch import PerBatch, mask_of
from cg_jax._types import PyTree
from cg_jax.gradients import METHODS, ExampleGradients, example_gradients, zero_where
from cg_jax.moments import GradMoments
from cg_jax.sharding.axes import Axes, axes_of
from cg_jax.weighting import ExampleStatistics, NamedWeighting, Weighting, require_weighting

NONFINITE = ("propagate", "skip")


class WeightedInfo(NamedTuple):
    """What `weighted_grads` knows of the examples of a batch. Masked and skipped examples are zero."""

    losses: jax.Array  # ℓᵢ, [B], accumulator dtype
    sq_norms: jax.Array  # ‖gᵢ‖² of the whole gradient, [B], accumulator dtype
    weights: PyTree  # wᵢ, [B], or like params of [B] if the weighting is by tensor
    moments: GradMoments  # of the examples that count, all with weight 1
    num_nonfinite: jax.Array  # examples left out because they are not finite, int32 scalar


def weighted_grads(
    loss_fn: LossFn,
    weighting: Weighting,
    *,
    axis_name: Any = None,
    max_bytes: int | None = None,
    method: str = "ghost",
    nonfinite: str = "propagate",
    dtype: Any = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The function (params, batch, mask=None, state=None) → (Σ wᵢ gᵢ, WeightedInfo), gᵢ = ∇ loss_fn(params, batch[i]).

    The weights wᵢ [B] are a function of the losses, norms and inner products of the gradients, which a weighting such
    as `clip_norm` or `geometric_median` gives. All come from one forward and one backward pass. Gradients of examples
    are built only where their norms need them, as for convolutions, a few at a time; they are kept for the sum where
    they take no more bytes than the pass itself, or than max_bytes. The gradients go to any optax optimizer. Call it
    inside your own jitted step: results that the step does not use, such as the moments, are then not computed.

    Under `jax.jit` with sharded arrays the result is that of the whole batch. Inside `jax.shard_map` or `jax.pmap` with
    axis_name it is too: quantiles, medians and shares are of the examples of all devices, and every result but aux is
    replicated. That takes one all-reduce of the parameters' size for the sum, one more for each call of
    `ExampleStatistics.alignments`, and scalars. Without axis_name a device sees only its own examples.

    A loss of one example cannot use batch statistics. With BatchNorm, use its running averages (train=False) as state.

    Args:
        loss_fn: As for `grad_moments`.
        weighting: `clip_norm`, `clip_quantile`, `normalize`, `agreement`, `geometric_median`, `trim_loss`, `compose`,
            or your own function of an `ExampleStatistics` that returns weights [B], or a pytree like params of [B] to
            weight each tensor by itself. Weights may be any real numbers. Pass the same function object each time,
            since a new one compiles again.
        axis_name: The axis, or axes, of an enclosing shard_map or pmap that the examples are sharded over.
        max_bytes: As for `grad_moments`, and the most bytes of all gradients that are kept.
        method: "ghost", or "vmap" for the plain reference, which builds all gradients.
        nonfinite: "propagate": a non-finite gradient makes the result non-finite, and a non-finite loss the weights
            that depend on it. "skip": an example with a non-finite loss, gradient or squared norm has weight 0, does
            not count in B, and is counted in num_nonfinite; its aux is zero. A squared norm above the range (a norm of
            1.8e19 in float32) is infinite, and clipping then gives weight 0.
        dtype: The floating dtype of the gradients, if it is not that of the parameters. Sums are float32, or float64 if
            the parameters are, before they are cast.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function of params, batch, mask and state (as for `grad_moments`), which returns gradients like params,
        with None for integer leaves, and a `WeightedInfo`. With has_aux it returns ((gradients, info), aux). If no
        example counts, the gradients are zero.

    Raises:
        ValueError: Unknown method or nonfinite, max_bytes < 1, empty batch, leading axes that disagree, a mask of
            another shape or dtype, a loss that does not depend on params, an axis_name without such an axis around, or
            weights of another shape than [B].
        TypeError: loss_fn or weighting is not a function, dtype is not a floating dtype, loss_fn does not return a real
            scalar, or a leaf of params is complex or not an array.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> robust = cg.weighted_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.clip_quantile(0.5))
        >>> optimizer = optax.sgd(0.1)
        >>> @jax.jit
        ... def step(w, opt_state, batch):
        ...     grads, info = robust(w, batch)
        ...     updates, opt_state = optimizer.update(grads, opt_state)
        ...     return optax.apply_updates(w, updates), opt_state, info.losses.mean()
        >>> w, _, loss = step(jax.numpy.zeros(()), optimizer.init(0.0), jax.numpy.array([1.0, 4.0, 7.0]))
        >>> round(float(w), 4), float(loss)
        (0.3, 11.0)
    """
    _validate.function("loss_fn", loss_fn)
    if isinstance(loss_fn, NamedWeighting):
        raise TypeError(f"Expected loss_fn to be a loss of one example, got {loss_fn!r}; loss_fn comes first.")
    require_weighting("weighting", weighting)
    _validate.one_of("method", method, METHODS)
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    _validate.max_bytes(max_bytes)
    _validate.floating("dtype", dtype)
    family = _TRACED if isinstance(weighting, NamedWeighting) and weighting.is_traced else _WEIGHTED
    of_batch = family.of(
        loss_fn,
        has_aux,
        weighting=weighting,
        axis_name=tuple(axis_name) if isinstance(axis_name, list) else axis_name,
        max_bytes=max_bytes,
        method=method,
        nonfinite=nonfinite,
        dtype=None if dtype is None else jnp.dtype(dtype),
    )

    def grads(params: PyTree, batch: PyTree, mask: Any = None, state: PyTree = None) -> Any:
        return of_batch(params, batch, state, mask=mask)

    return grads


def _weighted_grads(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    weighting: Weighting,
    axis_name: Any,
    max_bytes: int | None,
    method: str,
    nonfinite: str,
    dtype: Any,
    has_aux: bool,
) -> tuple[tuple[PyTree, WeightedInfo], PyTree]:
    axes = axes_of(axis_name, "weighted_grads")
    size = jax.tree.leaves(batch)[0].shape[0]
    of = example_gradients(loss_fn, params, batch, mask, method, max_bytes, has_aux)
    keep = jnp.ones(size, bool) if mask is None else mask
    bad = jnp.zeros(size, bool)
    if nonfinite == "skip":
        finite = jnp.isfinite(trees.total(_sq_norms(of, axes))) & jnp.isfinite(of.losses)
        bad, keep = keep & ~finite, keep & finite
        of = of.without(keep)
    aux = of.aux if mask is None and nonfinite != "skip" else zero_where(~keep, of.aux)
    statistics = _statistics(of, keep, axes)
    weights = _checked(weighting(statistics), statistics, weighting)
    weights = jax.tree.map(lambda w: jnp.where(statistics.mask, w, 0), weights)
    total = _total(of, keep, axes, weights)
    kept, _ = trees.partition(params)
    grads = jax.tree.map(lambda g, p: g.astype(dtype or p.dtype), total, jax.tree.map(jnp.asarray, kept))
    sum_sq_norms = jax.tree.map(jnp.sum, statistics.tensor_sq_norms)
    count = statistics.mask.sum(dtype=jnp.int32)
    moments = GradMoments(count, statistics.losses.sum(), _total(of, keep, axes, None), sum_sq_norms)
    info = WeightedInfo(statistics.losses, statistics.sq_norms, weights, moments, axes.sum(bad.sum(dtype=jnp.int32)))
    return (grads, info), aux


def _sq_norms(of: ExampleGradients, axes: Axes) -> PyTree:
    """‖gᵢ‖² of each tensor. Shards of a tensor over other axes than the examples' are summed."""
    rows = _compat.varying_axes(of.losses) | axes.tracked
    return jax.tree.map(lambda sq: _compat.sum_over(sq, rows), of.sq_norms())


def _total(of: ExampleGradients, keep: jax.Array, axes: Axes, weights: PyTree) -> PyTree:
    """Σ wᵢ gᵢ over the examples of all devices, in the accumulator dtype. `weights` is None for Σ gᵢ."""
    if weights is None:
        return axes.sum(zero_where(~keep.any(), of.sums()))
    own = jax.tree.map(axes.own, weights)
    return axes.sum(zero_where(~keep.any(), of.weighted_sums(own)))


def _statistics(of: ExampleGradients, keep: jax.Array, axes: Axes) -> ExampleStatistics:
    """The statistics of the examples of all devices."""

    def alignments(weights: jax.Array | None = None) -> jax.Array:
        if weights is not None:
            if jnp.shape(weights) != losses.shape:
                raise ValueError(
                    f"Expected weights of shape {losses.shape} in alignments(weights), got shape {jnp.shape(weights)}."
                )
            weights = jnp.where(everywhere, weights, 0)
        if axes.is_one_device:
            return zero_where(~keep, of.mutual_alignments(weights))
        return axes.gather(zero_where(~keep, of.alignments(_total(of, keep, axes, weights))))

    everywhere = axes.gather(keep)
    sq_norms = jax.tree.map(axes.gather, zero_where(~keep, _sq_norms(of, axes)))
    losses = axes.gather(zero_where(~keep, trees.accumulate(of.losses)))
    return ExampleStatistics(losses, trees.total(sq_norms), sq_norms, everywhere, alignments)


def _checked(weights: Any, of: ExampleStatistics, weighting: Weighting) -> PyTree:
    """Weights as arrays. ValueError unless they are real [B], or like params of [B]."""
    leaves, structure = jax.tree.flatten(weights)
    like = jax.tree.structure(of.tensor_sq_norms)
    wanted = f"weights of shape {of.losses.shape} or a pytree like params, {like}, from {weighting!r}"
    if weights is None:
        raise ValueError(f"Expected {wanted}, got None; return the weights.")
    if not jax.tree_util.treedef_is_leaf(structure) and structure != like:
        raise ValueError(f"Expected {wanted}, got {structure}.")
    for leaf in leaves:
        if jnp.shape(leaf) != of.losses.shape:
            raise ValueError(
                f"Expected weights of shape {of.losses.shape} from {weighting!r}, got shape {jnp.shape(leaf)}."
            )
        if jnp.iscomplexobj(leaf):
            raise ValueError(f"Expected real weights from {weighting!r}, got dtype {jnp.result_type(leaf)}.")
    return jax.tree.map(jnp.asarray, weights)


def _specs(params: PyTree, rows: Any, weighting: Weighting, **_: Any) -> Any:
    del weighting
    whole, by_row = PartitionSpec(), PartitionSpec(rows)
    moments: Any = GradMoments(whole, whole, params, jax.tree.map(lambda _: whole, params))  # type: ignore[arg-type]
    info: Any = WeightedInfo(by_row, by_row, by_row, moments, whole)  # type: ignore[arg-type]
    return (params, info), by_row


_WEIGHTED = PerBatch(_weighted_grads, _specs, {"mask": mask_of})
_TRACED = PerBatch(_weighted_grads, _specs, {"mask": mask_of}, jitted=False)
