"""Uses of parameters, many in one loss, for the tests of their rules: one compilation serves a whole table."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B = 3


class Use(NamedTuple):
    """A loss of one example and one tensor."""

    loss_fn: Callable[[Any, Any], Any]
    param: np.ndarray
    batch: np.ndarray


def normal(*shape):
    return np.random.default_rng(zlib.crc32(repr(shape).encode())).normal(size=shape)


def ids(low, high, *shape):
    return np.random.default_rng(high - low).integers(low, high, (B, *shape)).astype(np.int32)


def together(uses):
    """(loss_fn, params, batch) of the sum of all the losses in a table."""

    def loss_fn(params, example):
        return sum(use.loss_fn(params[name], example[name]) for name, use in uses.items())

    return loss_fn, *({name: jnp.asarray(use[k]) for name, use in uses.items()} for k in (1, 2))


def _square(y):
    return jnp.sin(y).sum() ** 2


def convolution(kernel, image, window_strides=None, padding="VALID", **options):
    """A convolution of one image [*spatial, channels]."""

    def loss_fn(w, x):
        letters = "DHW"[-(x.ndim - 1) :]
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        strides = window_strides or (1,) * (x.ndim - 1)
        return _square(lax.conv_general_dilated(x[None], w, strides, padding, dimension_numbers=numbers, **options))

    return Use(loss_fn, normal(*kernel), normal(B, *image))


def lookup(look_up, table, places):
    """A look-up in a table."""
    return Use(lambda w, i: _square(look_up(w, i)), normal(*table), places)


def _rows(w, i):
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    return lax.gather(w, i[:, None], numbers, (1, w.shape[1]), mode="clip")


def _scale_of_normalised(w, x):
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x * w[None]).sum()


def _recurrent(w, x):
    return lax.scan(lambda h, row: (jnp.tanh(h @ w + row), None), jnp.zeros(w.shape[0]), x)[0].sum()


def _layers(w, x):
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0].sum()


def _product(w, x):
    return jnp.tanh(x @ w + 1).sum()


# A dimension of size 0 in each place. Every gradient is zero, or empty.
EMPTY = {
    "no positions": Use(lambda w, x: ((x @ w).sum(0) + 1).sum(), normal(5, 3), normal(B, 0, 5)),
    "nothing is contracted": Use(_product, normal(0, 3), normal(B, 4, 0)),
    "nothing is contracted, one position": Use(_product, normal(0, 3), normal(B, 0)),
    "no outputs": Use(_product, normal(5, 0), normal(B, 4, 5)),
    "no outputs, one position": Use(_product, normal(5, 0), normal(B, 5)),
    "no outputs, many positions": Use(_product, normal(2, 0), normal(B, 500, 2)),
    "no products": Use(lambda w, x: jnp.einsum("nd,nde->ne", x, w).sum(), normal(0, 5, 3), normal(B, 0, 5)),
    "products": Use(lambda w, x: jnp.einsum("nfd,ntd->ntf", w, x).sum(), normal(2, 3, 4), normal(B, 2, 0, 4)),
    "on the left": Use(lambda w, x: jnp.sin(w @ x).sum(), normal(3, 5), normal(B, 5, 0)),
    "used twice": Use(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w).sum(), normal(4, 4), normal(B, 0, 4)),
    "no classes": Use(lambda w, x: jax.nn.softmax(x @ w).sum(), normal(4, 0), normal(B, 2, 4)),
    "no pixels": convolution((3, 3, 2, 4), (0, 5, 2), padding="SAME"),
    "no pixels, one channel": convolution((3, 3, 1, 4), (0, 5, 1), padding="SAME"),
    "window over the image": convolution((3, 3, 2, 4), (2, 2, 2)),
    "window over the image, apart": convolution((3, 3, 2, 4), (2, 4, 2), (3, 3)),
    "no channels": convolution((3, 3, 0, 4), (4, 5, 0), padding="SAME"),
    "no features": convolution((3, 3, 2, 0), (4, 5, 2), padding="SAME"),
    "no ids": lookup(_rows, (5, 3), ids(0, 5, 0)),
    "rows of nothing": lookup(_rows, (5, 0), ids(0, 5, 4)),
    "windows of nothing": lookup(lambda w, i: lax.dynamic_slice(w, (i, i), (0, 3)), (5, 3), ids(0, 5)),
    "scan of no steps": Use(_recurrent, normal(4, 4), normal(B, 0, 4)),
    "scan of no layers": Use(_layers, normal(0, 4, 4), normal(B, 4)),
    "scan of layers, no positions": Use(_layers, normal(2, 4, 4), normal(B, 0, 4)),
    "scan of no width": Use(_recurrent, normal(0, 0), normal(B, 3, 0)),
    "scale of nothing": Use(_scale_of_normalised, normal(0), normal(B, 4, 0)),
    "scale, no positions": Use(_scale_of_normalised, normal(4), normal(B, 0, 4)),
    "bias, no positions": Use(lambda w, x: (x + w[None]).sum(), normal(4), normal(B, 0, 4)),
    "checkpoint": Use(jax.checkpoint(_product), normal(4, 4), normal(B, 0, 4)),
    "empty penalty": Use(lambda w, x: x.sum() * (w**2).sum(), normal(0), normal(B, 2)),
}

# Windows that overlap and that do not, remainders, one position, mixtures of all, in one to three dimensions.
CONVOLUTIONS = {
    "patches": convolution((4, 4, 3, 5), (16, 16, 3), (4, 4)),
    "patches, remainder": convolution((4, 3, 3, 5), (18, 13, 3), (4, 3)),
    "patches, padded": convolution((4, 4, 3, 5), (10, 9, 3), (4, 4), "SAME"),
    "patches, groups": convolution((2, 2, 2, 6), (8, 8, 4), (2, 2), feature_group_count=2),
    "patches, dilated": convolution((2, 2, 3, 5), (12, 13, 3), (4, 5), rhs_dilation=(3, 4)),
    "window of the image": convolution((5, 6, 3, 5), (5, 6, 3)),
    "window of the image, dilated": convolution((3, 3, 3, 5), (5, 6, 3), rhs_dilation=(2, 2)),
    "apart in the middle": convolution((2, 3, 3, 2, 5), (4, 9, 6, 2), (1, 3, 1)),
    "apart at both ends": convolution((2, 3, 3, 2, 5), (6, 5, 9, 2), (2, 1, 3)),
    "one by one, stride": convolution((1, 1, 4, 3), (9, 9, 4), (2, 2)),
    "depthwise": convolution((7, 7, 1, 4), (6, 6, 4), padding="SAME", feature_group_count=4),
    "waves": convolution((40, 1, 3), (100, 1), (7,)),
    "transposed": convolution((4, 4, 2, 3), (5, 5, 2), (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2)),
    "transposed, apart": convolution((2, 2, 2, 3), (3, 3, 2), (2, 2), ((1, 1), (1, 1)), lhs_dilation=(3, 3)),
}


def _windows(*sizes):
    return lambda w, i: jax.vmap(lambda places: lax.dynamic_slice(w, [*places], sizes))(i)


LOOKUPS = {
    "vmap": lookup(lambda w, i: jax.vmap(lambda j: w[j])(i), (7, 3), ids(-9, 9, 6)),
    "windows that overlap": lookup(_windows(3, 3), (7, 3), ids(-2, 9, 4, 2)),
    "windows of two axes": lookup(_windows(3, 2), (7, 5), ids(-2, 9, 3, 2)),
    "two indices": lookup(lambda w, i: w[i[:3], i[3:]], (3, 4, 2), ids(0, 3, 6)),
    "two indices apart": lookup(lambda w, i: w[i[:3], :, i[3:]], (3, 4, 3), ids(0, 3, 6)),
    "columns": lookup(lambda w, i: w[:, i], (3, 4, 2), ids(-5, 5, 6)),
    "columns, fill": lookup(lambda w, i: w.at[:, i].get(mode="fill", fill_value=2.0), (3, 4, 2), ids(-5, 9, 6)),
    "columns, clip": lookup(lambda w, i: w.at[:, i].get(mode="clip"), (3, 4, 2), ids(-5, 9, 6)),
    "along an axis": lookup(lambda w, i: jnp.take_along_axis(w, i[:, None], axis=1), (6, 4), ids(0, 4, 6)),
    "beside an axis": lookup(jax.vmap(lambda row, j: row[j]), (6, 4), ids(0, 4, 6)),
    "beside an inner axis": lookup(jax.vmap(lambda row, j: row[j], in_axes=(1, 0)), (4, 6, 2), ids(0, 4, 6, 3)),
    "bags": lookup(lambda w, i: w[i].sum(1), (5, 4), ids(0, 5, 3, 4)),
    "numbers": lookup(lambda w, i: w[i], (6,), ids(0, 6, 5)),
    "one id": lookup(lambda w, i: w[i], (6, 2), ids(0, 6)),
    "one row": lookup(lambda w, i: w[i], (1, 2), ids(-1, 1, 5)),
    "narrow ids": lookup(lambda w, i: jnp.take(w, i, 0, mode="clip"), (300, 2), ids(0, 255, 6).astype(np.uint8)),
    "more ids than are compared in pairs": lookup(lambda w, i: w[i], (40, 2), ids(0, 40, 600)),
    "unique": lookup(lambda w, i: w.at[i].get(unique_indices=True), (9, 2), ids(0, 3, 1) + 2 * np.arange(4)),
}

# A parameter among entries of the example: a class token, a learned first row.
PLACED = {
    "concatenated": Use(lambda w, x: _square(jnp.concatenate([w, x])), normal(1, 4), normal(B, 5, 4)),
    "written": Use(lambda w, x: _square(lax.dynamic_update_slice(x, w, (1,))), normal(2), normal(B, 5)),
    "written into": Use(lambda w, x: _square(lax.dynamic_update_slice(w, x, (1,))), normal(7), normal(B, 5)),
    "set": Use(lambda w, x: _square(x.at[jnp.array([0, 2])].set(w)), normal(2), normal(B, 5)),
    "added": Use(lambda w, x: _square(x.at[jnp.array([0, 2])].add(w)), normal(2), normal(B, 5)),
    "a bound": Use(lambda w, x: _square(lax.clamp(w, x, jnp.full(5, 0.5))), normal(5) - 1, normal(B, 5)),
    "modulo": Use(lambda w, x: _square(lax.rem(x, w)), normal(5), normal(B, 5)),
}
