"""Per-example gradients, materialised: the plain reference. And alignments, which need none."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _compat, _validate, explicit, trees

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# Examples whose gradients may exist at the same time where `alignments` cannot run forward-mode.
_CHUNK = 16


def checked_loss(loss_fn: LossFn, rest: PyTree, what: str = "the loss of ONE example (no batch axis)") -> LossFn:
    """loss_fn of the differentiable leaves alone, `rest` put back; TypeError when traced if it returns no scalar."""

    def loss(kept: PyTree, example: PyTree) -> jax.Array:
        out = jax.tree.map(jnp.asarray, loss_fn(trees.combine(kept, rest), example))
        _validate.scalar_loss(out, what)
        return out

    return loss


def example_of(batch: PyTree) -> PyTree:
    """The shape and dtype of one example of a batch."""
    return jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[0], batch), batch)


def require_dependence(loss_fn: LossFn, params: PyTree, batch: PyTree) -> None:
    """ValueError unless loss_fn reads a differentiable leaf of params on the way to its result."""
    kept, rest = trees.partition(params)
    require_dependence_on(checked_loss(loss_fn, rest), kept, example_of(batch))


def require_dependence_on(loss: LossFn, kept: PyTree, data: PyTree) -> None:
    """The same of a loss of differentiable leaves and whatever it takes beside them."""
    _validate.something_to_differentiate(kept)
    jaxpr = jax.make_jaxpr(loss)(kept, data).jaxpr
    reached = set(jaxpr.invars[: len(jax.tree.leaves(kept))])
    for eqn in jaxpr.eqns:
        if any(not _compat.is_literal(atom) and atom in reached for atom in eqn.invars):
            reached.update(eqn.outvars)
    (out,) = jaxpr.outvars
    _validate.dependence(not _compat.is_literal(out) and out in reached)


def each_devices_own(loss_fn: LossFn, params: PyTree, batch: PyTree) -> PyTree:
    """Params that vary over the axes of an enclosing shard_map that the batch, or the loss, varies over.

    Gradients with respect to what is the same on all devices are summed over them. An axis over which the loss is the
    same, as after a psum over the parts of a layer, is left alone.
    """
    axes = _compat.varying_axes(batch)
    if _compat.varying_axes(params) - axes:
        kept, rest = trees.partition(params)
        axes |= _compat.varying_axes(jax.eval_shape(checked_loss(loss_fn, rest), kept, example_of(batch)))
    return _compat.vary(params, axes)


def losses_and_grads(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
    """(losses [B], gradients like params of [B, *param]), by vmap(value_and_grad)."""
    params = each_devices_own(loss_fn, params, batch)
    kept, rest = trees.partition(params)
    require_dependence(loss_fn, params, batch)
    return jax.vmap(jax.value_and_grad(checked_loss(loss_fn, rest)), in_axes=(None, 0))(kept, batch)


@functools.partial(jax.jit, static_argnums=0)
def _grads(loss_fn: LossFn, params: PyTree, batch: PyTree) -> PyTree:
    return losses_and_grads(loss_fn, params, batch)[1]


def per_example_grads(loss_fn: LossFn) -> Callable[[PyTree, PyTree], PyTree]:
    """The function (params, batch) → gᵢ = ∇ loss_fn(params, batch[i]) for every example i, materialised.

    Takes memory for B × parameters; for statistics of the gradients use `grad_moments` or `per_example_sq_norms`, which
    never build this.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example. Compiled once for each function object:
            pass the same one again, for a fresh lambda compiles again.

    Returns:
        A jitted function of params (any pytree) and batch (a pytree whose leaves share a leading axis B), which returns
        a pytree like params of [B, *param] in the parameters' dtypes; None for integer leaves.

    Raises:
        ValueError: Empty batch, leading axes that disagree, or a loss that does not depend on params.
        TypeError: loss_fn is no function or does not return a real scalar, or a leaf of params is complex or no array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.per_example_grads(lambda w, x: 0.5 * (w - x) ** 2)(jax.numpy.zeros(()), jax.numpy.array([1.0, 4.0, 7.0]))
        Array([-1., -4., -7.], dtype=float32)
    """
    _validate.function("loss_fn", loss_fn)

    def grads(params: PyTree, batch: PyTree) -> PyTree:
        params, batch, _ = _validate.arguments(params, batch)
        return explicit.relaxed(functools.partial(_grads, loss_fn), _grads_lie, params, batch)

    return grads


def _grads_lie(params: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(functools.partial(explicit.behind, rows), params)


@functools.partial(jax.jit, static_argnums=0)
def _alignments(loss_fn: LossFn, params: PyTree, batch: PyTree, direction: PyTree) -> jax.Array:
    require_dependence(loss_fn, params, batch)
    params = each_devices_own(loss_fn, params, batch)
    kept, rest = trees.partition(params)
    along, _ = trees.partition(direction)
    along = _compat.vary_like(along, kept)
    loss = checked_loss(loss_fn, rest)
    # Not result_type: float64 for a weakly typed float32 array, with x64.
    along = jax.tree.map(lambda v, p: v.astype(jnp.asarray(p).dtype), along, kept)
    losses = lambda p: jax.vmap(loss, in_axes=(None, 0))(p, batch)  # noqa: E731
    if _compat.has_forward_mode(losses, (kept,), (along,)):
        return jax.jvp(losses, (kept,), (along,))[1]

    def alignment(example: PyTree) -> jax.Array:
        grad = jax.tree.map(lambda leaf: leaf[None], jax.grad(loss)(kept, example))
        return trees.row_inner(grad, along)[0]

    return jax.lax.map(alignment, batch, batch_size=_CHUNK)


def alignments(loss_fn: LossFn) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
    """The function (params, batch, direction) → aᵢ = gᵢ · v, [B], from ONE forward-mode pass along v.

    No per-example gradient is built. With v the mean gradient ḡ, Σ aᵢ / m = ‖ḡ‖²: an example with small or negative aᵢ
    pulls against the others. The price is about one forward pass more. A loss that holds a `jax.custom_vjp`, which
    forward mode refuses, is done by reverse mode, a few examples at a time.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.

    Returns:
        A jitted function of params, batch and direction (like params; integer leaves are ignored and may be None).

    Raises:
        ValueError: Empty batch, leading axes that disagree, a direction of other structure or shapes than params, or a
            loss that does not depend on params.
        TypeError: loss_fn is no function or does not return a real scalar, or a leaf of params is complex or no array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.alignments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]), 2.0)
        Array([ -2.,  -8., -14.], dtype=float32)
    """
    _validate.function("loss_fn", loss_fn)

    def aligned(params: PyTree, batch: PyTree, direction: PyTree) -> jax.Array:
        params, batch, _ = _validate.arguments(params, batch)
        direction = _validate.arrays("direction", direction)
        kept, rest = trees.partition(params)
        along = trees.partition(direction)[0] if jax.tree.leaves(rest) else direction
        _validate.same_structure("direction", along, "params", kept)
        along = jax.tree.map(jnp.asarray, along)
        return explicit.relaxed(
            functools.partial(_alignments, loss_fn), lambda _, rows: PartitionSpec(rows), params, batch, along
        )

    return aligned
