"""What a loss_fn must be: one real scalar that depends on params, whatever kind of callable gives it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat, _validate, trees

PyTree = Any
LossFn = Callable[..., Any]

ONE_EXAMPLE = "the loss of ONE example (no batch axis)"


def with_state(loss_fn: LossFn, state: PyTree) -> LossFn:
    """loss_fn of params and example alone, given `state` as its third argument unless that is None."""
    return loss_fn if state is None else lambda params, example: loss_fn(params, example, state)


def checked_pair(
    loss_fn: LossFn, rest: PyTree, what: str = ONE_EXAMPLE, has_aux: bool = False
) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """(loss, auxiliary values or None) by the differentiable leaves alone, `rest` put back.

    TypeError, when traced, unless the loss is one scalar.
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
    """The same without auxiliary values: loss(kept, example) → scalar."""
    pair = checked_pair(loss_fn, rest, what, has_aux)
    return lambda kept, example: pair(kept, example)[0]


def example_of(batch: PyTree) -> PyTree:
    """The shape and dtype of one example of a batch."""
    return jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[0], batch), batch)


def has_empty(tree: PyTree) -> bool:
    """Whether any array has no entry. JAX then leaves out operations, on the way from a parameter too."""
    return any(np.size(leaf) == 0 for leaf in jax.tree.leaves(tree))


def require_dependence(loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False) -> Any:
    """The jaxpr of loss_fn; ValueError unless it reads a differentiable leaf of params on the way to its result."""
    kept, rest = trees.partition(params)
    return require_dependence_on(checked_loss(loss_fn, rest, has_aux=has_aux), kept, example_of(batch))


def require_dependence_on(loss: LossFn, kept: PyTree, data: PyTree) -> Any:
    """The same of a loss of differentiable leaves and whatever it takes beside them."""
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
    """Params that vary over the axes of an enclosing shard_map that the batch, or the loss, varies over.

    Gradients with respect to what is the same on all devices are summed over them. An axis over which the loss is the
    same, as after a psum over the parts of a layer, is left alone.
    """
    axes = _compat.varying_axes(batch)
    # Another leaf of params may be each device's own, or what loss_fn captured.
    if _compat.tracked_axes() - axes:
        kept, rest = trees.partition(params)
        loss = jax.eval_shape(checked_loss(loss_fn, rest, has_aux=has_aux), kept, example_of(batch))
        axes |= _compat.varying_axes(loss)
    return _compat.vary(params, axes)
