"""Optax transformations that apply any rule (`cg_jax.rules`) to k gradients.

The transformations differ in the source of the k gradients: all at once (`stacked`), from k calls (`consecutive`), or
from the last k calls (`rolling`). Weight decay and momentum compose with them in `optax.chain`. The papers added the
decay to every gradient before the median and used no momentum:
`optax.chain(optax.add_decayed_weights(c), cg.rm3(), optax.sgd(lr))`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from cg_jax import _compat, _validate, incoming
from cg_jax import slots as memory
from cg_jax._types import PyTree
from cg_jax.rules import Rule, applied, mean, median, require_rule

_STACK = "stack k gradients, as cg_jax.micro_batch_grads(loss_fn, k) does, or leave out stacked for one"


def _stacked(rule: Rule, k: int | None, partial: bool, name: str) -> aggregating.Aggregator:
    require_rule(rule)

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, Any]:
        del extra_args
        if not partial:
            incoming.require_unmasked(updates, name)
        updates = incoming.arrays(updates)
        if params is not None:
            incoming.require_shapes(updates, params, _STACK, stacked=True)
        if jax.tree.leaves(updates) or not partial:
            rows = _validate.leading_axis("updates", updates)
            if k is not None and rows != k:
                raise ValueError(f"Expected updates of shape [k, *shape] with k={k}, got a leading axis of {rows}.")
        incoming.require_floating(updates)
        out = jax.tree.map(lambda values: applied(rule, values), updates)
        return out if params is None else incoming.with_zeros(out, params), state

    return aggregating.Aggregator(optax.init_empty_state, update_fn)


def stacked(rule: Rule, *, partial: bool = False) -> aggregating.Aggregator:
    """A transformation that turns updates [k, *shape] into rule(updates), [*shape].

    The state is empty. Put it first in `optax.chain`. Only stateless transformations mapped over k may come before it.
    Wrappers that accumulate (`optax.MultiSteps`, `optax.apply_if_finite`) wrap the transformations after it. Put it
    before `optax.masked` and `optax.partition` (`multi_transform`), not inside them: leaves that they hide from it
    would stay [k, *shape]. It also works as the aggregator of `optax.experimental.aggregating.process`.
    `micro_batch_grads` computes such updates.

    If `params` is passed to `update`, shapes are compared with it. `stacked` cannot see the transformations before it,
    or an optimizer that lacks it. `checked` detects both: k gradients that reach an optimizer without `stacked`, and a
    transformation with a state before `stacked`.

    Args:
        rule: A function [k, *shape] → [*shape], such as `cg_jax.median()`.
        partial: Allow masked leaves: for use inside `optax.partition` where another `stacked` takes the other leaves.

    Returns:
        An `optax.experimental.aggregating.Aggregator`, which is a `GradientTransformationExtraArgs`. None stays
        None. If `params` has an integer leaf there, None becomes zero so that `optax.apply_updates` can add it.

    Raises:
        TypeError: rule is not a function of k values.
        ValueError: At an update: leading axes disagree or are missing, updates are not [k, *shape] of `params`, are
            masked (unless partial) or are not floating, or the rule returns another shape.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> optimizer = optax.chain(cg.stacked(cg.median()), optax.sgd(0.1))
        >>> updates, _ = optimizer.update(jax.numpy.array([[1.0], [4.0], [70.0]]), optimizer.init(jax.numpy.zeros(1)))
        >>> updates
        Array([-0.4], dtype=float32)
    """
    return _stacked(rule, None, partial, "stacked")


def median_of_k(k: int) -> aggregating.Aggregator:
    """The coordinate-wise median of k gradients [k, *shape]: `stacked(median())` that checks k.

    Args:
        k: Number of gradients, ≥ 1.

    Raises:
        ValueError: k < 1. At an update: a leading axis other than k, and the errors of `stacked`.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.

    Examples:
        >>> import jax, cg_jax as cg
        >>> m5 = cg.median_of_k(5)
        >>> m5.update(jax.numpy.array([1.0, 2.0, 3.0, 80.0, 90.0]), m5.init(0.0))[0]
        Array(3., dtype=float32)
    """
    k = _validate.at_least("k", k, 1)
    return _stacked(median(), k, False, f"median_of_k({k})")


class ConsecutiveState(NamedTuple):
    """State of `consecutive`."""

    count: jax.Array  # gradients stored since the last step, int32 in 0..k−1
    grads: PyTree  # the stored gradients, [k − 1, *shape]
    inner_state: Any  # state of the optimizer


def consecutive(
    rule: Rule, k: int, optimizer: optax.GradientTransformation, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """A transformation that takes a step of `optimizer` on rule(the last k gradients) at every k-th call.

    At all other calls the updates are zero and the optimizer's state does not change. So k calls are one step, and the
    learning-rate schedule counts such steps. The transformation takes raw gradients. In a chain, only stateless
    transformations may come before it. The optimizer goes inside it, not around or before it (`checked` rejects that
    order).

    Args:
        rule: A function [k, *shape] → [*shape], such as `cg_jax.median()`.
        k: Calls for one step, ≥ 1.
        optimizer: Any optax transformation.
        accumulator_dtype: The dtype of the stored gradients; by default float32, or float64 for float64 parameters. A
            narrower one, such as bfloat16, saves memory and rounds.

    Returns:
        A `GradientTransformationExtraArgs`. Its state is `ConsecutiveState`: k − 1 stored gradients, sharded like the
        parameters, and the optimizer's state. The aggregate has the gradients' dtype. None, for a leaf without a
        gradient, stays None. If `params` has an integer leaf there, None becomes zero so that `optax.apply_updates`
        can add it.

    Raises:
        TypeError: rule is not a function of k values, optimizer is not an optax transformation, or accumulator_dtype is
            not a floating dtype.
        ValueError: k < 1. At an update: a structure or shapes other than at init or in `params` (k stacked gradients),
            a dtype wider than the slots', or a rule that returns another shape.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> optimizer = cg.consecutive(cg.median(), 3, optax.sgd(1.0))
        >>> state = optimizer.init(0.0)
        >>> for gradient in (1.0, 70.0, 4.0):
        ...     updates, state = optimizer.update(jax.numpy.asarray(gradient), state)
        ...     print(float(updates) + 0.0)
        0.0
        0.0
        -4.0
    """
    k = _validate.at_least("k", k, 1)
    require_rule(rule)
    _validate.transformation("optimizer", optimizer)
    _validate.floating("accumulator_dtype", accumulator_dtype)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> ConsecutiveState:
        grads = memory.zeros(params, (k - 1,), accumulator_dtype)
        return ConsecutiveState(jnp.zeros((), jnp.int32), grads, inner.init(params))

    def update_fn(
        updates: PyTree, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[PyTree, ConsecutiveState]:
        updates = incoming.arrays(updates)
        rows = jax.eval_shape(lambda grads: jax.tree.map(lambda slots: slots.sum(0), grads), state.grads)
        memory.require_fitting(updates, rows, params, accumulator_dtype is not None)

        def step(updates: PyTree, state: ConsecutiveState) -> tuple[PyTree, Any]:
            direction = memory.zeros_for_none(memory.aggregate(rule, updates, state.grads), rows)
            direction = direction if params is None else incoming.with_zeros(direction, params)
            out, inner_state = inner.update(direction, state.inner_state, params, **extra_args)
            return memory.none_again(out, updates, rows), memory.in_the_dtypes_of(state.inner_state, inner_state)

        def wait(updates: PyTree, state: ConsecutiveState) -> tuple[PyTree, Any]:
            like, _ = jax.eval_shape(step, updates, state)
            return _compat.vary_like(optax.tree.zeros_like(like), like), state.inner_state

        if k == 1:
            steps, inner_state = step(updates, state)
            return steps, state._replace(inner_state=inner_state)
        steps, inner_state = jax.lax.cond(state.count == k - 1, step, wait, updates, state)
        grads = memory.write(updates, state.grads, state.count % (k - 1), after=steps)
        return steps, ConsecutiveState((state.count + 1) % k, grads, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RollingState(NamedTuple):
    """State of `rolling`."""

    num_seen: jax.Array  # gradients stored, int32, at most k − 1
    grads: tuple[PyTree, ...]  # the last k − 1 gradients, oldest first, each [*shape]


def rolling(rule: Rule, k: int, *, accumulator_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """A transformation that replaces each gradient by rule(this gradient and the k − 1 before it), at every call.

    During warm-up, before k gradients have arrived, the gradient passes through unchanged. (The papers' code waits for
    k instead.) The rule must not depend on the order of its values. The transformation takes raw gradients. In a chain,
    only stateless transformations may come before it, and the optimizer comes after it (`checked` rejects the other
    order).

    Args:
        rule: A function [k, *shape] → [*shape], such as `cg_jax.median()`.
        k: Number of gradients that the rule sees, ≥ 1.
        accumulator_dtype: The dtype of the stored gradients; by default float32, or float64 for float64 parameters. A
            narrower one, such as bfloat16, saves memory and rounds.

    Returns:
        A `GradientTransformationExtraArgs` to chain before an optimizer. Its state is `RollingState`: k − 1 stored
        gradients, sharded like the parameters. Their memory is reused if the state is donated. The result has the
        gradients' dtype. None, for a leaf without a gradient, is handled as in `consecutive`.

    Raises:
        TypeError: rule is not a function of k values, or accumulator_dtype is not a floating dtype.
        ValueError: k < 1. At an update: a structure or shapes other than at init or in `params` (k stacked gradients),
            a dtype wider than the slots', or a rule that returns another shape.

    Examples:
        >>> import jax, cg_jax as cg
        >>> transform = cg.rolling(cg.median(), 3)
        >>> state = transform.init(0.0)
        >>> for gradient in (1.0, 70.0, 4.0, 5.0):
        ...     updates, state = transform.update(jax.numpy.asarray(gradient), state)
        ...     print(float(updates))
        1.0
        70.0
        4.0
        5.0
    """
    k = _validate.at_least("k", k, 1)
    require_rule(rule)
    _validate.floating("accumulator_dtype", accumulator_dtype)

    def init_fn(params: PyTree) -> RollingState:
        grads = tuple(memory.zeros(params, (), accumulator_dtype) for _ in range(k - 1))
        return RollingState(jnp.zeros((), jnp.int32), grads)

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, RollingState]:
        del extra_args
        updates = incoming.arrays(updates)
        memory.require_fitting(updates, state.grads[0] if k > 1 else updates, params, accumulator_dtype is not None)

        if k == 1:
            out, grads = jax.tree.map(lambda update: applied(rule, update[None]), updates), ()
        else:
            out, grads = memory.roll(rule, updates, state.grads, state.num_seen >= k - 1)
        out = out if params is None else incoming.with_zeros(out, params)
        return out, RollingState(jnp.minimum(state.num_seen + 1, k - 1), grads)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def m3(
    optimizer: optax.GradientTransformation, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """M3: one step of `optimizer` on the coordinate-wise median of every 3 mini-batch gradients.

    `consecutive(median(), 3, optimizer)`: three calls make one step.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return consecutive(median(), 3, optimizer, accumulator_dtype=accumulator_dtype)


def rm3(*, accumulator_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """RM3: the coordinate-wise median of the last 3 mini-batch gradients, at every call; `rolling(median(), 3)`.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return rolling(median(), 3, accumulator_dtype=accumulator_dtype)


def ra3(*, accumulator_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """RA3: the mean of the last 3 mini-batch gradients, at every call, the control of RM3; `rolling(mean(), 3)`.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return rolling(mean(), 3, accumulator_dtype=accumulator_dtype)
