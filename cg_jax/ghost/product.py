"""Rules that express a gradient as a product. Most uses of a parameter are a product.

For one example, with N independent products over T positions,

    G[n] = A[n]ᵀ B[n],    A [N, T, D] from the input, B [N, T, P] from the cotangent of the output,

is the gradient of the view, rearranged. A convolution is such a product over the patches of its input. Then
‖G‖² = Σₙ ⟨A Aᵀ, B Bᵀ⟩ (Gram), or ‖A‖² ‖B‖² if T = 1, does not need G.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Factors = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Product(NamedTuple):
    """A rule that gives the gradient of one operand as products, summed over positions.

    For ONE example, with N independent products over T positions,

        G[n] = A[n]ᵀ B[n] = Σₜ a[n, t] b[n, t]ᵀ,    A [N, T, D] from the input, B [N, T, P] from the cotangent,

    and the gradient is G, rearranged. A dense layer y = x W has N = 1, A = x [1, T, D] and B = the cotangent of y,
    [1, T, P]. The engine computes ‖g‖² in the cheapest of three ways: ‖a‖² ‖b‖² if T = 1, ⟨AAᵀ, BBᵀ⟩, or from G
    itself. It also computes the sum Σ gᵢ over the batch from the product. The rule also works in the body of
    `jax.lax.scan`.

    Attributes:
        factors: factors(input, cotangent) → (A, B), of ONE example. The engine adds the batch axis, [B, ...], by
            `jax.vmap`. `input` is the one operand of the equation that depends on the example (if more do, the rule is
            not used). `cotangent` has the shape of the output.
        to_view: to_view(G [N, D, P]) → the gradient, in the shape of the operand. It must rearrange G: each entry
            occurs once in the result.
        dims: (N, T, D, P).
        precision: The precision of the products, as in `jax.lax.dot_general`.
        sides: One letter for each axis of the operand, "N", "D" or "P", if the axes of N, D and P are axes of the
            operand, each in its order: "DP" for W [D, P]. Without it the rule holds for a parameter that is used as it
            is or rearranged; with it also for one that is scaled, masked, or used several times.
        rearranges, of_batch, keeps_entries, d_axes, scale, is_shared: For the built-in rules only.

    Examples:
        The rule of a vector times a matrix, x [D] and W [D, P] (cg_jax already has one):

        >>> import jax.numpy as jnp, cg_jax as cg
        >>> def times(eqn, view):
        ...     x, w = (operand.aval.shape for operand in eqn.invars)
        ...     if view != 1 or len(x) != 1 or len(w) != 2:
        ...         return None
        ...     def factors(x, cotangent):
        ...         return x[None, None], cotangent[None, None]
        ...     return cg.Product(factors, lambda g: g[0], dims=(1, 1, *w), sides="DP")
        >>> with cg.register_rule("dot_general", times):
        ...     cg.per_example_sq_norms(lambda w, x: (x @ w).sum())(jnp.zeros((2, 3)), jnp.array([[3.0, 4.0]]))
        Array([75.], dtype=float32)
    """

    factors: Factors
    to_view: Callable[[jax.Array], jax.Array]
    dims: tuple[int, int, int, int]
    precision: Any = None  # of the products, as in jax.lax.dot_general
    rearranges: bool = True  # whether A only rearranges the input; patches are much larger than it
    of_batch: Factors | None = None  # `factors` for a batch, if faster than vmap; it gives Aᵀ [B, N, D, T] for A
    keeps_entries: bool = False  # whether A and B are the input and the cotangent, rearranged
    # For each axis of the view, its letter N, D or P, each in the order of the view. None if there is no such order.
    sides: str | None = None
    d_axes: tuple[int, ...] | None = None  # the axes of D in the order of A, if it differs from the view's
    scale: Any = None  # [N, D, P], multiplies G entry by entry
    is_shared: bool = False  # whether equal layers share this object and so are traced only once


def sizes(shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    """The lengths of some axes of a shape."""
    return tuple(shape[i] for i in axes)


def lift(product: Product, length: int, is_slice: bool) -> Product:
    """The product of a use in the body of a scan: positions of all steps together, or one product per slice."""
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
    """One product over the positions of several, for lists of inputs and cotangents. `flipped` ones swap A and B."""
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
