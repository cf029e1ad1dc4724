"""A wrapper that detects silent changes of shape in any optimizer."""

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cg_jax import _validate, incoming
from cg_jax._types import PyTree
from cg_jax.aggregate import ConsecutiveState, RollingState

_STACKED = "put cg_jax.stacked(rule) or median_of_k(k) first in optax.chain, outside of optax.partition and masked"


def checked(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with errors where optax silently changes shapes. The checks cost nothing once compiled.

    optax.apply_updates broadcasts: with updates [k, *shape], parameters [*shape] become [k, *shape]. `stacked`,
    `rolling`, `consecutive` and `across_devices` check the updates that they receive. Only a wrapper sees the final
    updates and the transformations beside or before them. It raises for

    - k stacked gradients in an optimizer without `stacked`, such as optax.sgd alone;
    - leaves that `stacked` inside `optax.partition` (`multi_transform`) does not receive, such as those of set_to_zero;
    - `stacked`, `rolling` or `consecutive` after a transformation with a state of the parameters' shapes, such as adam;
    - `across_devices` that receives gradients [1, *shape].

    Transformations without such a state, such as clipping and weight decay, may come before. It cannot detect a wrong
    order of stateless transformations (`m3` after a plain `optax.sgd`).

    Args:
        optimizer: Any complete optax transformation.

    Returns:
        A `GradientTransformationExtraArgs` with the state of `optimizer`, whose `update` requires `params`.

    Raises:
        TypeError: optimizer is not an optax transformation.
        ValueError: At init: a wrong order. At an update: no params, final updates whose shapes differ from those of
            params, or a state whose shapes change.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> w, grads = jax.numpy.zeros(4), jax.numpy.ones((3, 4))
        >>> optimizer = cg.checked(optax.chain(cg.median_of_k(3), optax.sgd(0.1)))
        >>> optimizer.update(grads, optimizer.init(w), w)[0].shape
        (4,)
        >>> optimizer = cg.checked(optax.sgd(0.1))
        >>> optimizer.update(grads, optimizer.init(w), w)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Expected updates of shape [4], for a parameter of shape [4], got shape [3, 4]; put ...
    """
    _validate.transformation("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> Any:
        state = inner.init(params)
        _require_order(state, {np.shape(leaf) for leaf in jax.tree.leaves(params)} - {()})
        return state

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "Expected params, with which updates are compared, got None; call update(…, state, params)."
            )
        out, after = inner.update(updates, state, params, **extra_args)
        incoming.require_shapes(out, params, _STACKED)
        _require_same_shapes(state, after)
        return incoming.with_zeros(out, params), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_same_shapes(before: Any, after: Any) -> None:
    shapes = {path: np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(before)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        was = shapes.get(path, np.shape(leaf))
        if np.shape(leaf) != was:
            raise ValueError(
                f"Expected a state of constant shapes, got state{jax.tree_util.keystr(path)} of shape {list(was)} that "
                f"became {list(np.shape(leaf))}; {_STACKED}, before what keeps a state."
            )


def _parts(state: Any) -> list[Any]:
    """The states of the transformations of optax.chain or named_chain, in order. Empty for any other state."""
    if type(state) is tuple:
        return list(state)
    return list(state.values()) if isinstance(state, OrderedDict) else []


def _require_order(state: Any, shapes: set[tuple[int, ...]]) -> None:
    """ValueError if in a chain a state of the parameters' shapes precedes that of `rolling` or `consecutive`."""
    before: str | None = None
    for part in _parts(state):
        ours = next((node for node in jax.tree.leaves(part, is_leaf=_is_ours) if _is_ours(node)), None)
        if ours is not None and before:
            raise ValueError(
                "Expected rolling or consecutive (m3, rm3, ra3) before transformations that keep a state, got "
                f"{type(ours).__name__} after one with slots {before}; it takes raw gradients: put it first in "
                "optax.chain."
            )
        slots = [path for path, leaf in jax.tree_util.tree_leaves_with_path(part) if _is_slot(leaf, shapes)]
        before = before or (jax.tree_util.keystr(slots[0]) if slots else None)
    for child in jax.tree.leaves(state, is_leaf=lambda node: node is not state and bool(_parts(node))):
        if _parts(child):
            _require_order(child, shapes)


def _is_ours(node: Any) -> bool:
    return isinstance(node, RollingState | ConsecutiveState)


def _is_slot(leaf: Any, shapes: set[tuple[int, ...]]) -> bool:
    return np.shape(leaf) in shapes and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
