"""Argument checks. One message style: what was expected (name and bound), then what came."""

import operator
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

PyTree = Any


def at_least(name: str, value: int, bound: int) -> int:
    """`value` as an int, or ValueError unless it is a whole number `>= bound`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"Expected {name} to be a whole number >= {bound}, got {name}={value!r}.") from None
    if number < bound:
        raise ValueError(f"Expected {name} >= {bound}, got {name}={number}.")
    return number


def max_bytes(value: int | None) -> None:
    """ValueError unless `value` is None or a whole number >= 1."""
    if value is not None:
        at_least("max_bytes", value, 1)


def one_of(name: str, value: str, choices: Collection[str]) -> str:
    """`value`, or ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"Expected {name} in {sorted(choices)}, got {name}={value!r}.")
    return value


def divides(name: str, k: int, total_name: str, total: int) -> None:
    """ValueError unless `k` divides `total`."""
    if total % k:
        raise ValueError(
            f"Expected {name} to divide {total_name}, got {name}={k} and {total_name}={total} (remainder {total % k})."
        )


def leading_axis(name: str, tree: PyTree) -> int:
    """The leading axis that all leaves of `tree` share; ValueError if they share none or it is empty."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"Expected {name} to hold at least one array, got {tree!r}.")
    sizes = {}
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if np.ndim(leaf) == 0:
            raise ValueError(f"Expected every array of {name} to have a leading axis, got {where} of shape ().")
        sizes[where] = np.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Expected all arrays of {name} to share their leading axis, got {sizes}.")
    (size,) = set(sizes.values())
    if size < 1:
        raise ValueError(f"Expected a leading axis of {name} >= 1, got an empty {name} (leading axis 0).")
    return size


def mask_shape(mask: Any, batch_size: int) -> None:
    """ValueError unless `mask` is boolean [B]."""
    if mask.shape != (batch_size,) or mask.dtype != bool:
        raise ValueError(
            f"Expected mask to be boolean of shape [{batch_size}], got mask of dtype {mask.dtype} and shape "
            f"{mask.shape}."
        )


def scalar_loss(out: PyTree, what: str) -> None:
    """TypeError unless `out`, what loss_fn returned, is one real floating-point scalar."""
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0] is not out or out.shape != ():
        shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), out)
        raise TypeError(f"Expected loss_fn to return one scalar, {what}, got shape {shapes}.")
    if not jax.numpy.issubdtype(out.dtype, jax.numpy.floating):
        raise TypeError(f"Expected loss_fn to return a real floating-point scalar, got dtype {out.dtype}.")


def parameters(params: PyTree) -> None:
    """TypeError unless every leaf of params is an array or a number, and none is complex."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        try:
            dtype = jax.numpy.result_type(leaf)
        except TypeError:
            raise TypeError(
                f"Expected every leaf of params to be an array or a number, got {where} of {type(leaf).__name__}; keep "
                "such leaves apart (nnx.split, equinox.partition) and put them back inside loss_fn."
            ) from None
        if jax.numpy.issubdtype(dtype, jax.numpy.complexfloating):
            raise TypeError(
                f"Expected real parameters, got {where} of dtype {dtype}; keep its real and imaginary parts as two "
                "leaves and put them together inside loss_fn."
            )


def function(name: str, value: Any) -> None:
    """TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"Expected {name} to be a function, got {type(value).__name__}.")


def something_to_differentiate(kept: PyTree) -> None:
    """ValueError if there is no leaf among the differentiable leaves of params."""
    if not jax.tree.leaves(kept):
        raise ValueError(
            "Expected params to hold at least one floating-point array, got none; nothing to differentiate."
        )


def dependence(found: bool) -> None:
    """ValueError unless it was found that the loss depends on params."""
    if not found:
        raise ValueError("Expected loss_fn to depend on params, but its result does not; every gradient would be zero.")


def same_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
    """ValueError unless `tree` has the structure and shapes of `like`."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"Expected {name} to have the structure of {like_name}, {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(tree)}."
        )
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if np.shape(leaf) != np.shape(other):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"Expected {name}{where} of shape {np.shape(other)}, as in {like_name}, got {np.shape(leaf)}."
            )


def pair(out: Any) -> None:
    """TypeError unless `out`, what loss_fn returned with has_aux=True, is (loss, auxiliary values)."""
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"Expected loss_fn to return (loss, aux) with has_aux=True, got {_described(out)}.")


def no_pair(out: Any, what: str) -> None:
    """TypeError where `out`, what loss_fn returned without has_aux, looks like (loss, auxiliary values)."""
    if isinstance(out, tuple | list) and len(out) == 2 and getattr(out[0], "shape", None) == ():
        raise TypeError(
            f"Expected loss_fn to return one scalar, {what}, got shape {_described(out)}; to return (loss, aux), pass "
            "has_aux=True."
        )


def _described(out: Any) -> Any:
    """The shapes of what a loss returned."""
    return jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), out)
