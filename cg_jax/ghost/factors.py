"""Gradients as sums of products with labelled axes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax.ghost.product import Product


class NotSeparableError(Exception):
    """Raised if the gradient through a view is no longer a sum of products."""


class Factors(NamedTuple):
    """A gradient Σₜ a[…, t, …] b[…, t, …], for one example.

    Each axis is labelled "N" (in both factors), "D" (in a) or "P" (in b). Within a factor the axes keep their order.
    """

    a: jax.Array  # [*N, T, *D]
    b: jax.Array  # [*N, T, *P]
    sides: str
    scale: jax.Array | None = None  # multiplies the gradient entry by entry; has its shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gradient."""
        return tuple(self.factor(axis).shape[self.place(axis)] for axis in range(len(self.sides)))

    def factor(self, axis: int) -> jax.Array:
        """The factor that has this axis of the gradient."""
        return self.b if self.sides[axis] == "P" else self.a

    def place(self, axis: int) -> int:
        """The position of this axis in that factor."""
        side = self.sides[axis]
        return self.sides[:axis].count(side) + (0 if side == "N" else self.sides.count("N") + 1)

    def on(self, axis: int, change: Callable[[jax.Array, int], jax.Array]) -> "Factors":
        """Replace the factor with this axis, or both, by change(factor, position of the axis)."""
        place, side = self.place(axis), self.sides[axis]
        a = change(self.a, place) if side in "ND" else self.a
        b = change(self.b, place) if side in "NP" else self.b
        return self._replace(a=a, b=b)


def initial(product: Product, shape: tuple[int, ...], x: jax.Array, cotangent: jax.Array) -> Factors:
    """The factors of a product as factors of the gradient of its view, which has this shape."""
    if product.sides is None:
        raise NotSeparableError
    a, b = product.factors(x, cotangent)
    n, d, p = ([i for i, side in enumerate(product.sides) if side == letter] for letter in "NDP")
    held = product.d_axes or tuple(d)
    a = a.reshape(*(shape[i] for i in n), a.shape[1], *(shape[i] for i in held))
    a = a.transpose(*range(len(n) + 1), *(len(n) + 1 + held.index(i) for i in d))
    return Factors(a, b.reshape(*(shape[i] for i in n), b.shape[1], *(shape[i] for i in p)), product.sides)


def to_product(
    shape: tuple[int, ...], of_example: Callable[[Any, Any], Factors], like: Factors, product: Product
) -> Product:
    """A product whose view is the parameter itself, of this shape. `like` are its factors, or their shapes."""
    order = [i for letter in "NDP" for i, side in enumerate(like.sides) if side == letter]
    n, d, p = (math.prod(shape[i] for i, side in enumerate(like.sides) if side == letter) for letter in "NDP")
    t = like.a.shape[like.sides.count("N")]

    def factors(x: Any, cotangent: Any) -> tuple[jax.Array, jax.Array]:
        of_one = of_example(x, cotangent)
        return of_one.a.reshape(n, t, d), of_one.b.reshape(n, t, p)

    def to_view(gradient: jax.Array) -> jax.Array:
        return gradient.reshape([shape[i] for i in order]).transpose([order.index(i) for i in range(len(order))])

    scale: Any = like.scale
    if isinstance(scale, jax.ShapeDtypeStruct):
        scale = jax.ShapeDtypeStruct((n, d, p), scale.dtype)
    elif scale is not None:
        scale = scale.transpose(order).reshape(n, d, p)
    of_parameter = product._replace(factors=factors, of_batch=None, to_view=to_view, dims=(n, t, d, p))
    return of_parameter._replace(keeps_entries=False, is_shared=False, d_axes=None, sides=like.sides, scale=scale)


def is_complex(value: Any) -> bool:
    """Whether an array or an aval has a complex dtype."""
    return jnp.issubdtype(value.dtype, jnp.complexfloating)


def wider(factor: jax.Array, value: jax.Array) -> Any:
    """The dtype of a factor times a value: that of the factor, or complex if the value is."""
    return jnp.result_type(factor, jnp.complex64) if is_complex(value) else factor.dtype
