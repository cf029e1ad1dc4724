"""Check the leaves of params and batches. Convert what NumPy can convert; for the rest, raise with a remedy."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax._types import PyTree

_SPLIT = "split them off, graphdef, params, rest = nnx.split(model, nnx.Param, ...), and put both back inside loss_fn"
_APART = "keep such leaves apart (nnx.split, equinox.partition) and put them back inside loss_fn"
_ARRAYS_OF_MODEL = "take the parameters of a model: variables['params'], nnx.split, equinox.partition"
# Flax NNX variables and Flax linen collections that are state and not trained.
_STATE_VARIABLES = frozenset({"BatchStat", "Cache", "Intermediate", "OptState", "OptVariable", "OptArray", "RngState"})
_STATE_COLLECTIONS = ("batch_stats", "cache", "intermediates")


def arrays(name: str, tree: PyTree, lazy: bool = False, shapes: bool = False) -> PyTree:
    """Convert every leaf to an array or a number with NumPy. TypeError if it cannot.

    With `lazy`, leaves that are read when sliced (h5py, zarr) stay unchanged. With `shapes`, leaves of type
    `jax.ShapeDtypeStruct` do too.
    """

    def check(where: str, leaf: Any) -> Any:
        return leaf if shapes and isinstance(leaf, jax.ShapeDtypeStruct) else _array(name, where, leaf, lazy)

    return _each_leaf(check, name, tree)


def _each_leaf(check: Any, name: str, tree: PyTree) -> PyTree:
    """Map check(where, leaf) over the tree. Return the same object if nothing is converted."""
    if all(map(_is_plain, jax.tree.leaves(tree))):
        return tree
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [check(f"{name}{jax.tree_util.keystr(path)}", leaf) for path, leaf in with_paths]
    if all(new is old for new, (_, old) in zip(leaves, with_paths, strict=True)):
        return tree
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is certainly an array of real numbers and needs no further check."""
    if isinstance(leaf, jax.Array):
        return getattr(leaf.dtype, "kind", "c") in "fiubV"
    return type(leaf) is np.ndarray and leaf.dtype.kind in "fiub" and leaf.dtype.char != "g"


def _array(name: str, where: str, leaf: Any, lazy: bool = False) -> Any:
    """Convert one leaf to an array or a number, else TypeError."""
    if isinstance(leaf, jax.Array | bool | int | float | complex):
        return leaf
    kind, remedy, array = type(leaf).__name__, _remedy(name, leaf), leaf
    if not remedy and not isinstance(leaf, np.ndarray | np.generic) and not (lazy and _is_lazy(leaf)):
        try:
            array = np.asarray(leaf)
        except Exception as error:
            kind, remedy = f"{kind}, which NumPy cannot read ({_first_line(error)})", "convert it first"
    if not remedy:
        kind, remedy = f"dtype {array.dtype}", _dtype_remedy(array)
    if remedy:
        raise TypeError(f"Expected every leaf of {name} to be an array, got {where} of {kind}; {remedy}.")
    return array


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")


def _is_lazy(leaf: Any) -> bool:
    """Whether a leaf is read when sliced by position."""
    return isinstance(getattr(leaf, "dtype", None), np.dtype) and hasattr(leaf, "shape") and not hasattr(leaf, "iloc")


def _remedy(name: str, leaf: Any) -> str:
    """The remedy for a leaf that holds no array of numbers. Empty if it may hold one."""
    if isinstance(leaf, np.ma.MaskedArray):
        return "fill it, or leave the masked rows out"
    if isinstance(leaf, np.ndarray | np.generic):
        return ""
    if isinstance(leaf, str | bytes):
        return "encode strings as numbers, or leave them out"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "it has no values, and only explain takes shapes"
    if hasattr(leaf, "columns"):
        return "take its .to_numpy(), or a dict of its columns as arrays"
    if hasattr(leaf, "toarray"):
        return "take its .toarray()"
    if hasattr(leaf, "__array__") or _is_lazy(leaf):
        return ""
    if isinstance(leaf, Mapping):
        return "take a dict of it"
    if isinstance(leaf, Iterable) and name == "batch":
        return "take one batch of it, next(iter(…)); measure_coherence reads a whole loader"
    if isinstance(leaf, Iterable) and name == "data":
        return "give a loader by itself, as data"
    return "make an array of numbers of it, or leave it out"


def _dtype_remedy(array: Any) -> str:
    """The remedy for an array whose dtype JAX does not support. Empty if JAX supports it."""
    dtype = array.dtype
    if dtype.char not in "gG" and (dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)):
        return ""
    if dtype.kind in "SUT" or (isinstance(array, np.ndarray) and isinstance(next(array.flat, None), str | bytes)):
        return "encode strings as numbers, or leave them out"
    if dtype.kind == "O":
        return "make an array of numbers of it, rows of different lengths padded"
    return "convert it to a dtype that JAX has"


def parameters(params: PyTree, shapes: bool = True) -> PyTree:
    """Convert every leaf of params to an array or a number. With `shapes`, `jax.ShapeDtypeStruct`s stay unchanged.

    TypeError if a leaf cannot be converted, is complex, or is model state that is not trained.
    """
    _no_state(params)

    def check(where: str, leaf: Any) -> Any:
        if shapes and isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        known = jax.Array | jax.ShapeDtypeStruct | int | float | complex
        if not hasattr(leaf, "__array__") and not isinstance(leaf, known):
            remedy = _ARRAYS_OF_MODEL if where == "params" else _APART
            raise TypeError(
                f"Expected every leaf of params to be an array or a number, got {where} of {type(leaf).__name__}; "
                f"{remedy}."
            )
        array = _array("params", where, leaf)
        if jnp.issubdtype(jnp.result_type(array), jnp.complexfloating):
            raise TypeError(
                f"Expected real parameters, got {where} of dtype {jnp.result_type(array)}; keep its real and imaginary "
                "parts as two leaves and put them together inside loss_fn."
            )
        return array

    return _each_leaf(check, "params", params)


def _no_state(params: PyTree) -> None:
    """TypeError if the parameters contain model or optimizer state, as Flax keeps it."""
    if hasattr(params, "opt_state") and hasattr(params, "params"):
        raise TypeError(f"Expected params, got a {type(params).__name__}; take its .params.")
    if isinstance(params, Mapping) and "params" in params:
        for name in _STATE_COLLECTIONS:
            if jax.tree.leaves(params.get(name)):
                raise TypeError(
                    f"Expected params alone, got a dict of variables with {name!r}; take variables['params'], and put "
                    f"{name!r} beside it inside loss_fn."
                )
    if "flax" not in sys.modules:
        return
    variables = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: bool(_variable_kind(node)))
    kinds = [(path, _variable_kind(leaf)) for path, leaf in variables]
    state = [f"params{jax.tree_util.keystr(path)} of {kind}" for path, kind in kinds if kind in _STATE_VARIABLES]
    if state:
        more = f" and {len(state) - 1} more" if len(state) > 1 else ""
        raise TypeError(f"Expected parameters without a model's state, got {state[0]}{more}; {_SPLIT}.")


def _variable_kind(leaf: Any) -> str:
    """The kind of a Flax NNX variable. "Variable" if it may be trained; empty for any other leaf."""
    names = [each.__name__ for each in type(leaf).__mro__ if each.__module__.startswith("flax.")]
    if "Variable" not in names:
        return ""
    return next((name for name in names if name in _STATE_VARIABLES and "Param" not in names), "Variable")
