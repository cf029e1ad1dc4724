"""The data of a measurement: a pytree of arrays, or an iterable of batches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _validate
from cg_jax._types import PyTree


def is_arrays(data: Any) -> bool:
    """Whether `data` is a pytree of arrays. A list is not: it is a list of batches."""
    if isinstance(data, list | Iterator):
        return False
    leaves = jax.tree.leaves(data)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


def checked(params: PyTree, data: Any) -> Any:
    """`data` as a pytree of arrays or an iterable of batches; TypeError or ValueError if it is neither.

    A pytree other than a list (a dict, a tuple, …) is never iterated, since a leaf may be a non-array by mistake.
    """
    if isinstance(data, Iterator):
        return data
    if isinstance(data, list):
        return _alike(data)
    if jax.tree_util.all_leaves([data]) and not _is_like_an_array(data):
        if isinstance(data, Iterable):
            return data
        raise TypeError(
            f"Expected data to be a pytree of arrays or an iterable of batches, got {type(data).__name__}; stack its "
            "examples into arrays, or read them by a loader."
        )
    data = _validate.arrays("data", data, lazy=True)
    if not is_arrays(data) or jax.process_count() == 1:  # several processes agree on an error first
        _validate.leading_axis_after(params, "data", data)
    return data


def _is_like_an_array(leaf: Any) -> bool:
    """Whether a leaf holds an array, or must be rejected as one: strings, a DataFrame, a file of arrays."""
    return isinstance(leaf, str | bytes | Mapping) or any(hasattr(leaf, name) for name in ("__array__", "shape"))


def _alike(batches: list[PyTree]) -> list[PyTree]:
    """Convert a list of batches. TypeError unless all have the same structure and kinds of arrays."""
    batches = [_validate.arrays(f"data[{i}]", batch, lazy=True) for i, batch in enumerate(batches)]
    kinds = [jax.tree.map(_kind, batch) for batch in batches]
    other = next((i for i, kind in enumerate(kinds) if jax.tree.flatten(kind) != jax.tree.flatten(kinds[0])), None)
    if other is not None:
        raise TypeError(
            f"Expected a list of batches of one kind, got rows of {kinds[0]} in data[0] and of {kinds[other]} in "
            f"data[{other}]; for arrays that share their leading axis take a tuple, (X, Y)."
        )
    return batches


def _kind(leaf: Any) -> str:
    """The kind of the rows of a leaf. Their lengths may differ between batches."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    kinds = {"float": jnp.floating, "int": jnp.integer}
    name = next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))
    return f"{name}[{', '.join(':' * (len(np.shape(leaf)) - 1))}]"
