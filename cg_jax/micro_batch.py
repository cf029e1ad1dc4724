"""Mean gradients of groups of a batch, the input of a robust average."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, trees
from cg_jax._loss import LossFn, checked_pair, each_devices_own, example_of, require_dependence_on
from cg_jax._per_batch import PerBatch
from cg_jax._types import PyTree
from cg_jax.sharding.explicit_axes import per_example_spec


def micro_batch_grads(
    loss_fn: LossFn, k: int, *, batch_loss: bool = False, has_aux: bool = False
) -> Callable[..., PyTree]:
    """The function (params, batch, state=None) → the mean gradient of each of k groups of the batch, [k, *param].

    Row j is (k/B) Σ ∇ loss_fn(params, batch[i]) over the examples i of group j: rows j B/k to (j + 1) B/k of the batch.
    With batch_loss=True it is ∇ loss_fn(params, those rows), where loss_fn takes a whole group and returns its mean.
    The result is the input of `stacked`. Call the function inside your own jitted step. If the batch is sharded over
    devices, call it inside `jax.shard_map`. Otherwise every device gathers the batch and computes all groups.

    A loss of one example cannot use batch statistics: BatchNorm in training mode would normalise every example by
    itself. Use batch_loss=True to normalise over a group, and has_aux=True for the new running averages.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        k: Number of groups, ≥ 1. It must divide the batch size.
        batch_loss: loss_fn(params, group) → scalar, the mean loss of a group, a batch of B/k examples.
        has_aux: loss_fn returns (scalar, aux), where aux is any pytree of arrays.

    Returns:
        A function of params, batch (a pytree whose leaves share a leading axis B) and state (as for
        `grad_moments`), which returns gradients like params, [k, *param], with None for integer leaves. With
        has_aux it returns (gradients, aux), as `jax.grad` does. Each leaf of aux has a leading axis B, or k with
        batch_loss.

    Raises:
        ValueError: k < 1, a k that does not divide B, an empty batch, leading axes that disagree, or a loss that does
            not depend on params.
        TypeError: loss_fn is not a function or does not return a real scalar (with has_aux, a pair of it and aux), or a
            leaf of params is complex or not an array.

    Examples:
        >>> import jax, cg_jax as cg
        >>> def loss_fn(w, x):
        ...     return 0.5 * (w - x) ** 2
        >>> batch = jax.numpy.array([1.0, 3.0, 7.0, 9.0])
        >>> cg.micro_batch_grads(loss_fn, 2)(jax.numpy.zeros(()), batch)
        Array([-2., -8.], dtype=float32)
        >>> def mean_loss(w, xs):
        ...     return loss_fn(w, xs).mean()
        >>> cg.micro_batch_grads(mean_loss, 2, batch_loss=True)(jax.numpy.zeros(()), batch)
        Array([-2., -8.], dtype=float32)
    """
    k = _validate.at_least("k", k, 1)
    of_batch = _GRADS.of(loss_fn, has_aux, k=k, batch_loss=batch_loss)

    def grads(params: PyTree, batch: PyTree, state: PyTree = None) -> PyTree:
        return of_batch(params, batch, state)

    return grads


def _micro_batch_grads(
    loss_fn: LossFn, params: PyTree, batch: PyTree, k: int, batch_loss: bool, has_aux: bool
) -> tuple[PyTree, PyTree]:
    size = jax.tree.leaves(batch)[0].shape[0]
    _validate.divides("k", k, "the batch size B", size)
    groups = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(k, size // k, *leaf.shape[1:]), batch)
    kept, rest = trees.partition(params)
    loss = _mean_loss(loss_fn, rest, batch_loss, has_aux)
    require_dependence_on(lambda kept, group: loss(kept, group)[0], kept, example_of(groups))
    kept, _ = trees.partition(each_devices_own(lambda p, group: loss(trees.partition(p)[0], group)[0], params, groups))
    rows, aux = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0))(kept, groups)
    if not batch_loss:
        aux = jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), aux)
    return rows, aux


def _mean_loss(
    loss_fn: LossFn, rest: PyTree, batch_loss: bool, has_aux: bool
) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """The function (params, group) → (mean loss, aux or None)."""
    what = "the mean loss of a batch" if batch_loss else "the loss of ONE example (else pass batch_loss=True)"
    pair = checked_pair(loss_fn, rest, what, has_aux)

    def mean(params: PyTree, group: PyTree) -> tuple[jax.Array, PyTree]:
        losses, aux = jax.vmap(pair, in_axes=(None, 0))(params, group)
        return losses.mean(), aux

    return pair if batch_loss else mean


def _specs(params: PyTree, rows: Any, batch_loss: bool, **_: Any) -> tuple[PyTree, PartitionSpec]:
    """Specs: gradients are sharded like the parameters, and aux of single examples like the examples."""
    return jax.tree.map(functools.partial(per_example_spec, None), params), PartitionSpec(None if batch_loss else rows)


_GRADS = PerBatch(_micro_batch_grads, _specs, jitted=False)
