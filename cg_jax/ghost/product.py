"""Most uses of a parameter are a product in disguise.

For one example, with N independent products over T positions,

    G[n] = A[n]ᵀ B[n],    A [N, T, D] from the input, B [N, T, P] from the cotangent of the output,

is the gradient of the view, rearranged; a convolution is such a product over the patches of its input. Then
‖G‖² = Σₙ ⟨A Aᵀ, B Bᵀ⟩ (Gram), or ‖A‖² ‖B‖² where T = 1, needs no G.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Factors = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Product(NamedTuple):
    """A use whose view's gradient is G[n] = A[n]ᵀ B[n], rearranged; for one example."""

    factors: Factors  # (input, cotangent) → (A, B)
    to_view: Callable[[jax.Array], jax.Array]  # G [N, D, P] → a gradient of the view's shape
    dims: tuple[int, int, int, int]  # N, T, D, P
    precision: Any = None  # of the products, as in jax.lax.dot_general
    rearranges: bool = True  # whether A only rearranges the input; patches are many times the input
    of_batch: Factors | None = None  # the same for a batch, where that is faster than vmap; A then as Aᵀ [B, N, D, T]
    keeps_entries: bool = False  # whether A and B are the input and the cotangent, rearranged
    # For each axis of the view, whether it is one of N, D or P, in which they stand in the view's order; None: no such
    sides: str | None = None
    d_axes: tuple[int, ...] | None = None  # the view's axes of D as A has them, where that is another order
    scale: Any = None  # [N, D, P], multiplies G entry by entry
    is_shared: bool = False  # whether equal layers have this very object, so that they need to be traced once only


def sizes(shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    """The lengths of some axes of a shape."""
    return tuple(shape[i] for i in axes)


def dot_general(eqn: Any, view: int) -> Product:
    """lax.dot_general with any dimension numbers, the parameter on either side."""
    contract, batch = (tuple(map(tuple, pair)) for pair in eqn.params["dimension_numbers"])
    shapes = tuple(var.aval.shape for var in eqn.invars)
    return _dot_general(contract, batch, shapes, eqn.params["precision"], view)


@functools.lru_cache(maxsize=4096)
def _dot_general(contract: Any, batch: Any, shapes: tuple[tuple[int, ...], ...], precision: Any, view: int) -> Product:
    other = 1 - view
    rank = len(shapes[view])
    # Contracted axes in the view's order, as all of its axes.
    pairs = sorted(zip(*contract, strict=True), key=lambda pair: pair[view])
    contract = tuple(tuple(pair[k] for pair in pairs) for k in (0, 1))
    free = [[i for i in range(len(s)) if i not in contract[k] and i not in batch[k]] for k, s in enumerate(shapes)]
    named = {
        "N": sizes(shapes[view], batch[view]),
        "T": sizes(shapes[other], free[other]),
        "D": sizes(shapes[view], contract[view]),
        "P": sizes(shapes[view], free[view]),
    }
    n, t, d, p = (math.prod(named[name]) for name in "NTDP")

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = x.transpose(*batch[other], *free[other], *contract[other]).reshape(n, t, d)
        # The output's axes are the batch, then the left side's, then the right side's.
        if view == 0:
            return a, cotangent.reshape(n, p, t).transpose(0, 2, 1)
        return a, cotangent.reshape(n, t, p)

    def to_view(gradient: jax.Array) -> jax.Array:
        order = (*batch[view], *contract[view], *free[view])
        spread = gradient.reshape(*named["N"], *named["D"], *named["P"])
        return spread.transpose(*(order.index(axis) for axis in range(len(order))))

    sides = None
    if tuple(batch[view]) == tuple(sorted(batch[view])):
        sides = "".join("D" if i in contract[view] else "N" if i in batch[view] else "P" for i in range(rank))
    product = Product(factors, to_view, (n, t, d, p), precision, keeps_entries=True, sides=sides)
    return product._replace(is_shared=True)


def lift(product: Product, length: int, is_slice: bool) -> Product:
    """The product of a use in the body of a scan: positions of all steps together; a slice has its own in each step."""
    n, t, d, p = product.dims
    dims = (length * n, t, d, p) if is_slice else (n, length * t, d, p)

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = jax.vmap(product.factors)(x, cotangent)
        if not is_slice:
            a, b = jnp.moveaxis(a, 0, 1), jnp.moveaxis(b, 0, 1)
        return a.reshape(*dims[:2], d), b.reshape(*dims[:2], p)

    def of_batch(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert product.of_batch is not None
        size = x.shape[0]
        a, b = product.of_batch(*(each.reshape(size * length, *each.shape[2:]) for each in (x, cotangent)))
        a, b = a.reshape(size, length, n, d, t), b.reshape(size, length, n, t, p)
        if not is_slice:
            a, b = a.transpose(0, 2, 3, 1, 4), b.transpose(0, 2, 1, 3, 4)
        return a.reshape(size, dims[0], d, dims[1]), b.reshape(size, *dims[:2], p)

    def to_view(gradient: jax.Array) -> jax.Array:
        return jax.vmap(product.to_view)(gradient.reshape(length, n, d, p))

    lifted = product._replace(factors=factors, dims=dims, of_batch=of_batch if product.of_batch else None)
    lifted = lifted._replace(is_shared=False)
    lifted = lifted._replace(keeps_entries=product.keeps_entries and not is_slice)
    return lifted._replace(to_view=to_view) if is_slice else lifted


def joined_positions(products: Sequence[Product], flipped: Sequence[bool]) -> Product:
    """The product over the positions of several, of lists of inputs and cotangents; in some A and B change places."""
    first = products[0]

    def factors(x: Sequence[jax.Array], cotangent: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        pairs = [product.factors(*row) for product, *row in zip(products, x, cotangent, strict=True)]
        pairs = [pair[::-1] if flip else pair for pair, flip in zip(pairs, flipped, strict=True)]
        dtypes = [jnp.result_type(*column) for column in zip(*pairs, strict=True)]
        a, b = (
            jnp.concatenate([factor.astype(dtype) for factor in column], axis=1)
            for column, dtype in zip(zip(*pairs, strict=True), dtypes, strict=True)
        )
        return a, b

    n, _, d, p = first.dims
    dims = (n, sum(product.dims[1] for product in products), d, p)
    return first._replace(factors=factors, of_batch=None, keeps_entries=False, is_shared=False, d_axes=None, dims=dims)
