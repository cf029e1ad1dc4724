"""Materialised per-example gradients, the plain reference, and alignments, which need no such gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _compat, trees
from cg_jax._jaxprs import dtypes_in
from cg_jax._loss import LossFn, checked_pair, each_devices_own, require_dependence
from cg_jax._per_batch import PerBatch, direction_of, rows_specs
from cg_jax._types import PyTree
from cg_jax.sharding.explicit_axes import per_example_spec

# The most examples, and bytes, of gradients that `alignments` builds at once when it cannot use forward mode.
_CHUNK = 16
_CHUNK_BYTES = 2**26
# A dtype of this range may overflow in a derivative along a direction, where gradients do not.
_SHORT_RANGE = 5  # bits of the exponent


def losses_and_grads(
    loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False
) -> tuple[jax.Array, PyTree, PyTree]:
    """(losses [B], gradients like params of [B, *param], auxiliary values [B, ...]), by vmap(value_and_grad)."""
    params = each_devices_own(loss_fn, params, batch, has_aux)
    kept, rest = trees.partition(params)
    require_dependence(loss_fn, params, batch, has_aux)
    pair = checked_pair(loss_fn, rest, has_aux=has_aux)
    (losses, aux), grads = jax.vmap(jax.value_and_grad(pair, has_aux=True), in_axes=(None, 0))(kept, batch)
    return losses, grads, aux


def _per_example_grads(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool) -> tuple[PyTree, PyTree]:
    _, grads, aux = losses_and_grads(loss_fn, params, batch, has_aux)
    return grads, aux


def _grads_specs(params: PyTree, rows: Any, **_: Any) -> tuple[PyTree, PartitionSpec]:
    return jax.tree.map(functools.partial(per_example_spec, rows), params), PartitionSpec(rows)


_GRADS = PerBatch(_per_example_grads, _grads_specs)


def per_example_grads(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., PyTree]:
    """The function (params, batch, state=None) → gᵢ = ∇ loss_fn(params, batch[i]) for every example i, materialised.

    It needs memory for B × parameters. For sums and norms of the gradients use `grad_moments` or
    `per_example_sq_norms`, which never build this array.

    Args:
        loss_fn: As for `grad_moments`.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function of params (any pytree), batch (a pytree whose leaves share a leading axis B) and state, which
        returns a pytree like params of [B, *param] in the parameters' dtypes, with None for integer leaves. With
        has_aux it returns (gradients, aux), where each leaf of aux is [B, ...].

    Raises:
        ValueError: Empty batch, leading axes that disagree, or a loss that does not depend on params.
        TypeError: loss_fn is not a function or does not return a real scalar (with has_aux, a pair of it and aux), or a
            leaf of params is complex or not an array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.per_example_grads(lambda w, x: 0.5 * (w - x) ** 2)(jax.numpy.zeros(()), jax.numpy.array([1.0, 4.0, 7.0]))
        Array([-1., -4., -7.], dtype=float32)
    """
    of_batch = _GRADS.of(loss_fn, has_aux)

    def grads(params: PyTree, batch: PyTree, state: PyTree = None) -> PyTree:
        return of_batch(params, batch, state)

    return grads


def aligned(
    loss_fn: LossFn, params: PyTree, batch: PyTree, direction: PyTree, has_aux: bool = False
) -> tuple[jax.Array, PyTree]:
    """(gᵢ · direction [B] in the accumulator dtype, auxiliary values [B, ...])."""
    jaxpr = require_dependence(loss_fn, params, batch, has_aux)
    kept, rest = trees.partition(each_devices_own(loss_fn, params, batch, has_aux))
    kept = jax.tree.map(jnp.asarray, kept)
    along = _compat.vary_like(trees.partition(direction)[0], kept)
    pair = checked_pair(loss_fn, rest, has_aux=has_aux)
    pairs = lambda p: jax.vmap(pair, in_axes=(None, 0))(p, batch)  # noqa: E731
    if not _is_narrow(jaxpr, kept):
        tangents = jax.tree.map(lambda v, p: v.astype(p.dtype), along, kept)
        if _compat.has_forward_mode(lambda p: pairs(p)[0], (kept,), (tangents,)):
            _, products, aux = jax.jvp(pairs, (kept,), (tangents,), has_aux=True)
            return products, aux

    def of_example(example: PyTree) -> tuple[jax.Array, PyTree]:
        grad, aux = jax.grad(pair, has_aux=True)(kept, example)
        return trees.row_inner(jax.tree.map(lambda leaf: leaf[None], grad), along)[0], aux

    size = trees.total(jax.tree.map(lambda leaf: leaf.nbytes, kept))
    return jax.lax.map(of_example, batch, batch_size=max(1, min(_CHUNK, _CHUNK_BYTES // max(1, size))))


def _is_narrow(jaxpr: Any, kept: PyTree) -> bool:
    """Whether forward mode would round below the accumulator dtype, or leave the range of a dtype inside the loss.

    Forward mode takes the direction in the parameters' dtypes and returns the result in the loss's dtype.
    """
    ends = [*(leaf.dtype for leaf in jax.tree.leaves(kept)), *(out.aval.dtype for out in jaxpr.outvars)]
    inside = [dtype for dtype in dtypes_in(jaxpr) if jnp.issubdtype(dtype, jnp.floating)]
    return any(dtype != trees.accumulator_dtype(dtype) for dtype in ends) or any(
        jnp.finfo(dtype).nexp <= _SHORT_RANGE for dtype in inside
    )


def _alignments(
    loss_fn: LossFn, params: PyTree, batch: PyTree, direction: PyTree, has_aux: bool
) -> tuple[jax.Array, PyTree]:
    return aligned(loss_fn, params, batch, direction, has_aux)


_ALIGNMENTS = PerBatch(_alignments, rows_specs, {"direction": direction_of})


def alignments(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
    """The function (params, batch, direction, state=None) → aᵢ = gᵢ · v, [B], from ONE forward-mode pass along v.

    No per-example gradient is built. If v is the mean gradient ḡ, then Σ aᵢ / m = ‖ḡ‖². An example with small or
    negative aᵢ pulls against the others. The cost is about one more forward pass.

    The function falls back to reverse mode, a few examples at a time, if JAX rejects forward mode (a loss with a
    `jax.custom_vjp`), or if forward mode would round or overflow. That is so for parameters or a loss narrower than
    float32, and for float16 inside the loss, where a sum of products with v may leave the range.

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
