"""The updates that a transformation receives: their normal form, and checks against parameters.

optax itself accepts updates of other shapes. Adding them to the parameters broadcasts, so the parameters grow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cg_jax import trees
from cg_jax._types import PyTree


def is_none(leaf: Any) -> bool:
    """Whether a leaf is None."""
    return leaf is None


def arrays(updates: PyTree) -> PyTree:
    """Updates as arrays. A leaf of dtype float0, JAX's gradient of an integer leaf, becomes None."""
    return jax.tree.map(
        lambda leaf: None if getattr(leaf, "dtype", None) == jax.dtypes.float0 else jnp.asarray(leaf), updates
    )


def _is_whole(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, int)
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def with_zeros(updates: PyTree, params: PyTree) -> PyTree:
    """Replace None by zeros if the parameter is an integer or boolean array: optax.apply_updates cannot add None."""
    whole = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_whole(leaf)}
    if not whole:
        return updates
    leaves, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_none)
    filled = [jnp.zeros_like(whole[path]) if leaf is None and path in whole else leaf for path, leaf in leaves]
    return jax.tree.unflatten(structure, filled)


def require_shapes(updates: PyTree, like: PyTree, remedy: str, stacked: bool = False) -> None:
    """ValueError unless each update has its shape in `like`, after a leading axis k if stacked.

    Leaves that only one of the trees has are ignored, since optax does not require equal trees either.
    """
    shapes = {path: np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        want, got = shapes.get(path), np.shape(leaf)
        if want is None or (got[stacked:] == want and len(got) == len(want) + stacked):
            continue
        whole = ", ".join(map(str, ["k", *want] if stacked else want))
        raise ValueError(
            f"Expected updates{jax.tree_util.keystr(path)} of shape [{whole}], for a parameter of shape {list(want)}, "
            f"got shape {list(got)}; {remedy}."
        )


def require_floating(updates: PyTree) -> None:
    """ValueError unless every update is of a floating dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if not trees.is_differentiable(leaf):
            raise ValueError(
                f"Expected updates of a floating dtype, got updates{jax.tree_util.keystr(path)} of dtype {leaf.dtype}; "
                "use None for leaves without a gradient."
            )


def require_unmasked(updates: PyTree, name: str) -> None:
    """ValueError if a wrapper such as optax.masked hides leaves. They would stay [k, *shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    for path, leaf in leaves:
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"Expected {name} to receive every leaf, got updates{jax.tree_util.keystr(path)} masked, which would "
                f"stay [k, *shape]; put it before: optax.chain({name}, optax.masked(…) or optax.partition(…)). "
                "Where another stacked takes those leaves, use cg_jax.stacked(rule, partial=True)."
            )
