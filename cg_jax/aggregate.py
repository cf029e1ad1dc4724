"""Optax transformations: any rule (`cg_jax.rules`) on any source of k gradients.

The source is what differs: k gradients at once (`stacked`), k calls (`consecutive`), or the last k calls (`rolling`).
Weight decay and momentum compose outside, with `optax.chain`. The papers added the decay to every gradient before the
median, and used no momentum: `optax.chain(optax.add_decayed_weights(c), cg.rm3(), optax.sgd(lr))`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from cg_jax import _validate, trees
from cg_jax.rules import Rule, applied, mean, median, require_rule

PyTree = Any


def _zeros(tree: PyTree, *leading: int) -> PyTree:
    """Zeros of [*leading, *shape] for every differentiable leaf."""
    kept, _ = trees.partition(tree)
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *jnp.shape(leaf)), jnp.result_type(leaf)), kept)


def _cast(update: jax.Array, slots: Sequence[jax.Array]) -> jax.Array:
    """An update in the dtype of the slots, if there are any."""
    return update.astype(slots[0].dtype) if slots else jnp.asarray(update)


def _aggregate(rule: Rule, slots: PyTree, updates: PyTree) -> PyTree:
    """The rule over the rows of the slots and the updates, in the slots' dtype."""
    return jax.tree.map(lambda s, g: applied(rule, jnp.concatenate([s, g[None].astype(s.dtype)])), slots, updates)


def _write(slots: PyTree, updates: PyTree, position: jax.Array, after: PyTree) -> PyTree:
    """The slots with the updates in row `position`, written in place where the slots are donated.

    Only what is known to come after the last reading of the slots is done in place, and XLA does not look for an order:
    without one it copies all slots. So the position is made to depend on `after`, which was computed from the slots.
    """

    def put(slot: jax.Array, update: jax.Array, made: jax.Array) -> jax.Array:
        if not made.size:
            return slot
        any_number = made[(0,) * made.ndim].astype(jnp.int32)
        row = jax.lax.clamp(position, any_number, position)
        return jax.lax.dynamic_update_index_in_dim(slot, update.astype(slot.dtype), row, 0)

    return jax.tree.map(put, slots, updates, after)


def _stacked(rule: Rule, k: int | None) -> aggregating.Aggregator:
    require_rule(rule)

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, Any]:
        del params, extra_args
        rows = _validate.leading_axis("updates", updates)
        if k is not None and rows != k:
            raise ValueError(f"Expected updates of shape [k, *shape] with k={k}, got a leading axis of {rows}.")
        return jax.tree.map(lambda values: applied(rule, values), updates), state

    return aggregating.Aggregator(optax.init_empty_state, update_fn)


def stacked(rule: Rule) -> aggregating.Aggregator:
    """The transformation whose updates arrive as [k, *shape] and leave as rule(updates), [*shape].

    The state is empty. It comes first in `optax.chain`; before it only stateless transformations mapped over k, and
    wrappers that accumulate (`optax.MultiSteps`, `optax.apply_if_finite`) go around what comes after it. It is also the
    aggregator of `optax.experimental.aggregating.process`. `micro_batch_grads` makes such updates.

    Args:
        rule: A function [k, *shape] → [*shape], as `cg_jax.median()`.

    Returns:
        An `optax.experimental.aggregating.Aggregator`, which is a `GradientTransformationExtraArgs`.

    Raises:
        TypeError: rule is no function of k values.
        ValueError: When it meets updates whose leading axes disagree or are absent, or the rule makes another shape.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> optimizer = optax.chain(cg.stacked(cg.median()), optax.sgd(0.1))
        >>> updates, _ = optimizer.update(jax.numpy.array([[1.0], [4.0], [70.0]]), optimizer.init(jax.numpy.zeros(1)))
        >>> updates
        Array([-0.4], dtype=float32)
    """
    return _stacked(rule, None)


def median_of_k(k: int) -> aggregating.Aggregator:
    """`stacked(median())` that checks k: the coordinate-wise median of k gradients that arrive as [k, *shape].

    Args:
        k: Number of gradients, ≥ 1.

    Raises:
        ValueError: k < 1; when it meets updates, a leading axis other than k.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.

    Examples:
        >>> import jax, cg_jax as cg
        >>> m5 = cg.median_of_k(5)
        >>> m5.update(jax.numpy.array([1.0, 2.0, 3.0, 80.0, 90.0]), m5.init(0.0))[0]
        Array(3., dtype=float32)
    """
    return _stacked(median(), _validate.at_least("k", k, 1))


class ConsecutiveState(NamedTuple):
    """State of `consecutive`."""

    count: jax.Array  # gradients stored since the last step, int32 in 0..k−1
    grads: PyTree  # the stored gradients, [k − 1, *shape] in the parameters' dtypes
    inner_state: Any  # state of the optimizer


def consecutive(rule: Rule, k: int, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation that takes a step of `optimizer` on rule(the last k gradients) at every k-th call.

    In between the updates are zero and the optimizer's state stays as it is, so that k calls are one step; count its
    learning-rate schedule in such steps.

    Args:
        rule: A function [k, *shape] → [*shape], as `cg_jax.median()`.
        k: Calls for one step, ≥ 1.
        optimizer: Any optax transformation.

    Returns:
        A `GradientTransformationExtraArgs`. Its state is `ConsecutiveState`, which takes k − 1 times the memory of the
        parameters, and the optimizer's.

    Raises:
        TypeError: rule is no function of k values.
        ValueError: k < 1; when it meets gradients, a rule that makes another shape.

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
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> ConsecutiveState:
        return ConsecutiveState(jnp.zeros((), jnp.int32), _zeros(params, k - 1), inner.init(params))

    def update_fn(
        updates: PyTree, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[PyTree, ConsecutiveState]:
        def step(updates: PyTree, state: ConsecutiveState) -> tuple[PyTree, Any]:
            direction = _aggregate(rule, state.grads, updates)
            return inner.update(direction, state.inner_state, params, **extra_args)

        def wait(updates: PyTree, state: ConsecutiveState) -> tuple[PyTree, Any]:
            like, _ = jax.eval_shape(step, updates, state)
            return optax.tree.zeros_like(like), state.inner_state

        if k == 1:
            steps, inner_state = step(updates, state)
            return steps, state._replace(inner_state=inner_state)
        steps, inner_state = jax.lax.cond(state.count == k - 1, step, wait, updates, state)
        grads = _write(state.grads, updates, state.count % (k - 1), after=steps)
        return steps, ConsecutiveState((state.count + 1) % k, grads, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RollingState(NamedTuple):
    """State of `rolling`."""

    num_seen: jax.Array  # gradients stored, int32, at most k − 1
    grads: tuple[PyTree, ...]  # the last k − 1 gradients, oldest first, like the parameters and in their dtypes


def rolling(rule: Rule, k: int) -> optax.GradientTransformationExtraArgs:
    """The transformation that turns each gradient into rule(it and the k − 1 before it); a step at every call.

    Before k gradients were seen the gradient passes through unchanged. (The papers' code waits for k instead.) The rule
    must not depend on the order of its values.

    Args:
        rule: A function [k, *shape] → [*shape], as `cg_jax.median()`.
        k: Number of gradients that the rule sees, ≥ 1.

    Returns:
        A `GradientTransformationExtraArgs` to chain before an optimizer. Its state is `RollingState`: the memory of
        k − 1 gradients, reused where the state is donated.

    Raises:
        TypeError: rule is no function of k values.
        ValueError: k < 1; when it meets gradients, a rule that makes another shape.

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

    def init_fn(params: PyTree) -> RollingState:
        return RollingState(jnp.zeros((), jnp.int32), tuple(_zeros(params) for _ in range(k - 1)))

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, RollingState]:
        del params, extra_args

        def direction(update: jax.Array, *slots: jax.Array) -> jax.Array:
            seen = applied(rule, jnp.stack([*slots, _cast(update, slots)]))
            return seen if k == 1 else jnp.where(state.num_seen < k - 1, _cast(update, slots), seen)

        # Arrays of their own, which move up by one. One array of all of them, written in turn, XLA copies twice in a
        # training step; slots that are chosen entry by entry, old or new, are no faster and take more memory.
        grads = jax.tree.map(lambda update, *slots: _cast(update, slots), updates, *state.grads)
        after = RollingState(jnp.minimum(state.num_seen + 1, k - 1), (*state.grads, grads)[1:])
        return jax.tree.map(direction, updates, *state.grads), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def m3(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """M3: one step of `optimizer` on the coordinate-wise median of every 3 mini-batch gradients.

    `consecutive(median(), 3, optimizer)`: three calls make one step.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return consecutive(median(), 3, optimizer)


def rm3() -> optax.GradientTransformationExtraArgs:
    """RM3: the coordinate-wise median of the last 3 mini-batch gradients, at every call; `rolling(median(), 3)`.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return rolling(median(), 3)


def ra3() -> optax.GradientTransformationExtraArgs:
    """RA3: the mean of the last 3 mini-batch gradients, at every call, the control of RM3; `rolling(mean(), 3)`.

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.
    """
    return rolling(mean(), 3)
