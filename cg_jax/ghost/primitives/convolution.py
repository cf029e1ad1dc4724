"""Convolutions as products: A holds the patches of the input that the kernel sees, B the cotangents.

The size of the program does not depend on the size of the window. Along an axis whose windows do not overlap (a stride
as long as the kernel), patches are a reshape. Along the other axes, a loop over the entries of the kernel copies the
inputs that each entry sees, with positions innermost. Long rows are copied fast, and the product uses Aᵀ directly.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cg_jax.ghost import varying
from cg_jax.ghost.primitives.base import Primitive, size_of
from cg_jax.ghost.product import Product, sizes


class _Axis(NamedTuple):
    """The kernel along one spatial axis of the padded input."""

    window: int
    positions: int
    stride: int
    dilation: int

    @property
    def span(self) -> int:
        return (self.window - 1) * self.dilation + 1

    @property
    def is_apart(self) -> bool:
        """Whether windows at different positions share no entry of the input."""
        return self.span <= self.stride or self.positions <= 1


def rule(eqn: Any, view: int) -> Product | None:
    """lax.conv_general_dilated in any number of dimensions: strides, padding, both dilations, feature groups."""
    params = eqn.params
    if view != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image, kernel, out = (var.aval.shape for var in (*eqn.invars, eqn.outvars[0]))
    window, positions = sizes(kernel, numbers.rhs_spec[2:]), sizes(out, numbers.out_spec[2:])
    channels, features = kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]] // groups
    t, d = image[numbers.lhs_spec[0]] * math.prod(positions), math.prod(window) * channels
    axes = [
        _Axis(*each) for each in zip(window, positions, params["window_strides"], params["rhs_dilation"], strict=True)
    ]
    # The order of the window's axes in D: looped axes first.
    order = sorted(range(len(axes)), key=lambda i: axes[i].is_apart)

    def of_batch(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = x.shape[0]
        x = x.transpose(0, *(1 + i for i in (numbers.lhs_spec[1], numbers.lhs_spec[0], *numbers.lhs_spec[2:])))
        edges = zip(params["padding"], params["lhs_dilation"], strict=True)
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + [(lo, hi, gap - 1) for (lo, hi), gap in edges])
        a = _patches(x.reshape(size, groups, channels, *x.shape[2:]), axes).reshape(size, groups, d, t)
        b = cotangent.transpose(0, *(1 + i for i in (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])))
        return a, b.reshape(size, t, groups, features).transpose(0, 2, 1, 3)

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = of_batch(x[None], cotangent[None])
        return a[0].swapaxes(1, 2), b[0]

    def to_view(gradient: jax.Array) -> jax.Array:
        spread = gradient.reshape(groups, *(window[i] for i in order), channels, features)
        # → [G, P, C, *window], the first two together the kernel's output channels.
        rank = len(window)
        spread = spread.transpose(0, rank + 2, rank + 1, *(1 + order.index(i) for i in range(rank)))
        spread = spread.reshape(groups * features, channels, *window)
        return spread.transpose(*(numbers.rhs_spec.index(axis) for axis in range(len(kernel))))

    product = Product(factors, to_view, (groups, t, d, features), params["precision"], False, of_batch)
    if groups > 1:
        return product
    sides = "".join("P" if axis == numbers.rhs_spec[0] else "D" for axis in range(len(kernel)))
    return product._replace(sides=sides, d_axes=(*(numbers.rhs_spec[2 + i] for i in order), numbers.rhs_spec[1]))


def _patches(x: jax.Array, axes: list[_Axis]) -> jax.Array:
    """Patches [B, G, *window, C, N, *positions] of padded inputs [B, G, C, N, *spatial], looped axes first."""
    for i, axis in reversed(list(enumerate(axes))):
        if axis.is_apart:  # [B, G, *windows, C, N, *spatial] → [B, G, window, *windows, C, N, *spatial]
            at = x.ndim - len(axes) + i
            x = jnp.moveaxis(_cut(x, axis, at), at + 1, 2)
    looped = [i for i, axis in enumerate(axes) if not axis.is_apart]
    if not looped:
        return x
    first, window = x.ndim - len(axes), tuple(axes[i].window for i in looped)
    starts = np.zeros((math.prod(window), x.ndim), np.int32)
    lengths, strides = list(x.shape), [1] * x.ndim
    for i, places in zip(looped, np.unravel_index(np.arange(len(starts)), window), strict=True):
        starts[:, first + i] = places * axes[i].dilation
        lengths[first + i], strides[first + i] = (axes[i].positions - 1) * axes[i].stride + 1, axes[i].stride

    def piece(place: Any) -> jax.Array:
        seen = lax.dynamic_slice(x, list(jnp.asarray(starts)[place]), lengths)
        return lax.slice(seen, [0] * x.ndim, lengths, strides)

    def step(place: Any, pieces: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(pieces, piece(place)[:, :, None], place, 2)

    like = jax.eval_shape(lambda: jnp.repeat(piece(0)[:, :, None], len(starts), axis=2))
    return lax.fori_loop(0, len(starts), step, varying.zeros(like))


def _cut(x: jax.Array, axis: _Axis, at: int) -> jax.Array:
    """Split axis `at` of `x` into positions and window, for windows that do not overlap."""
    step = axis.stride if axis.positions > 1 else axis.span
    missing = axis.positions * step - x.shape[at]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == at else 0, 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:at], axis.positions, step, *x.shape[at + 1 :])
    return lax.slice_in_dim(x, 0, axis.span, axis.dilation, at + 1)


def _operations(eqn: Any) -> int:
    kernel = eqn.invars[1].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * size_of(eqn.outvars) * kernel.size // max(1, features)


ENTRIES = {
    "conv_general_dilated": Primitive(
        rule=rule, of_complex=True, is_linear=True, passes=True, is_differentiable=True, operations=_operations
    )
}
