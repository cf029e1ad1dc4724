"""Argument checks. Every message gives the expectation (name and bound), then the value, then the remedy."""

import numbers
import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax._leaves import arrays, parameters
from cg_jax._types import PyTree


def shown(name: str, value: Any) -> str:
    """name=value if it fits on one line, else the type of the value."""
    text = repr(value) if isinstance(value, str | bytes | int | float | complex | np.generic | None) else ""
    return f"{name}={text}" if 0 < len(text) <= 80 else f"{name} of type {type(value).__name__}"


def at_least(name: str, value: int, bound: int) -> int:
    """`value` as an int, or ValueError unless it is a whole number `>= bound`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"Expected {name} to be a whole number >= {bound}, got {shown(name, value)}.") from None
    if number < bound:
        raise ValueError(f"Expected {name} >= {bound}, got {name}={number}.")
    return number


def number(name: str, value: Any) -> float:
    """`value` as a float, or TypeError unless it is a real number, other than NaN."""
    is_real = isinstance(value, numbers.Real) or (jnp.shape(value) == () and isinstance(value, np.ndarray | jax.Array))
    try:
        out = float(value) if is_real else None
    except jax.errors.ConcretizationTypeError:  # a traced value
        out = None
    if out is None:
        raise TypeError(f"Expected {name} to be a number, got {shown(name, value)}.")
    if out != out:
        raise ValueError(f"Expected {name} to be a number, got {name}=nan.")
    return out


def max_bytes(value: int | None) -> None:
    """ValueError unless `value` is None or a whole number >= 1."""
    if value is not None:
        at_least("max_bytes", value, 1)


def one_of(name: str, value: str, choices: Collection[str], remedy: str = "") -> str:
    """`value`, or ValueError unless it is one of `choices`. The remedy is for values that are not strings."""
    if not isinstance(value, str) or value not in choices:
        remedy = f"; {remedy}" if remedy and not isinstance(value, str) else ""
        raise ValueError(f"Expected {name} in {sorted(choices)}, got {shown(name, value)}{remedy}.")
    return value


def divides(name: str, k: int, total_name: str, total: int) -> None:
    """ValueError unless `k` divides `total`."""
    if total % k:
        raise ValueError(
            f"Expected {name} to divide {total_name}, got {name}={k} and {total_name}={total} (remainder {total % k})."
        )


def leading_axis(name: str, tree: PyTree) -> int:
    """The size of the leading axis that all leaves of `tree` share. ValueError if there is none or it is 0."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"Expected {name} to hold at least one array, got {tree!r}.")
    sizes = {}
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not np.shape(leaf):
            raise ValueError(
                f"Expected every array of {name} to have a leading axis, got {where} of shape (); stack examples into "
                "a batch, and numbers into one array."
            )
        sizes[where] = np.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Expected all arrays of {name} to share their leading axis, got {sizes}.")
    (size,) = set(sizes.values())
    if size < 1:
        raise ValueError(f"Expected a leading axis of {name} >= 1, got an empty {name} (leading axis 0).")
    return size


def leading_axis_after(params: PyTree, name: str, tree: PyTree) -> int:
    """`leading_axis` of an argument that comes after params. The error says so if the two may be swapped."""
    try:
        return leading_axis(name, tree)
    except ValueError as error:
        of_params, of_tree = ({np.shape(leaf)[:1] for leaf in jax.tree.leaves(each)} for each in (params, tree))
        swapped = len(of_params) == 1 and () not in of_params | of_tree and len(of_tree) > 1
        raise ValueError(f"{str(error)[:-1]}; params come first, then {name}." if swapped else str(error)) from None


def arguments(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, int]:
    """(params, batch, B) as arrays. TypeError or ValueError if a leaf is not, or batch has no leading axis B."""
    params, batch = parameters(params, shapes=False), arrays("batch", batch)
    return params, batch, leading_axis_after(params, "batch", batch)


def mask_shape(mask: Any, batch_size: int) -> None:
    """ValueError unless `mask` is boolean [B]."""
    if mask.shape != (batch_size,) or mask.dtype != bool:
        remedy = "" if mask.dtype == bool else "; take mask != 0"
        raise ValueError(
            f"Expected mask to be boolean of shape [{batch_size}], got mask of dtype {mask.dtype} and shape "
            f"{mask.shape}{remedy}."
        )


def scalar_loss(out: PyTree, what: str) -> None:
    """TypeError unless `out`, the result of loss_fn, is one real floating-point scalar."""
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0] is not out or out.shape != ():
        shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), out)
        several = "ONE" in what and getattr(out, "shape", ())
        remedy = "; add up its parts, and give one example where a batch was given" if several else ""
        raise TypeError(f"Expected loss_fn to return one scalar, {what}, got shape {shapes}{remedy}.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"Expected loss_fn to return a real floating-point scalar, got dtype {out.dtype}.")


def function(name: str, value: Any) -> None:
    """TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"Expected {name} to be a function, got {type(value).__name__}.")


def transformation(name: str, value: Any) -> None:
    """TypeError unless `value` is an optax transformation: an object with functions `init` and `update`."""
    try:
        complete = not isinstance(value, type) and callable(value.init) and callable(value.update)
    except TypeError:  # a rule of cg_jax, whose own message is better
        raise
    except AttributeError:
        complete = False
    if not complete:
        called = getattr(value, "__name__", None)
        remedy = f"call it first: {called}(…)" if called else "pass one such as optax.sgd(learning_rate)"
        raise TypeError(f"Expected {name} to be an optax transformation, got {name}={called or repr(value)}; {remedy}.")


def floating(name: str, dtype: Any) -> None:
    """TypeError unless `dtype` is None or a floating dtype."""
    if dtype is not None and not jax.numpy.issubdtype(jax.numpy.dtype(dtype), jax.numpy.floating):
        raise TypeError(f"Expected {name} to be a floating dtype, got {name}={jax.numpy.dtype(dtype)}.")


def something_to_differentiate(kept: PyTree) -> None:
    """ValueError if params has no differentiable leaf."""
    if not jax.tree.leaves(kept):
        raise ValueError(
            "Expected params to hold at least one floating-point array, got none; nothing to differentiate."
        )


def dependence(depends: bool) -> None:
    """ValueError if the loss does not depend on params."""
    if not depends:
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
    """TypeError unless `out`, the result of loss_fn with has_aux=True, is (loss, auxiliary values)."""
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"Expected loss_fn to return (loss, aux) with has_aux=True, got {_described(out)}.")


def no_pair(out: Any, what: str) -> None:
    """TypeError if `out`, the result of loss_fn without has_aux, looks like (loss, auxiliary values)."""
    if isinstance(out, tuple | list) and len(out) == 2:
        raise TypeError(
            f"Expected loss_fn to return one scalar, {what}, got shape {_described(out)}; to return (loss, aux), pass "
            "has_aux=True."
        )


def _described(out: Any) -> Any:
    """The shapes of the result of a loss."""
    return jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), out)
