"""Checks of loss_fn: any callable that returns one real scalar that depends on params."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat, _validate, trees
from cg_jax._types import PyTree

LossFn = Callable[..., Any]

ONE_EXAMPLE = "the loss of ONE example (no batch axis)"


def with_state(loss_fn: LossFn, state: PyTree) -> LossFn:
    """loss_fn as a function of params and example. If `state` is not None, pass it as the third argument."""
    return loss_fn if state is None else lambda params, example: loss_fn(params, example, state)


def checked_pair(
    loss_fn: LossFn, rest: PyTree, what: str = ONE_EXAMPLE, has_aux: bool = False
) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """The function (differentiable leaves, example) → (loss, auxiliary values or None). It adds `rest` back.

    Raises TypeError when traced unless the loss is one scalar.
    """

    def pair(kept: PyTree, example: PyTree) -> tuple[jax.Array, PyTree]:
        out = loss_fn(trees.combine(kept, rest), example)
        if has_aux:
            _validate.pair(out)
        loss, aux = jax.tree.map(jnp.asarray, out if has_aux else (out, None))
        if not has_aux:
            _validate.no_pair(loss, what)
        _validate.scalar_loss(loss, what)
        return loss, aux

    return pair


def checked_loss(loss_fn: LossFn, rest: PyTree, what: str = ONE_EXAMPLE, has_aux: bool = False) -> LossFn:
    """Like `checked_pair`, without auxiliary values: loss(kept, example) → scalar."""
    pair = checked_pair(loss_fn, rest, what, has_aux)
    return lambda kept, example: pair(kept, example)[0]


def example_of(batch: PyTree) -> PyTree:
    """The shape and dtype of one example of a batch."""
    return jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[0], batch), batch)


def has_empty(tree: PyTree) -> bool:
    """Whether any array is empty. JAX then drops operations, including those between a parameter and the loss."""
    return any(np.size(leaf) == 0 for leaf in jax.tree.leaves(tree))


def require_dependence(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False) -> Any:
    """The jaxpr of loss_fn. ValueError unless its result depends on a differentiable leaf of params."""
    kept, rest = trees.partition(params)
    return require_dependence_on(checked_loss(loss_fn, rest, has_aux=has_aux), kept, example_of(batch))


def require_dependence_on(loss: LossFn, kept: PyTree, data: PyTree) -> Any:
    """Like `require_dependence`, for a loss of the differentiable leaves and other data."""
    _validate.something_to_differentiate(kept)
    jaxpr = jax.make_jaxpr(loss)(kept, data).jaxpr
    reached = set(jaxpr.invars[: len(jax.tree.leaves(kept))])
    for eqn in jaxpr.eqns:
        if any(not _compat.is_literal(atom) and atom in reached for atom in eqn.invars):
            reached.update(eqn.outvars)
    (out,) = jaxpr.outvars
    _validate.dependence((not _compat.is_literal(out) and out in reached) or has_empty((kept, data)))
    return jaxpr


def each_devices_own(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False) -> PyTree:
    """Mark params as varying over the axes of an enclosing shard_map that the batch or the loss varies over.

    JAX sums gradients with respect to replicated values over the devices. An axis over which the loss is replicated,
    for example after a psum over the shards of a layer, is not changed.
    """
    axes = _compat.varying_axes(batch)
    # Another leaf of params, or a value that loss_fn captured, may differ between devices.
    if _compat.tracked_axes() - axes:
        kept, rest = trees.partition(params)
        loss = jax.eval_shape(checked_loss(loss_fn, rest, has_aux=has_aux), kept, example_of(batch))
        axes |= _compat.varying_axes(loss)
    return _compat.vary(params, axes)
