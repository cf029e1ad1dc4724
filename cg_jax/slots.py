"""The slots of `consecutive` and `rolling`: stored gradients, sharded like their parameters."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _compat, incoming, trees
from cg_jax._types import PyTree
from cg_jax.rules import Rule, applied
from cg_jax.sharding.explicit_axes import with_auto_axes

_REMEDY = "consecutive and rolling (m3, rm3, ra3) take one gradient a call, and cg_jax.stacked(rule) takes k at once"


def zeros(params: PyTree, leading: tuple[int, ...], dtype: Any) -> PyTree:
    """Zeros [*leading, *shape] for every differentiable leaf, in `dtype` or by default its accumulator dtype."""

    def slot(leaf: Any) -> jax.Array:
        return _zeros(
            leaf, leading, jnp.dtype(trees.accumulator_dtype(jnp.result_type(leaf)) if dtype is None else dtype)
        )

    return jax.tree.map(slot, trees.partition(params)[0])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _zeros(leaf: jax.Array, leading: tuple[int, ...], dtype: Any) -> jax.Array:
    # With this condition, which is never true, the result depends on the parameter and takes its sharding, also inside
    # jit. The compiler drops the dependence.
    return jnp.where(False, jnp.broadcast_to(leaf, (*leading, *jnp.shape(leaf))), 0).astype(dtype)


def require_fitting(grads: PyTree, slots: PyTree, params: PyTree, rounds: bool) -> None:
    """ValueError unless gradients fit the slots [*shape] in structure, shapes, dtypes and varying axes.

    Args:
        grads: Arrays, or None for a leaf without a gradient.
        slots: Arrays or their avals, or None for a parameter that is not a differentiable array.
        params: None, or parameters whose shapes the gradients must also have.
        rounds: Whether gradients of a wider dtype may be rounded.
    """
    _require_structure(grads, slots)
    incoming.require_shapes(grads, slots, _REMEDY)
    if params is not None:
        incoming.require_shapes(grads, params, _REMEDY)
    stored = dict(jax.tree_util.tree_leaves_with_path(slots))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if path in stored:
            _require_dtype_and_axes(f"updates{jax.tree_util.keystr(path)}", leaf, stored[path], rounds)


def _require_dtype_and_axes(where: str, leaf: Any, slot: Any, rounds: bool) -> None:
    if not rounds and not _is_number(leaf) and _bits(leaf) > _bits(slot):
        raise ValueError(
            f"Expected gradients that slots of {slot.dtype} hold without rounding, got {where} of {leaf.dtype}; "
            f"pass accumulator_dtype=jnp.{leaf.dtype}."
        )
    more = _compat.varying_axes(leaf) - _compat.varying_axes(slot)
    if more:
        raise ValueError(
            f"Expected gradients that are the same on all devices, as the state is, got {where} that varies over "
            f"{', '.join(map(repr, sorted(more)))}; put cg_jax.across_devices or jax.lax.pmean before."
        )


def _bits(leaf: Any) -> int:
    return jnp.finfo(leaf.dtype).bits if trees.is_differentiable(leaf) else 0


def _require_structure(grads: PyTree, slots: PyTree) -> None:
    structure = jax.tree.structure(slots, is_leaf=incoming.is_none)
    try:
        rest = structure.flatten_up_to(grads)
    except ValueError:
        rest = None
    if rest is not None and all(leaf is None or hasattr(leaf, "dtype") for leaf in rest):
        return
    here, there = (
        dict.fromkeys(jax.tree_util.keystr(path) for path, _ in leaves)
        for leaves in (jax.tree_util.tree_leaves_with_path(tree, is_leaf=incoming.is_none) for tree in (grads, slots))
    )
    absent, beyond = [path for path in there if path not in here], [path for path in here if path not in there]
    what = f"no updates{absent[0]}" if absent else f"updates{beyond[0]}" if beyond else f"{type(grads).__name__} nodes"
    raise ValueError(
        f"Expected updates of the structure that the parameters had at init, got {what}; pass gradients of the same "
        "tree, None for a leaf without one."
    )


def pairs(grads: PyTree, *slots: PyTree) -> tuple[list[tuple[Any, ...]], Any]:
    """([(gradient, *slots) of each leaf], structure). Each entry may be None."""
    structure = jax.tree.structure(slots[0], is_leaf=incoming.is_none)
    return list(zip(*(structure.flatten_up_to(tree) for tree in (grads, *slots)), strict=True)), structure


def result_dtype(grad: jax.Array, slot: jax.Array) -> Any:
    """The dtype of an aggregate: the gradient's, or the slot's for a Python number or an integer."""
    return grad.dtype if trees.is_differentiable(grad) and not _is_number(grad) else slot.dtype


def _is_number(leaf: Any) -> bool:
    """Whether a leaf was a Python number, whose dtype has no meaning."""
    return leaf.weak_type and leaf.ndim == 0


def aggregate(rule: Rule, grads: PyTree, slots: PyTree) -> PyTree:
    """Apply the rule to the rows of the slots [k − 1, *shape] and the gradients. Keep a gradient without a slot."""

    def of_leaf(grad: Any, slot: Any) -> Any:
        if grad is None or slot is None:
            return grad
        return applied(rule, jnp.concatenate([slot, grad[None].astype(slot.dtype)])).astype(result_dtype(grad, slot))

    rows, structure = pairs(grads, slots)
    return jax.tree.unflatten(structure, [of_leaf(*row) for row in rows])


def roll(rule: Rule, grads: PyTree, slots: Sequence[PyTree], full: jax.Array) -> tuple[PyTree, tuple[PyTree, ...]]:
    """(the rule of slots and gradients if the slots are `full`, else the gradients; the shifted slots)."""

    def of_leaf(grad: Any, *stored: Any) -> tuple[Any, ...]:
        if grad is None or stored[0] is None:
            return grad, *stored
        dtype, window = result_dtype(grad, stored[0]), [*stored, grad.astype(stored[0].dtype)]
        out = jnp.where(full, applied(rule, jnp.stack(window)).astype(dtype), grad.astype(dtype))
        # The slots are separate arrays, which shift by one. XLA would copy a single array, written in turn, twice per
        # training step. Selecting old or new slots entry by entry is not faster and takes more memory.
        return out, *(window[1:] if grad.dtype == window[0].dtype else _moved_in_order(out, window))

    rows, structure = pairs(grads, *slots)
    out, *after = zip(*(of_leaf(*row) for row in rows), strict=True) if rows else [()] * (1 + len(slots))
    return jax.tree.unflatten(structure, out), tuple(jax.tree.unflatten(structure, stored) for stored in after)


def _moved_in_order(out: jax.Array, window: Sequence[jax.Array]) -> list[jax.Array]:
    """window[1:], where each entry depends on the result before it. Otherwise XLA copies all slots of another dtype."""
    moved, before = [], out
    for old, new in itertools.pairwise(window):
        number = _any_number(before) if before.size else 0
        before = jnp.where(jnp.clip(number, 0, 0) > 0, old, new)
        moved.append(before)
    return moved


def zeros_for_none(direction: PyTree, slots: PyTree) -> PyTree:
    """Replace None by zeros where there are slots, so that the state of an optimizer keeps its structure."""
    rows, structure = pairs(direction, slots)
    filled = [jnp.zeros(s.shape, s.dtype) if leaf is None and s is not None else leaf for leaf, s in rows]
    return jax.tree.unflatten(structure, filled)


def none_again(steps: PyTree, grads: PyTree, slots: PyTree) -> PyTree:
    """Steps, with None again for leaves that have slots but no gradient."""
    rows, structure = pairs(steps, grads, slots)
    return jax.tree.unflatten(structure, [None if g is None and s is not None else step for step, g, s in rows])


def in_the_dtypes_of(before: PyTree, after: PyTree) -> PyTree:
    """The state of an optimizer, cast to its previous dtypes, which wider gradients would change."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        return after

    def keep(old: Any, new: Any) -> Any:
        return new.astype(old.dtype) if hasattr(old, "dtype") and old.dtype != new.dtype else new

    return jax.tree.map(keep, before, after)


def write(grads: PyTree, slots: PyTree, position: jax.Array, after: PyTree) -> PyTree:
    """Write the gradients to row `position` of the slots [k − 1, *shape], in place if the slots are donated.

    XLA writes in place only if the write is known to come after the last read of the slots. It does not look for such
    an order, and copies all slots without one. So the position depends on `after`, which is computed from the slots.
    """

    def put(grad: Any, slot: Any, before: Any) -> Any:
        if grad is None or slot is None or not slot.size:
            return slot
        row = position if before is None or not before.size else jax.lax.clamp(position, _any_number(before), position)
        return jax.lax.dynamic_update_index_in_dim(slot, grad.astype(slot.dtype), row, 0)

    rows, structure = pairs(grads, slots, after)
    return jax.tree.unflatten(structure, [put(*row) for row in rows])


def _any_number(leaf: jax.Array) -> jax.Array:
    """One number of an array, as an integer. On an Explicit mesh JAX would reject an index into a sharded axis."""

    def first(leaf: jax.Array, _: Any) -> jax.Array:
        return leaf[(0,) * leaf.ndim].astype(jnp.int32)

    return with_auto_axes(first, lambda spec, rows: PartitionSpec(), leaf, ())
