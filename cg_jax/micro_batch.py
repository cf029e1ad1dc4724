"""The mean gradients of groups of a batch, which feed a robust average."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, explicit, trees
from cg_jax._loss import LossFn, each_devices_own, require_dependence

PyTree = Any


def micro_batch_grads(
    loss_fn: Callable[[PyTree, PyTree], Any], k: int, *, batch_loss: bool = False, has_aux: bool = False
) -> Callable[[PyTree, PyTree], PyTree]:
    """The function (params, batch) → the mean gradient of each of k groups of the batch, [k, *param].

    Row j is (k/B) Σ ∇ loss_fn(params, batch[i]) over the examples i of group j: rows j B/k to (j + 1) B/k of the batch.
    With batch_loss=True it is ∇ loss_fn(params, those rows), of a loss that takes a whole group and returns its mean.
    Feeds `stacked`. Pure; call it inside your own jitted step. Where the batch is divided over devices, call it inside
    `jax.shard_map`: left to the compiler, every device would gather the batch and compute all groups.

    A loss of one example cannot use statistics of a batch: BatchNorm in training mode would normalise every example by
    itself. Use batch_loss=True, where it normalises over a group, and has_aux=True for its new running statistics.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        k: Number of groups, ≥ 1, a divisor of the batch size.
        batch_loss: loss_fn(params, group) → scalar, the mean loss of a group, a batch of B/k examples.
        has_aux: loss_fn returns (scalar, aux), aux any pytree of arrays.

    Returns:
        A function of params and batch (a pytree whose leaves share a leading axis B), which returns gradients like
        params of [k, *param], None for integer leaves. With has_aux (gradients, aux), as `jax.grad`: each leaf of aux
        has a leading axis B, or with batch_loss k.

    Raises:
        ValueError: k < 1, k that does not divide B, an empty batch, leading axes that disagree, or a loss that does not
            depend on params.
        TypeError: loss_fn is no function, does not return a real scalar or with has_aux a pair of it and aux, or a leaf
            of params is complex or no array.

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
    _validate.function("loss_fn", loss_fn)
    of_group = _mean_loss(loss_fn, batch_loss, has_aux)

    def grads(params: PyTree, batch: PyTree) -> PyTree:
        params, batch, size = _validate.arguments(params, batch)
        _validate.divides("k", k, "the batch size B", size)
        specs = functools.partial(_specs, batch_loss=batch_loss)
        rows, aux = explicit.relaxed(of_groups, specs, params, jax.tree.map(jnp.asarray, batch))
        return (rows, aux) if has_aux else rows

    def of_groups(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        groups = jax.tree.map(lambda leaf: leaf.reshape(k, leaf.shape[0] // k, *leaf.shape[1:]), batch)
        value: LossFn = lambda params, group: of_group(params, group)[0]  # noqa: E731
        require_dependence(value, params, groups)
        kept, rest = trees.partition(each_devices_own(value, params, groups))
        loss = lambda kept, group: of_group(trees.combine(kept, rest), group)  # noqa: E731
        rows, aux = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0))(kept, groups)
        if not batch_loss:
            aux = jax.tree.map(lambda leaf: leaf.reshape(k * leaf.shape[1], *leaf.shape[2:]), aux)
        return rows, aux

    return grads


def _mean_loss(
    loss_fn: Callable[[PyTree, PyTree], Any], batch_loss: bool, has_aux: bool
) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """(params, group) → (mean loss, aux; None without)."""
    what = "the mean loss of a batch" if batch_loss else "the loss of ONE example (else pass batch_loss=True)"

    def checked(params: PyTree, data: PyTree) -> tuple[jax.Array, PyTree]:
        out = loss_fn(params, data)
        pair = isinstance(out, tuple) and len(out) == 2
        if has_aux and not pair:
            raise TypeError("Expected loss_fn to return a pair (loss, aux), got another result; or leave out has_aux.")
        loss, aux = jax.tree.map(jnp.asarray, out if has_aux else (out, None))
        _validate.scalar_loss(loss, f"{what} (a pair (loss, aux) needs has_aux=True)" if pair and not has_aux else what)
        return loss, aux

    def mean(params: PyTree, group: PyTree) -> tuple[jax.Array, PyTree]:
        losses, aux = jax.vmap(checked, in_axes=(None, 0))(params, group)
        return losses.mean(), aux

    return checked if batch_loss else mean


def _specs(params: PyTree, rows: Any, batch_loss: bool) -> tuple[PyTree, PartitionSpec]:
    """As the parameters, whatever the examples are divided over; what is of single examples, as they are."""
    return jax.tree.map(functools.partial(explicit.behind, None), params), PartitionSpec(None if batch_loss else rows)
