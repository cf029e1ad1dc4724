"""Weightings by the norms of gradients: clipping to a bound, to a quantile, and to one length."""

from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, _validate
from cg_jax._types import PyTree
from cg_jax.weighting.base import ExampleStatistics, NamedWeighting, Unique, named, quantile, ratio


def clip_norm(max_norm: Any, per_tensor: bool = False, *, normalize_by: float | None = None) -> NamedWeighting:
    """The weighting wᵢ = min(1, C/‖gᵢ‖)/B. Σ wᵢ gᵢ is the mean of the gradients clipped to norm C.

    B counts the examples that are not masked. A zero gradient has weight 1/B. Clipping shortens the step, as
    differential privacy requires.

    Args:
        max_norm: The bound C ≥ 0. Inside your own jitted step it may be a traced number. A pytree like params of bounds
            clips each tensor by its own norm and bound: the weights then differ between tensors. Its leaves for integer
            parameters are ignored.
        per_tensor: Clip each tensor by its own norm to C/√K, where K is the number of tensors, so that the whole
            gradient has a norm of at most C.
        normalize_by: Divide by this number instead of B: 1 for the sum, or the expected batch size if examples are
            sampled independently.

    Raises:
        TypeError: A bound is not a number.
        ValueError: A bound is negative, per_tensor is given with a pytree of bounds, or normalize_by ≤ 0. When called:
            a pytree of bounds that does not have the structure of params.

    References:
        Abadi et al., Deep Learning with Differential Privacy, 2016, https://arxiv.org/abs/1607.00133. By tensor:
        McMahan et al., Learning Differentially Private Recurrent Language Models, 2017,
        https://arxiv.org/abs/1710.06963.

    Examples:
        >>> import jax, cg_jax as cg
        >>> clipped = cg.weighted_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.clip_norm(4.5, normalize_by=1))
        >>> grads, info = clipped(0.0, jax.numpy.array([1.0, 4.0, 7.0, 9.0]))
        >>> float(grads), info.weights
        (-14.0, Array([1.       , 1.       , 0.64285713, 0.5       ], dtype=float32))
    """
    if normalize_by is not None and not (normalize_by := _validate.number("normalize_by", normalize_by)) > 0:
        raise ValueError(f"Expected normalize_by > 0, got normalize_by={normalize_by}.")
    leaves, structure = jax.tree.flatten(max_norm)
    bounds = tuple(_bound(leaf) for leaf in leaves)
    is_tree = not jax.tree_util.treedef_is_leaf(structure)
    if is_tree and per_tensor:
        raise ValueError("Expected per_tensor=False with a pytree of bounds max_norm, got per_tensor=True.")

    def weights(of: ExampleStatistics) -> PyTree:
        over = of.count if normalize_by is None else normalize_by
        if not is_tree and not per_tensor:
            return _clipped(of.norms, bounds[0]) / over
        count = len(jax.tree.leaves(of.tensor_sq_norms))
        by_tensor = (
            _like(jax.tree.unflatten(structure, bounds), of.tensor_sq_norms)
            if is_tree
            else jax.tree.map(lambda _: bounds[0] / count**0.5, of.tensor_sq_norms)
        )
        return jax.tree.map(lambda sq, bound: _clipped(jnp.sqrt(sq), bound) / over, of.tensor_sq_norms, by_tensor)

    shown: Any = max_norm if is_tree else bounds[0]
    # A traced bound has no value yet. Such a weighting equals only itself.
    key = Unique() if any(map(_compat.is_tracer, bounds)) else (bounds, structure, per_tensor, normalize_by)
    numbers = {"max_norm": shown, "per_tensor": per_tensor, "normalize_by": normalize_by}
    return named("clip_norm", weights, numbers, key)


def _bound(value: Any) -> Any:
    if _compat.is_tracer(value):
        return value
    bound = _validate.number("max_norm", value)
    if bound < 0:
        raise ValueError(f"Expected max_norm >= 0, got max_norm={bound}.")
    return bound


def _like(bounds: PyTree, tensors: PyTree) -> PyTree:
    """Bounds for the tensors that have a norm. ValueError if the two trees have different structures."""
    is_none = lambda leaf: leaf is None  # noqa: E731
    whole, structure = jax.tree.flatten(tensors, is_leaf=is_none)
    each = jax.tree.leaves(bounds, is_leaf=is_none)
    if jax.tree.structure(bounds, is_leaf=is_none) != structure:
        raise ValueError(
            f"Expected max_norm to have the structure of params, {structure}, got {jax.tree.structure(bounds)}."
        )
    if any(bound is None and tensor is not None for tensor, bound in zip(whole, each, strict=True)):
        raise ValueError(f"Expected a bound for every tensor in max_norm, got {bounds}; inf clips nothing.")
    kept = [None if tensor is None else bound for tensor, bound in zip(whole, each, strict=True)]
    return jax.tree.unflatten(structure, kept)


def _clipped(norms: jax.Array, bound: Any) -> jax.Array:
    """min(1, bound/norm), and 1 for a zero gradient. NaN if the norm or the bound is."""
    factors = jnp.where(norms > bound, ratio(bound, norms), 1)
    return jnp.where(jnp.isnan(norms) | jnp.isnan(bound), jnp.nan, factors)


def clip_quantile(q: float) -> NamedWeighting:
    """The weighting wᵢ = min(1, C/‖gᵢ‖)/B, with C the q-quantile of the norms of the batch.

    The quantile interpolates linearly, as `jnp.quantile` does. A share 1 − q of the gradients is shortened, whatever
    the scale of the loss. Masked examples do not count.

    Args:
        q: 0 ≤ q ≤ 1. With q = 1 the result is the mean.

    Raises:
        ValueError: q outside [0, 1].

    References:
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021, https://arxiv.org/abs/1905.03871.

    Examples:
        >>> import jax, cg_jax as cg
        >>> clipped = cg.weighted_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.clip_quantile(0.5))
        >>> round(float(clipped(0.0, jax.numpy.array([1.0, 4.0, 7.0]))[0]), 4)
        -3.0
    """
    q = _validate.number("q", q)
    if not 0 <= q <= 1:
        raise ValueError(f"Expected 0 <= q <= 1, got q={q}.")

    def weights(of: ExampleStatistics) -> jax.Array:
        return _clipped(of.norms, quantile(of.norms, of.mask, q)) / of.count

    return named("clip_quantile", weights, {"q": q})


def normalize() -> NamedWeighting:
    """The weighting wᵢ = c/‖gᵢ‖/B, with c the median norm of the batch: only directions count.

    A zero gradient has weight 1/B. Masked examples do not count.

    Examples:
        >>> import jax, cg_jax as cg
        >>> normalized = cg.weighted_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.normalize())
        >>> round(float(normalized(0.0, jax.numpy.array([1.0, 4.0, 7.0]))[0]), 4)
        -4.0
    """

    def weights(of: ExampleStatistics) -> jax.Array:
        return ratio(quantile(of.norms, of.mask, 0.5), of.norms) / of.count

    return named("normalize", weights)
