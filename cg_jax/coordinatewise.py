"""A coordinate-wise rule, such as a median, over the gradients of the examples of a batch."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from cg_jax import _validate, ghost
from cg_jax._loss import LossFn, each_devices_own
from cg_jax._per_batch import PerBatch
from cg_jax._types import PyTree
from cg_jax.rules import Rule, applied, require_rule


def coordinatewise_grads(
    loss_fn: LossFn, rule: Rule, *, max_bytes: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The function (params, batch, state=None) → rule(g₁, …, g_B) of each coordinate, gᵢ = ∇ loss_fn(·, batch[i]).

    With `winsorized_mean(c)`, for example, coordinate j of the result is the mean of g₁ⱼ … g_Bⱼ with the c smallest and
    the c largest moved to their neighbours. One forward and one backward pass give what went into every use of a
    parameter and what came back. The gradients of a block of coordinates are built from those, given to the rule and
    thrown away. So the memory is B × block, never B × parameters. A tensor whose gradients have no such factors, as of
    a convolution, is built for all examples if that fits max_bytes, and else in ranges of coordinates, with one more
    backward pass of its uses for each range.

    Under `jax.jit` with sharded arrays the result is that of the whole batch. Inside `jax.shard_map` or `jax.pmap` it
    is that of the device's own examples: an order statistic of all examples is no function of those of the devices.

    Args:
        loss_fn: As for `grad_moments`.
        rule: `mean`, `median`, `trimmed_mean`, `winsorized_mean`, or your own function [B, n] → [n] that treats all
            coordinates alike. It gets float32, or float64 if the parameters are. Blocks may contain coordinates that
            are not used. Pass the same function object each time, since a new one compiles again.
        max_bytes: The most bytes that the gradients of all examples take at once, for at least one coordinate. The
            default is as for `grad_moments`. Blocks are smaller where that is faster.
        has_aux: As for `grad_moments`.

    Returns:
        A jitted function of params, batch and state, which returns a pytree like params, in the dtypes of params, with
        None for integer leaves. With has_aux it returns (result, aux), where each leaf of aux is [B, ...]. A NaN among
        the B values of a coordinate makes that coordinate NaN under the rules of cg_jax.

    Raises:
        ValueError: max_bytes < 1, empty batch, leading axes that disagree, a loss that does not depend on params, a
            rule whose result is not one number for each coordinate, or a trim or clip ≥ B/2.
        TypeError: loss_fn or rule is not a function, rule is a factory such as `median` itself, loss_fn does not return
            a real scalar (with has_aux, a pair of it and aux), or a leaf of params is complex or not an array.

    References:
        Chatterjee, Coherent Gradients, 2020, https://arxiv.org/abs/2002.10657 (winsorized SGD).

    Examples:
        >>> import jax, cg_jax as cg
        >>> robust = cg.coordinatewise_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.median())
        >>> robust(jax.numpy.zeros(()), jax.numpy.array([1.0, 4.0, 70.0]))
        Array(-4., dtype=float32)
    """
    _validate.function("loss_fn", loss_fn)
    require_rule(rule)
    _validate.max_bytes(max_bytes)
    of_batch = _COORDINATEWISE.of(loss_fn, has_aux, rule=rule, max_bytes=max_bytes)

    def grads(params: PyTree, batch: PyTree, state: PyTree = None) -> Any:
        return of_batch(params, batch, state)

    return grads


def _coordinatewise_grads(
    loss_fn: LossFn, params: PyTree, batch: PyTree, rule: Rule, max_bytes: int | None, has_aux: bool
) -> tuple[PyTree, PyTree]:
    own = each_devices_own(loss_fn, params, batch, has_aux)
    of = ghost.one_pass(loss_fn, own, batch, None, max_bytes, has_aux, norms_inside=False)
    values = ghost.by_columns(of, lambda columns: applied(rule, columns), max_bytes)
    return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), values, of.kept), of.aux


def _specs(params: PyTree, rows: Any, **_: Any) -> tuple[PyTree, PartitionSpec]:
    return params, PartitionSpec(rows)


_COORDINATEWISE = PerBatch(_coordinatewise_grads, _specs)
