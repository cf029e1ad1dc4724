"""Compute per-example arrays for a few examples at a time, so that not all exist at once.

If the compiler may shard a batch over devices, chunks are cut inside each shard. A loop over chunks of the whole batch
would make every device gather all of them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from cg_jax import trees
from cg_jax._types import PyTree
from cg_jax.ghost import varying


def in_chunks(f: Callable[[PyTree], jax.Array], rows: PyTree, chunk: int) -> jax.Array:
    """f(rows) [B], with at most `chunk` rows at once on each device. `f` accepts any number of rows."""
    shards = _by_shard(rows, chunk)
    if shards is not None:
        return _joined(jax.vmap(lambda part: _in_chunks(f, part, chunk))(shards))
    return _in_chunks(f, rows, chunk)


def _in_chunks(f: Callable[[PyTree], jax.Array], rows: PyTree, chunk: int) -> jax.Array:
    head, tail = _split(rows, chunk)
    if head is None:
        return f(rows)
    _, done = jax.lax.scan(lambda _, part: (None, f(part)), None, head)
    done = _joined(done)
    return done if tail is None else jnp.concatenate([done, f(tail)])


def accumulate(gradients: Callable[[PyTree], PyTree], rows: PyTree, chunk: int) -> tuple[PyTree, PyTree]:
    """(‖gᵢ‖² [B], Σ gᵢ) of the gᵢ = gradients(rows), leaf by leaf, with at most `chunk` of the gᵢ at once.

    `gradients` accepts any number of rows [b, ...] and returns as many gradients [b, *shape].
    """
    (sq_norms, _), total = accumulate_with(lambda part: (gradients(part), ()), rows, chunk)
    return sq_norms, total


def accumulate_with(
    gradients: Callable[[PyTree], tuple[PyTree, PyTree]], rows: PyTree, chunk: int
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """((‖gᵢ‖² [B], beside [B, ...]), Σ gᵢ), where (gᵢ, beside) = gradients(rows)."""
    shards = _by_shard(rows, chunk)
    if shards is None:
        return _accumulate(gradients, rows, chunk)
    by_row, totals = jax.vmap(lambda part: _accumulate(gradients, part, chunk))(shards)
    return _joined(by_row), jax.tree.map(lambda total: total.sum(0), totals)


def _accumulate(
    gradients: Callable[[PyTree], tuple[PyTree, PyTree]], rows: PyTree, chunk: int
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    def of_rows(part: PyTree) -> tuple[tuple[PyTree, PyTree], PyTree]:
        grads, beside = gradients(part)
        if jax.tree.leaves(part)[0].shape[0] == 1:  # nothing to add up
            return (trees.row_sq_norms(grads), beside), jax.tree.map(lambda g: g[0], grads)
        return (trees.row_sq_norms(grads), beside), trees.row_sums(grads)

    head, tail = _split(rows, chunk)
    if head is None:
        return of_rows(rows)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        by_row, sums = of_rows(part)
        return trees.add(total, sums), by_row

    _, shapes = jax.eval_shape(of_rows, jax.tree.map(lambda leaf: leaf[0], head))
    total, by_row = jax.lax.scan(step, jax.tree.map(varying.zeros, shapes), head)
    by_row = _joined(by_row)
    if tail is not None:
        more_by_row, more = of_rows(tail)
        by_row = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), by_row, more_by_row)
        total = trees.add(total, more)
    return by_row, total


def of_each(gradient: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """The function of rows that maps `gradient` over them. A single row is not computed as a batch of one."""

    def gradients(rows: PyTree) -> PyTree:
        if jax.tree.leaves(rows)[0].shape[0] > 1:
            return jax.vmap(gradient)(rows)
        return jax.tree.map(lambda g: g[None], gradient(jax.tree.map(lambda leaf: leaf[0], rows)))

    return gradients


def _by_shard(rows: PyTree, chunk: int) -> PyTree | None:
    """Rows as [shards, size, ...] if the compiler may shard them and one chunk does not hold all."""
    size = jax.tree.leaves(rows)[0].shape[0]
    shards = math.gcd(size, auto_shards(rows)) if chunk < size else 1
    return None if shards == 1 else jax.tree.map(lambda x: x.reshape(shards, size // shards, *x.shape[1:]), rows)


def auto_shards(tree: PyTree) -> int:
    """The most devices that the compiler may shard arrays over: those on the Auto axes of their mesh."""
    sizes = [1]
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        kinds = () if mesh is None else zip(mesh.axis_types, mesh.axis_sizes, strict=True)
        sizes.append(math.prod(size for kind, size in kinds if kind == AxisType.Auto))
    return max(sizes)


def _joined(tree: PyTree) -> PyTree:
    """[n, size, ...] as [n size, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def _split(rows: PyTree, chunk: int) -> tuple[PyTree | None, PyTree | None]:
    """(rows [steps, chunk, ...], the remainder or None). (None, None) if one chunk holds all."""
    size = jax.tree.leaves(rows)[0].shape[0]
    if chunk >= size:
        return None, None
    # Prefer equal chunks without a remainder, since the remainder is compiled a second time.
    chunk = next((c for c in range(chunk, chunk // 2, -1) if size % c == 0), chunk)
    whole = size - size % chunk
    head = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // chunk, chunk, *leaf.shape[1:]), rows)
    tail = jax.tree.map(lambda leaf: leaf[whole:], rows) if whole < size else None
    return head, tail
