"""Norms and sums over a batch of the gradients of one tensor: of products, and of gradients built in chunks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax.ghost.product import Product

PyTree = Any
# What a tensor is asked for: squared norms [B], and the sum over the batch.
Yield = tuple[jax.Array, jax.Array]


def is_faster_flipped(product: Product) -> bool:
    """Whether BᵀA is faster than AᵀB; measured on XLA:CPU, where a wide B wants to stand first."""
    _, _, d, p = product.dims
    return _compat.backend() == "cpu" and 64 <= p < d


def _dot(product: Product, dtype: Any, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=product.precision, preferred_element_type=dtype)


def instantiated(product: Product, x: jax.Array, cotangent: jax.Array, dtype: Any, chunk: int) -> Yield:
    """(‖AᵀB‖² [B], Σ AᵀB as the view's gradient), both from the same arrays."""
    dot = functools.partial(_dot, product, dtype)
    flip = is_faster_flipped(product)
    order = "pd" if flip else "dp"
    scale = product.scale.swapaxes(1, 2) if flip and product.scale is not None else product.scale

    def gradient(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, b = product.factors(*operands)
        # One product is not a batch of one: XLA does it faster.
        g = dot(f"td,tp->{order}", a[0], b[0])[None] if a.shape[0] == 1 else dot(f"ntd,ntp->n{order}", a, b)
        return g if scale is None else g * scale.astype(g.dtype)

    sq_norms, total = accumulate(gradient, (x, cotangent), chunk)
    return sq_norms, product.to_view(total.swapaxes(1, 2) if flip else total)


def without_gradients(
    product: Product, form: str, x: jax.Array, cotangent: jax.Array, dtype: Any, chunk: int
) -> jax.Array:
    """‖AᵀB‖² [B] = ⟨AAᵀ, BBᵀ⟩, or ‖A‖² ‖B‖² where there is one position."""
    dot = functools.partial(_dot, product, dtype)
    if form == "closed" and product.keeps_entries and product.dims[0] == 1:
        a, b = trees.row_sq_norms((x, cotangent))
        return a * b

    def sq_norm(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, b = product.factors(*row)
        if form == "closed":
            if product.scale is None:
                return (_last_axis_sq_norms(a) * _last_axis_sq_norms(b)).sum()
            a, b, scale = (jnp.square(each.astype(dtype)) for each in (a[:, 0], b[:, 0], product.scale))
            return (dot("nd,ndp->np", a, scale) * b).sum()
        return _gram(dot, a, b)

    return in_chunks(sq_norm, (x, cotangent), chunk)


def _gram(dot: Callable[..., jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨AAᵀ, BBᵀ⟩ of factors [N, T, D] and [N, T, P], as AᵀB = A′ᵀB′ + T ā b̄ᵀ with A′ = A − ā, B′ = B − b̄.

    Rounding is relative to the factors, not to the product. Where positions are nearly alike and their cotangents
    cancel, as for the difference of two views of one input, no digit would be right; of centred factors they are.
    Narrow factors are not centred, which would round them again.
    """
    if a.dtype != trees.accumulator_dtype(a.dtype) or b.dtype != trees.accumulator_dtype(b.dtype):
        return jnp.maximum((dot("ntd,nsd->nts", a, a) * dot("ntp,nsp->nts", b, b)).sum(), 0)
    positions, mean_a, mean_b = a.shape[1], a.mean(1, keepdims=True), b.mean(1, keepdims=True)
    a, b = a - mean_a, b - mean_b
    squares = (dot("ntd,nsd->nts", a, a) * dot("ntp,nsp->nts", b, b)).sum()
    mixed = (dot("ntd,nsd->nts", a, mean_a) * dot("ntp,nsp->nts", b, mean_b)).sum()
    means = (_last_axis_sq_norms(mean_a) * _last_axis_sq_norms(mean_b)).sum()
    return jnp.maximum(squares + 2 * positions * mixed + positions**2 * means, 0)


def sum_of_products(product: Product, x: jax.Array, cotangent: jax.Array, dtype: Any) -> jax.Array:
    """Σ AᵀB over the batch, as the view's gradient."""
    a, b = jax.vmap(product.factors)(x, cotangent)
    total = _dot(product, dtype, "bntd,bntp->ndp", a, b)
    return product.to_view(total if product.scale is None else total * product.scale.astype(dtype))


def along(product: Product, x: Any, cotangent: Any, direction: jax.Array) -> jax.Array:
    """⟨gᵢ, v⟩ [B] = Σₜ aₜᵀ V bₜ, with V the direction v as a gradient of the product."""
    n, _, d, p = product.dims
    layout = jax.ShapeDtypeStruct((n, d, p), direction.dtype)
    (matrix,) = jax.linear_transpose(product.to_view, layout)(direction)
    if product.scale is not None:
        matrix = matrix * product.scale.astype(matrix.dtype)

    def one(x: Any, cotangent: Any) -> jax.Array:
        a, b = product.factors(x, cotangent)
        moved = _dot(product, direction.dtype, "ntd,ndp->ntp", a.astype(direction.dtype), matrix)
        return (moved * b.astype(direction.dtype)).sum()

    return jax.vmap(one)(x, cotangent)


def in_chunks(f: Callable[[Any], jax.Array], rows: PyTree, chunk: int) -> jax.Array:
    """`f` of every row, `chunk` of them at once on each device."""

    def of_shard(rows: PyTree) -> jax.Array:
        size = jax.tree.leaves(rows)[0].shape[0]
        return jax.vmap(f)(rows) if chunk >= size else jax.lax.map(f, rows, batch_size=chunk)

    shards = _by_shard(rows, chunk)
    return of_shard(rows) if shards is None else _joined(jax.vmap(of_shard)(shards))


def _by_shard(rows: PyTree, chunk: int) -> PyTree | None:
    """Rows as [shards, size, ...] where the compiler may divide them over devices and a loop would be needed.

    A loop over chunks of the whole batch would make every device gather all chunks. Over chunks of each device's own
    part, nothing moves.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    shards = math.gcd(size, _compat.auto_shards(rows)) if chunk < size else 1
    return None if shards == 1 else jax.tree.map(lambda x: x.reshape(shards, size // shards, *x.shape[1:]), rows)


def _joined(tree: PyTree) -> PyTree:
    """[shards, size, ...] as [B, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def _last_axis_sq_norms(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(trees.accumulator_dtype(x.dtype))).sum(-1)


def accumulate(gradient: Callable[[Any], PyTree], operands: PyTree, chunk: int) -> tuple[PyTree, PyTree]:
    """(‖gᵢ‖² [B], Σ gᵢ) of gᵢ = gradient(operands[i]), leaf by leaf, with `chunk` of the gᵢ in existence at once."""
    sq_norms, total, _ = accumulate_with(lambda row: (gradient(row), ()), operands, chunk)
    return sq_norms, total


def accumulate_with(
    gradient: Callable[[Any], tuple[PyTree, PyTree]], operands: PyTree, chunk: int
) -> tuple[PyTree, PyTree, PyTree]:
    """(‖gᵢ‖² [B], Σ gᵢ, what comes beside them [B, ...]) of (gᵢ, beside) = gradient(operands[i])."""
    shards = _by_shard(operands, chunk)
    if shards is None:
        return _of_shard(gradient, operands, chunk)
    sq_norms, totals, beside = jax.vmap(lambda rows: _of_shard(gradient, rows, chunk))(shards)
    return _joined(sq_norms), jax.tree.map(lambda total: total.sum(0), totals), _joined(beside)


def _of_shard(
    gradient: Callable[[Any], tuple[PyTree, PyTree]], operands: PyTree, chunk: int
) -> tuple[PyTree, PyTree, PyTree]:
    """The same of the examples of one device."""
    size = jax.tree.leaves(operands)[0].shape[0]

    def of_rows(rows: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        grads, beside = jax.vmap(gradient)(rows)
        return trees.row_sums(grads), (trees.row_sq_norms(grads), beside)

    if chunk >= size:
        total, (sq_norms, beside) = of_rows(operands)
        return sq_norms, total, beside
    steps = size // chunk
    head = jax.tree.map(lambda leaf: leaf[: steps * chunk].reshape(steps, chunk, *leaf.shape[1:]), operands)
    tail = jax.tree.map(lambda leaf: leaf[steps * chunk :], operands)

    def step(total: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        if chunk == 1:  # one plain product, not a batch of one
            grad, beside = gradient(jax.tree.map(lambda leaf: leaf[0], rows))
            by_row = jax.tree.map(lambda leaf: leaf[None], (trees.sq_norms(grad), beside))
            return trees.add(total, grad), by_row
        sums, by_row = of_rows(rows)
        return trees.add(total, sums), by_row

    shapes, _ = jax.eval_shape(gradient, jax.tree.map(lambda leaf: leaf[0], operands))
    total, by_row = jax.lax.scan(step, jax.tree.map(_compat.zeros, shapes), head)
    by_row = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_row)
    if size > steps * chunk:
        more, more_by_row = of_rows(tail)
        by_row = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), by_row, more_by_row)
        total = trees.add(total, more)
    sq_norms, beside = by_row
    return sq_norms, total, beside
