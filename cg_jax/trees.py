"""Norms and inner products of pytrees, tensor by tensor, summed in the accumulator dtype.

Parameters may contain integer or boolean leaves (counters, look-up tables), which have no gradient. `partition`
replaces them by None, and `combine` puts them back.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax._types import PyTree


def accumulator_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for every narrower floating dtype (also float8 and float4). The same for complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.promote_types(dtype, jnp.complex64)
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_differentiable(leaf: Any) -> bool:
    """Whether `leaf` has a floating dtype and so has a gradient."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """(the differentiable leaves, the other leaves), each with None for the leaves of the other tree."""
    kept = jax.tree.map(lambda leaf: leaf if is_differentiable(leaf) else None, params)
    rest = jax.tree.map(lambda leaf: None if is_differentiable(leaf) else leaf, params)
    return kept, rest


def combine(kept: PyTree, rest: PyTree) -> PyTree:
    """Inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda leaf: leaf is None)


def accumulate(tree: PyTree) -> PyTree:
    """Cast each leaf to its accumulator dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), tree)


def sq_norms(tree: PyTree) -> PyTree:
    """‖leaf‖² of each leaf; leaves [...], result scalars."""
    return jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(accumulator_dtype(leaf.dtype)))), tree)


def row_sq_norms(tree: PyTree) -> PyTree:
    """‖leaf[i]‖² of each row of each leaf; leaves [B, ...], result [B]."""

    def of_rows(leaf: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(leaf.astype(accumulator_dtype(leaf.dtype))), axis=tuple(range(1, leaf.ndim)))

    return jax.tree.map(of_rows, tree)


def row_sums(tree: PyTree) -> PyTree:
    """Σᵢ leaf[i] of each leaf; leaves [B, ...], result [...]."""

    def sum_rows(leaf: jax.Array) -> jax.Array:
        # A product, since a reduction over the rows of a large [B, P] array is up to fifty times slower on a CPU.
        total = jnp.dot(jnp.ones(leaf.shape[0], leaf.dtype), leaf.reshape(leaf.shape[0], -1), precision="highest")
        return total.reshape(leaf.shape[1:])

    return jax.tree.map(sum_rows, tree)


def row_inner(tree: PyTree, direction: PyTree) -> jax.Array:
    """Σ over leaves of ⟨leaf[i], direction⟩; leaves [B, *shape] and [*shape], result [B]."""

    def inner(leaf: jax.Array, along: jax.Array) -> jax.Array:
        dtype = accumulator_dtype(leaf.dtype)
        return jnp.einsum("i...,...->i", leaf.astype(dtype), along.astype(dtype), precision="highest")

    return total(jax.tree.map(inner, tree, direction))


def total(tree: PyTree) -> Any:
    """Sum of all leaves (of equal or broadcastable shapes)."""
    return sum(jax.tree.leaves(tree))


def add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise sum."""
    return jax.tree.map(jnp.add, a, b)


def paths(tree: PyTree) -> list[str]:
    """A unique name for each leaf, in the order of jax.tree.leaves: the keys of its path joined by "/".

    A key that is empty, contains a "/" or starts like a quoted key is quoted as in Python: {"a/b": …} gives 'a/b' with
    its quotes. If two names are still equal (keys 0 and "0" of one node, an attribute and a key of one name), those
    leaves use JAX's own notation, <['0']>. If that is equal too, they also get their position in the tree, <[0]>#1.
    """
    keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = ["/".join(map(_key_text, path)) for path in keys]
    names = _told_apart(names, [f"<{jax.tree_util.keystr(path)}>" for path in keys])
    return _told_apart(names, [f"{name}#{i}" for i, name in enumerate(names)])


def _told_apart(names: list[str], longer: list[str]) -> list[str]:
    """The names, with the longer one for each duplicate."""
    counts = collections.Counter(names)
    return [long if counts[name] > 1 else name for name, long in zip(names, longer, strict=True)]


def _key_text(entry: Any) -> str:
    """One key of a path, quoted if the name would be ambiguous."""
    text = jax.tree_util.keystr((entry,), simple=True)
    return repr(text) if not text or "/" in text or text[0] in "'\"<" else text
