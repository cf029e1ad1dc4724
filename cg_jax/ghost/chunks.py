"""Per-example arrays, a few examples at a time, so that they need not all exist at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees

PyTree = Any


def in_chunks(f: Callable[[PyTree], jax.Array], rows: PyTree, chunk: int) -> jax.Array:
    """f(rows) [B], with at most `chunk` rows at once; `f` takes any number of rows."""
    head, tail = _split(rows, chunk)
    if head is None:
        return f(rows)
    _, done = jax.lax.scan(lambda _, part: (None, f(part)), None, head)
    done = done.reshape(-1, *done.shape[2:])
    return done if tail is None else jnp.concatenate([done, f(tail)])


def accumulate(gradients: Callable[[PyTree], PyTree], rows: PyTree, chunk: int) -> tuple[PyTree, PyTree]:
    """(‖gᵢ‖² [B], Σ gᵢ) of the gᵢ = gradients(rows), leaf by leaf, with at most `chunk` of the gᵢ at once.

    `gradients` takes any number of rows [b, ...], and gives as many gradients [b, *shape].
    """

    def of_rows(part: PyTree) -> tuple[PyTree, PyTree]:
        grads = gradients(part)
        if jax.tree.leaves(part)[0].shape[0] == 1:  # nothing to add up
            return trees.row_sq_norms(grads), jax.tree.map(lambda g: g[0], grads)
        return trees.row_sq_norms(grads), trees.row_sums(grads)

    head, tail = _split(rows, chunk)
    if head is None:
        return of_rows(rows)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        sq_norms, sums = of_rows(part)
        return trees.add(total, sums), sq_norms

    _, shapes = jax.eval_shape(of_rows, jax.tree.map(lambda leaf: leaf[0], head))
    total, sq_norms = jax.lax.scan(step, jax.tree.map(_compat.zeros, shapes), head)
    sq_norms = jax.tree.map(lambda leaf: leaf.reshape(-1), sq_norms)
    if tail is not None:
        more_norms, more = of_rows(tail)
        sq_norms = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), sq_norms, more_norms)
        total = trees.add(total, more)
    return sq_norms, total


def of_each(gradient: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """The function of rows that does `gradient` for each; one row alone is done as one, not as a batch of one."""

    def gradients(rows: PyTree) -> PyTree:
        if jax.tree.leaves(rows)[0].shape[0] > 1:
            return jax.vmap(gradient)(rows)
        return jax.tree.map(lambda g: g[None], gradient(jax.tree.map(lambda leaf: leaf[0], rows)))

    return gradients


def _split(rows: PyTree, chunk: int) -> tuple[PyTree | None, PyTree | None]:
    """(rows [steps, chunk, ...], the rest or None); no head where one chunk holds all."""
    size = jax.tree.leaves(rows)[0].shape[0]
    if chunk >= size:
        return None, None
    # As many chunks as are needed, of equal size where that leaves no rest: the rest is compiled a second time.
    chunk = next((c for c in range(chunk, chunk // 2, -1) if size % c == 0), chunk)
    whole = size - size % chunk
    head = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // chunk, chunk, *leaf.shape[1:]), rows)
    tail = jax.tree.map(lambda leaf: leaf[whole:], rows) if whole < size else None
    return head, tail
