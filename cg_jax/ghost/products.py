"""Norms and sums of the gradients AᵀB of a batch, and the choice of the method.

The choice is by operations and bytes, measured in benchmarks/crossover.py and explained in docs/engine.md:

- T = 1: ‖a‖² ‖b‖², nothing is built.
- Instantiating G = AᵀB takes T D P multiplications, the same as the sum alone, and gives the sum too. But it writes
  and reads D P numbers per example. Gram takes the sum and T² (D + P) more multiplications. The known limit by
  operations, T < D P / (D + P), counts the sum separately and does not apply. Gram wins by the numbers that it does not
  write. Each is worth about 20 multiplications, as measured: T² (D + P) ≤ 20 D P. The factor is 4 if A holds patches,
  which Gram must store. On an accelerator the known limit by memory, 2 T² ≤ D P, is used until it is measured.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._types import PyTree
from cg_jax.ghost import varying
from cg_jax.ghost.chunks import accumulate, accumulate_with, in_chunks
from cg_jax.ghost.product import Product

# The cost of one number of G in multiplications, on a CPU.
_PER_NUMBER = 20
_PER_NUMBER_OF_PATCHES = 4
# The most inner products of pairs that are built for one tensor, 64 MiB in float32.
_PAIRS = 2**24
# On a CPU, arrays that fit this cache are several times faster.
_CACHE_BYTES = 2**20
# Gradients of a block of coordinates, of all examples, that are worth a step of a loop.
_WORTH_A_STEP = 2**14


def product_form(product: Product) -> str:
    """How to compute ‖Aᵀ B‖²: "closed" (T = 1), "gram", or "instantiate", which also gives the sum of Aᵀ B."""
    _, t, d, p = product.dims
    if t == 1:
        return "closed"
    if product.scale is not None:
        return "instantiate"
    if jax.default_backend() == "cpu":
        worth = _PER_NUMBER if product.rearranges else _PER_NUMBER_OF_PATCHES
        return "gram" if t * t * (d + p) <= worth * d * p else "instantiate"
    return "gram" if 2 * t * t <= d * p else "instantiate"


def is_faster_flipped(product: Product) -> bool:
    """Whether BᵀA is faster than AᵀB. On XLA:CPU, as measured, a wide B should come first, unless Aᵀ is given."""
    _, _, d, p = product.dims
    return jax.default_backend() == "cpu" and product.of_batch is None and 64 <= p < d


def product_bytes(product: Product, form: str, itemsize: int) -> int:
    """Bytes of the arrays for one example: G or the two T × T arrays, and the patches of a convolution."""
    n, t, d, p = product.dims
    patches = 0 if product.rearranges else n * t * d
    built = {"closed": 0, "gram": 2 * n * t * t, "instantiate": n * d * p}[form]
    return (built + patches) * itemsize


def product_chunk(product: Product, form: str, itemsize: int, limit: int) -> int:
    """The number of examples whose arrays are built at once."""
    size = max(1, product_bytes(product, form, itemsize))
    chunk = max(1, limit // size)
    if form == "instantiate" and jax.default_backend() == "cpu":
        if product.rearranges:
            return min(chunk, max(1, _CACHE_BYTES // size))
        return min(chunk, 8 if 8 * size <= 4 * _CACHE_BYTES else 4)
    return chunk


def instantiated(product: Product, x: Any, cotangent: Any, dtype: Any, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(‖AᵀB‖² [B], Σ AᵀB as the gradient of the view), both from the same arrays."""
    n, _, d, p = product.dims
    flip = is_faster_flipped(product)
    size = jax.tree.leaves(x)[0].shape[0]
    if size * n * d * p == 0:
        return jnp.zeros(size, dtype), product.to_view(jnp.zeros((n, d, p), dtype))
    sq_norms, total = accumulate(_instantiate(product, dtype, flip), (x, cotangent), chunk)
    return sq_norms, product.to_view(total.swapaxes(1, 2) if flip else total)


def instantiated_rows(product: Product, x: Any, cotangent: Any, dtype: Any, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(‖AᵀB‖² [B], AᵀB [B, N, D, P]) of a batch that is not empty."""
    gradients = _instantiate(product, dtype, flip=False)
    (sq_norms, rows), _ = accumulate_with(lambda part: (g := gradients(part), g), (x, cotangent), chunk)
    return sq_norms, rows


def _instantiate(product: Product, dtype: Any, flip: bool) -> Callable[[tuple[jax.Array, jax.Array]], jax.Array]:
    """The function of rows (inputs, cotangents) that gives AᵀB [b, N, D, P], or BᵀA if it flips."""
    n, _, d, p = product.dims
    order, shape = ("pd", (p, d)) if flip else ("dp", (d, p))
    scale = product.scale.swapaxes(1, 2) if flip and product.scale is not None else product.scale

    def gradients(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, b, letters = factors_of(product, *rows)
        a, b = (each.reshape(-1, *each.shape[2:]) for each in (a, b))
        if a.shape[0] == 1:  # XLA computes one product faster than a batch of one
            g = _dot(product, dtype, f"{letters},tp->{order}", a[0], b[0])
        else:
            g = _dot(product, dtype, f"n{letters},ntp->n{order}", a, b)
        g = g.reshape(-1, n, *shape)
        return g if scale is None else g * scale.astype(g.dtype)[None]

    return gradients


def without_gradients(product: Product, form: str, x: Any, cotangent: Any, dtype: Any, chunk: int) -> jax.Array:
    """‖AᵀB‖² [B] = ⟨AAᵀ, BBᵀ⟩, or ‖A‖² ‖B‖² if there is one position.

    Inputs and cotangents near the limits of the range are scaled, since their squares may leave it even if the square
    of the product fits.
    """
    if product.is_shared:
        return _without_gradients_once(product, form, x, cotangent, dtype, chunk)
    return _in_range(product, form, x, cotangent, dtype, chunk)


def _in_range(product: Product, form: str, x: Any, cotangent: Any, dtype: Any, chunk: int) -> jax.Array:
    sizes = _size(x), _size(cotangent)
    x, cotangent = _scaled(x, 1 / sizes[0]), _scaled(cotangent, 1 / sizes[1])
    sq_norms = _without_gradients(product, form, x, cotangent, dtype, chunk)
    for size in (*sizes, *sizes):  # one after the other, since the square of one size may leave the range
        sq_norms = sq_norms * size.astype(sq_norms.dtype)
    return sq_norms


_without_gradients_once = jax.jit(_in_range, static_argnums=(0, 1, 4, 5))


@jax.jit
def _size(rows: PyTree) -> jax.Array:
    """A scale for each row: 1, or near the limits of the range a power of two to divide by, so that squares fit."""
    sizes = [jnp.abs(x).max(tuple(range(1, x.ndim)), initial=0) for x in jax.tree.leaves(rows)]
    largest = jnp.stack([size.astype(trees.accumulator_dtype(size.dtype)) for size in sizes]).max(0)
    inside = ((largest > 2.0**-40) & (largest < 2.0**40)) | (largest == 0)
    # The power and its inverse must be normal numbers: XLA:CPU flushes others to zero.
    most = 0.75 * jnp.finfo(largest.dtype).maxexp
    exponent = jnp.clip(jnp.floor(jnp.log2(jnp.where(inside, 1, largest))), -most, most)
    return jnp.where(inside, 1, jnp.exp2(exponent))


@jax.jit
def _scaled(rows: PyTree, factor: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x * factor.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), rows)


def _without_gradients(product: Product, form: str, x: Any, cotangent: Any, dtype: Any, chunk: int) -> jax.Array:
    if form == "closed" and product.keeps_entries and product.dims[0] == 1:  # nothing to trace
        of_input, of_cotangent = trees.row_sq_norms((x, cotangent))
        return of_input * of_cotangent

    def sq_norms(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, b, letters = factors_of(product, *rows)
        if form == "closed" and product.scale is not None:
            a, b, scale = (jnp.square(each.astype(dtype)) for each in (a[:, :, 0], b[:, :, 0], product.scale))
            return (_dot(product, dtype, "bnd,ndp->bnp", a, scale) * b).sum((1, 2))
        if form == "closed":
            return (_sq_norms(a, 2 + letters.index("d")) * _sq_norms(b, 3)).sum((1, 2))
        return _gram(product, dtype, a, b, letters)

    return in_chunks(sq_norms, (x, cotangent), chunk)


def sum_of_products(product: Product, x: Any, cotangent: Any, dtype: Any) -> jax.Array:
    """Σ AᵀB over the batch, as the gradient of the view."""
    return (_sum_once if product.is_shared else _sum)(product, x, cotangent, dtype)


def _sum(product: Product, x: Any, cotangent: Any, dtype: Any) -> jax.Array:
    a, b, letters = factors_of(product, x, cotangent)
    total = _dot(product, dtype, f"bn{letters},bntp->ndp", a, b)
    return product.to_view(total if product.scale is None else total * product.scale.astype(dtype))


_sum_once = jax.jit(_sum, static_argnums=(0, 3))


def along(product: Product, x: Any, cotangent: Any, direction: jax.Array) -> jax.Array:
    """⟨gᵢ, v⟩ [B] = Σₜ aₜᵀ V bₜ, with V the direction v as a gradient of the product."""
    n, _, d, p = product.dims
    matrix = varying.transposed(product.to_view, (n, d, p), direction)
    if product.scale is not None:
        matrix = matrix * product.scale.astype(matrix.dtype)
    a, b, letters = factors_of(product, x, cotangent)
    a, b = (each.astype(direction.dtype) for each in (a, b))
    if n == 1:  # XLA computes one product faster than a batch of one
        return (_dot(product, direction.dtype, f"b{letters},dp->btp", a[:, 0], matrix[0]) * b[:, 0]).sum((1, 2))
    return (_dot(product, direction.dtype, f"bn{letters},ndp->bntp", a, matrix) * b).sum((1, 2, 3))


def has_cheap_pairs(product: Product, size: int) -> bool:
    """Whether the inner products of all pairs of `size` gradients cost less than one weighted sum and its alignments.

    Pairs take B² (D + P) multiplications, the others 2 B D P. With several positions, rounding would be relative to
    the positions and not to their sum.
    """
    n, t, d, p = product.dims
    is_cheap = size * (d + p) <= 2 * d * p and n * size * size <= _PAIRS
    return t == 1 and product.scale is None and is_cheap


def pairs(product: Product, x: Any, cotangent: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(K [B, B], s [B]) with gᵢ · gⱼ = sᵢ sⱼ Kᵢⱼ = Σₙ (aᵢ · aⱼ)(bᵢ · bⱼ), of a product with one position.

    The scales are 1 but near the limits of the range, where gᵢ · gᵢ may leave it though other pairs do not.
    """
    sizes = _size(x), _size(cotangent)
    a, b, _ = factors_of(product, _scaled(x, 1 / sizes[0]), _scaled(cotangent, 1 / sizes[1]))
    inner = [_dot(product, dtype, "inc,jnc->nij", *[rows.reshape(*rows.shape[:2], -1)] * 2) for rows in (a, b)]
    return (inner[0] * inner[1]).sum(0), sizes[0].astype(dtype) * sizes[1].astype(dtype)


def factors_of(product: Product, x: Any, cotangent: Any) -> tuple[jax.Array, jax.Array, str]:
    """(A, B [B, N, T, P], the letters of the last two axes of A) of a batch."""
    if product.of_batch is None:
        return *jax.vmap(product.factors)(x, cotangent), "td"
    return *product.of_batch(x, cotangent), "dt"


def _dot(product: Product, dtype: Any, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    left, right = spec.split("->")[0].split(",")
    if jax.default_backend() == "cpu" and set(left) & set(right) & set(spec.split("->")[1]):
        a, b = a.astype(dtype), b.astype(dtype)  # XLA:CPU has no product of batches of narrow arrays with a wide result
    return jnp.einsum(spec, a, b, precision=product.precision, preferred_element_type=dtype)


def _gram(product: Product, dtype: Any, a: jax.Array, b: jax.Array, letters: str) -> jax.Array:
    """⟨AAᵀ, BBᵀ⟩ [B] of factors [B, N, T, D] and [B, N, T, P], as AᵀB = A′ᵀB′ + T ā b̄ᵀ with A′ = A − ā, B′ = B − b̄.

    Rounding is relative to the factors, not to the product. If positions are nearly equal and their cotangents cancel,
    as for the difference of two views of one input, no digit would be correct. With centred factors the digits are.
    Narrow factors are not centred, since that would round them again.
    """
    other = letters.replace("t", "s")
    at = 2 + letters.index("t")

    def of_inner(a: jax.Array, c: jax.Array, b: jax.Array, d: jax.Array) -> jax.Array:
        inner_a = _dot(product, dtype, f"bn{letters},bn{other}->bnts", a, c)
        return (inner_a * _dot(product, dtype, "bntp,bnsp->bnts", b, d)).sum((1, 2, 3))

    if a.dtype != trees.accumulator_dtype(a.dtype) or b.dtype != trees.accumulator_dtype(b.dtype):
        return jnp.maximum(of_inner(a, a, b, b), 0)
    positions = max(1, b.shape[2])  # without positions, the mean is zero
    mean_a, mean_b = a.sum(at, keepdims=True) / positions, b.sum(2, keepdims=True) / positions
    a, b = a - mean_a, b - mean_b
    mixed = of_inner(a, mean_a, b, mean_b)
    means = (_sq_norms(mean_a, 2 + letters.index("d")) * _sq_norms(mean_b, 3)).sum((1, 2))
    return jnp.maximum(of_inner(a, a, b, b) + 2 * positions * mixed + positions**2 * means, 0)


def _sq_norms(x: jax.Array, axis: int) -> jax.Array:
    """Squared norms along one axis, in the accumulator dtype."""
    return jnp.square(x.astype(trees.accumulator_dtype(x.dtype))).sum(axis)


def row_width(products: Iterable[Product], examples: int, total: int, width: int) -> int:
    """P, if nearly all of `total` coordinates are of products of T = 1 with this P ≤ `width`; else `width`.

    A block of P coordinates is then one number times one row for each example, which XLA:CPU vectorises. It does not do
    so for several rows, whose entries it finds by division: building them takes several times longer.
    """
    sizes: dict[int, int] = {}
    for product in products:
        n, t, d, p = product.dims
        if t == 1 and p <= width and p * examples >= _WORTH_A_STEP:
            sizes[p] = sizes.get(p, 0) + n * d * p
    return next((p for p, size in sizes.items() if size > 0.9 * total), width)
