"""How the squared norm of a gradient follows from a parameter use's inputs and cotangents, primitive by primitive.

Most uses are a product in disguise. For one example, with N independent products over T positions,

    G[n] = A[n]ᵀ B[n],    A [N, T, D] from the input, B [N, T, P] from the cotangent of the output,

is the gradient of the view, rearranged; a convolution is such a product over the patches of its input. Then
‖G‖² = Σₙ ⟨A Aᵀ, B Bᵀ⟩ (Gram), or ‖A‖² ‖B‖² where T = 1, needs no G.

A rule is looked up by the primitive's name in `PRODUCTS` (the two factors of one example) or in `NORMS` (the squared
norm of one example, where the view's gradient only places or adds up cotangents). What has no rule is done by the
primitive's own vjp, example by example.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Product(NamedTuple):
    """A use whose view's gradient is a product; for one example."""

    factors: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (input, cotangent) → (A, B)
    to_view: Callable[[jax.Array], jax.Array]  # G [N, D, P] → a gradient of the view's shape
    dims: tuple[int, int, int, int]  # N, T, D, P
    precision: Any
    rearranges: bool  # whether Σ AᵀB may be formed from A and B: they are not many times the input


def _sizes(shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    return tuple(shape[i] for i in axes)


def dot_general(eqn: Any, view: int) -> Product:
    """lax.dot_general with any dimension numbers, the parameter on either side."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - view
    shapes = [var.aval.shape for var in eqn.invars]
    free = [[i for i in range(len(s)) if i not in contract[k] and i not in batch[k]] for k, s in enumerate(shapes)]
    sizes = {
        "N": _sizes(shapes[view], batch[view]),
        "T": _sizes(shapes[other], free[other]),
        "D": _sizes(shapes[view], contract[view]),
        "P": _sizes(shapes[view], free[view]),
    }
    n, t, d, p = (math.prod(sizes[name]) for name in "NTDP")

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = x.transpose(*batch[other], *free[other], *contract[other]).reshape(n, t, d)
        # The output's axes are the batch, then the left side's, then the right side's.
        if view == 0:
            return a, cotangent.reshape(n, p, t).transpose(0, 2, 1)
        return a, cotangent.reshape(n, t, p)

    def to_view(gradient: jax.Array) -> jax.Array:
        order = (*batch[view], *contract[view], *free[view])
        spread = gradient.reshape(*sizes["N"], *sizes["D"], *sizes["P"])
        return spread.transpose(*(order.index(axis) for axis in range(len(order))))

    return Product(factors, to_view, (n, t, d, p), eqn.params["precision"], rearranges=True)


def conv_general_dilated(eqn: Any, view: int) -> Product | None:
    """lax.conv_general_dilated in any number of dimensions: strides, padding, both dilations, feature groups."""
    params = eqn.params
    if view != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image, kernel, out = (var.aval.shape for var in (*eqn.invars, eqn.outvars[0]))
    window, positions = _sizes(kernel, numbers.rhs_spec[2:]), _sizes(out, numbers.out_spec[2:])
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

    return Product(factors, to_view, (groups, t, d, features), params["precision"], rearranges=False)


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


def lift(product: Product, length: int, is_slice: bool) -> Product:
    """The product of a use in the body of a scan: positions of all steps together; a slice has its own in each step."""
    n, t, d, p = product.dims

    def join(factor: jax.Array) -> jax.Array:
        if is_slice:
            return factor.reshape(length * n, t, -1)
        return jnp.moveaxis(factor, 0, 1).reshape(n, length * t, -1)

    def factors(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = jax.vmap(product.factors)(x, cotangent)
        return join(a), join(b)

    if not is_slice:
        return product._replace(factors=factors, dims=(n, length * t, d, p))

    def to_view(gradient: jax.Array) -> jax.Array:
        return jax.vmap(product.to_view)(gradient.reshape(length, n, d, p))

    return product._replace(factors=factors, to_view=to_view, dims=(length * n, t, d, p))


class Norm(NamedTuple):
    """A use whose view's gradient places or adds up cotangents; for one example."""

    sq_norm: Callable[[list[jax.Array], jax.Array], jax.Array]  # (dynamic operands, cotangent) → ‖g‖²


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x))


def dynamic_slice(eqn: Any, view: int) -> Norm | None:
    """A slice at a place that the example names: the gradient is the cotangent, put there."""
    return Norm(lambda operands, cotangent: _square(cotangent)) if view == 0 else None


def gather(eqn: Any, view: int) -> Norm | None:
    """Rows of a table (an embedding): cotangents of equal rows add up before they are squared."""
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    whole_rows = (
        view == 0
        and numbers.start_index_map == (0,)
        and numbers.collapsed_slice_dims == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *table[1:])
    )
    if not whole_rows:
        return None
    clips = eqn.params["mode"] == lax.GatherScatterMode.CLIP
    offset = numbers.offset_dims

    def sq_norm(operands: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        rows = operands[0].reshape(-1)
        batch = [axis for axis in range(cotangent.ndim) if axis not in offset]
        values = cotangent.transpose(*batch, *offset).reshape(rows.size, -1)
        if clips:
            rows = jnp.clip(rows, 0, table[0] - 1)
        else:
            inside = (rows >= 0) & (rows < table[0])
            values = jnp.where(inside[:, None], values, 0)
        order = jnp.argsort(rows)
        rows, values = rows[order], values[order]
        segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (rows[1:] != rows[:-1]).astype(jnp.int32)]))
        return _square(jax.ops.segment_sum(values, segment, rows.size, indices_are_sorted=True))

    return Norm(sq_norm)


PRODUCTS: dict[str, Callable[[Any, int], Product | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
}
NORMS: dict[str, Callable[[Any, int], Norm | None]] = {
    "dynamic_slice": dynamic_slice,
    "gather": gather,
}


def rule_for(eqn: Any, view: int) -> Product | Norm | None:
    """The rule for a parameter at operand `view` of an equation, if there is one; for real numbers."""
    builder = PRODUCTS.get(eqn.primitive.name) or NORMS.get(eqn.primitive.name)
    is_complex = any(jnp.issubdtype(var.aval.dtype, jnp.complexfloating) for var in (*eqn.invars, *eqn.outvars))
    return None if builder is None or is_complex else builder(eqn, view)
