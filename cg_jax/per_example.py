"""Materialised per-example gradients, the plain reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from cg_jax._loss import LossFn
from cg_jax._per_batch import PerBatch
from cg_jax._types import PyTree
from cg_jax.gradients import losses_and_grads
from cg_jax.sharding.explicit_axes import per_example_spec


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
