"""The mean gradients of groups of a batch, which feed a robust average."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _validate, explicit, trees
from cg_jax.per_example import LossFn, checked_loss, each_devices_own, require_dependence

PyTree = Any


def micro_batch_grads(loss_fn: LossFn, k: int) -> Callable[[PyTree, PyTree], PyTree]:
    """The function (params, batch) → the mean gradient of each of k groups of the batch, [k, *param].

    Row j is (k/B) Σ ∇ loss_fn(params, batch[i]) over the examples i of group j: rows j B/k to (j + 1) B/k of the batch.
    Feeds `stacked`. Pure; call it inside your own jitted step. Where the batch is divided over devices, call it inside
    `jax.shard_map`: left to the compiler, every device would gather the batch and compute all groups.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        k: Number of groups, ≥ 1, a divisor of the batch size.

    Returns:
        A function of params and batch (a pytree whose leaves share a leading axis B); None for integer leaves.

    Raises:
        ValueError: k < 1, k that does not divide B, an empty batch, leading axes that disagree, or a loss that does not
            depend on params.
        TypeError: loss_fn does not return a real scalar.

    Examples:
        >>> import jax, cg_jax as cg
        >>> def loss_fn(w, x):
        ...     return 0.5 * (w - x) ** 2
        >>> cg.micro_batch_grads(loss_fn, 2)(jax.numpy.zeros(()), jax.numpy.array([1.0, 3.0, 7.0, 9.0]))
        Array([-2., -8.], dtype=float32)
    """
    k = _validate.at_least("k", k, 1)

    def grads(params: PyTree, batch: PyTree) -> PyTree:
        params, batch, size = _validate.arguments(params, batch)
        _validate.divides("k", k, "the batch size B", size)
        return explicit.relaxed(of_groups, _lie, params, jax.tree.map(jnp.asarray, batch))

    def of_groups(params: PyTree, batch: PyTree) -> PyTree:
        size = jax.tree.leaves(batch)[0].shape[0]
        require_dependence(loss_fn, params, batch)
        kept, rest = trees.partition(each_devices_own(loss_fn, params, batch))
        loss = checked_loss(loss_fn, rest)
        groups = jax.tree.map(lambda leaf: leaf.reshape(k, size // k, *leaf.shape[1:]), batch)
        mean_loss = lambda p, group: jax.vmap(loss, in_axes=(None, 0))(p, group).mean()  # noqa: E731
        return jax.vmap(jax.grad(mean_loss), in_axes=(None, 0))(kept, groups)

    return grads


def _lie(params: PyTree, rows: Any) -> PyTree:
    """As the parameters, whatever the examples are divided over."""
    del rows
    return jax.tree.map(functools.partial(explicit.behind, None), params)
