"""Convolutions as products: A holds the patches of the input that the kernel sees, B the cotangents."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cg_jax.ghost.product import Product, sizes


def conv_general_dilated(eqn: Any, view: int) -> Product | None:
    """lax.conv_general_dilated in any number of dimensions: strides, padding, both dilations, feature groups."""
    params = eqn.params
    if view != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image, kernel, out = (var.aval.shape for var in (*eqn.invars, eqn.outvars[0]))
    window, positions = sizes(kernel, numbers.rhs_spec[2:]), sizes(out, numbers.out_spec[2:])
    channels, features = kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]] // groups
    t, d = image[numbers.lhs_spec[0]] * math.prod(positions), math.prod(window) * channels

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        edges = [
            (0, 0, 0),
            *((lo, hi, gap - 1) for (lo, hi), gap in zip(params["padding"], params["lhs_dilation"], strict=True)),
            (0, 0, 0),
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), edges)
        x = x.reshape(*x.shape[:-1], groups, channels)
        if channels < 3:  # positions innermost: rows of one or two numbers are slow to copy
            pieces = [_window(x, place, positions, params).reshape(t, groups, channels) for place in _places(window)]
            a = jnp.stack([piece.transpose(1, 2, 0) for piece in pieces], axis=1)  # [G, K, C, T]
            a = a.reshape(groups, d, t).transpose(0, 2, 1)
        else:
            a = _patches(x, window, positions, params).reshape(t, groups, d).transpose(1, 0, 2)
        b = cotangent.transpose(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        return a, b.reshape(t, groups, features).transpose(1, 0, 2)

    def to_view(gradient: jax.Array) -> jax.Array:
        spread = gradient.reshape(groups, *window, channels, features)
        # → [G, P, C, *window], the first two together the kernel's output channels.
        rank = len(window)
        spread = spread.transpose(0, rank + 2, rank + 1, *range(1, rank + 1))
        spread = spread.reshape(groups * features, channels, *window)
        return spread.transpose(*(numbers.rhs_spec.index(axis) for axis in range(len(kernel))))

    # Only where they stand so are the axes of D in the order of the kernel's.
    in_order = groups == 1 and numbers.rhs_spec == (len(kernel) - 1, len(kernel) - 2, *range(len(window)))
    sides = "D" * (len(kernel) - 1) + "P" if in_order else None
    return Product(factors, to_view, (groups, t, d, features), params["precision"], rearranges=False, sides=sides)


def _places(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every position in the kernel window, in row-major order."""
    places: list[tuple[int, ...]] = [()]
    for size in window:
        places = [(*place, i) for place in places for i in range(size)]
    return places


def _window(x: jax.Array, place: tuple[int, ...], positions: tuple[int, ...], params: Any) -> jax.Array:
    """What the kernel's entry at `place` sees: a strided slice of the padded input [N, *spatial, G, C]."""
    for axis, (start, size) in enumerate(zip(place, positions, strict=True)):
        x = _along(x, axis, start, size, params)
    return x


def _along(x: jax.Array, axis: int, start: int, size: int, params: Any) -> jax.Array:
    """The same along one of the spatial axes."""
    first, step = start * params["rhs_dilation"][axis], params["window_strides"][axis]
    return lax.slice_in_dim(x, first, first + (size - 1) * step + 1, step, axis + 1)


def _patches(x: jax.Array, window: tuple[int, ...], positions: tuple[int, ...], params: Any) -> jax.Array:
    """[N, *positions, G, K C] of a padded input [N, *spatial, G, C]."""
    if x.shape[-1] < 64:
        return jnp.concatenate([_window(x, place, positions, params) for place in _places(window)], axis=-1)
    # Axis by axis copies more, but has fewer pieces to compile; long rows are copied fast.
    for axis in reversed(range(len(window))):
        x = jnp.concatenate([_along(x, axis, i, positions[axis], params) for i in range(window[axis])], axis=-1)
    return x
