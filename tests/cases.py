"""The table of models, losses and batches that feeds the tests of the engine."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B = 5
CASES: dict[str, "Case"] = {}


class Case(NamedTuple):
    """loss_fn of one example, with parameters and a batch in NumPy float64 (keys and indices aside)."""

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any

    def cast(self, dtype):
        """(params, batch) with floating leaves in `dtype`."""

        def leaf(x):
            x = jnp.asarray(x)
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(leaf, self.params), jax.tree.map(leaf, self.batch)


def _normal(*shape, name="x"):
    return np.random.default_rng(zlib.crc32(repr((shape, name)).encode())).normal(size=shape)


def _ids(low, high, *shape):
    return np.random.default_rng(low + high).integers(low, high, shape).astype(np.int32)


def case(name, params, batch):
    def register(loss_fn):
        CASES[name] = Case(loss_fn, params, batch)
        return loss_fn

    return register


def _cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def _flax(name, model, image):
    """A linen model under cross-entropy; its parameters from a fixed key, moved off zero biases and unit scales."""
    params = model.init(jax.random.key(0), jnp.zeros((1, *image), jnp.float32))
    params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.1 * _normal(*p.shape, name=name), params)
    batch = (_normal(B, *image, name=name), _ids(0, 4, B))
    CASES[name] = Case(lambda p, e: _cross_entropy(model.apply(p, e[0][None])[0], e[1]), params, batch)


class _ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        for stride in (1, 2):
            y = nn.relu(nn.GroupNorm(3)(x))
            short = nn.Conv(6, (1, 1), stride)(y) if stride > 1 else x
            y = nn.Conv(6, (3, 3), stride)(y)
            x = short + nn.Conv(6, (3, 3))(nn.relu(nn.GroupNorm(2)(y)))
        return nn.Dense(4)(x.mean((1, 2)))


class _CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(5, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.gelu(nn.Conv(6, (3, 3), 2, padding="VALID", use_bias=False)(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


class _Norms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(7)(x))
        x = nn.RMSNorm()(nn.swish(nn.Dense(6)(x)))
        return nn.Dense(4)(nn.PReLU()(x).mean(1))


_flax("resnet", _ResNet(), (8, 8, 3))
_flax("cnn", _CNN(), (9, 9, 2))
_flax("layer norm over positions", _Norms(), (3, 5))


@case("mlp", {"w": [_normal(6, 8), _normal(8, 8), _normal(8, 4)], "b": [_normal(8), _normal(8), _normal(4)]},
      (_normal(B, 6), _ids(0, 4, B)))  # fmt: skip
def _(p, e):
    h = e[0]
    for w, b in zip(p["w"], p["b"], strict=True):
        h = jax.nn.relu(h) @ w + b
    return _cross_entropy(h, e[1])


_NHWC = ("NHWC", "HWIO", "NHWC")
for _name, _options, _kernel in [
    ("SAME", {"window_strides": (1, 1), "padding": "SAME"}, (3, 3, 4, 6)),
    ("stride VALID", {"window_strides": (2, 3), "padding": "VALID"}, (3, 2, 4, 6)),
    ("dilated", {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)}, (3, 3, 4, 6)),
    ("transposed", {"window_strides": (1, 1), "padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 2)}, (3, 3, 4, 6)),
    ("groups", {"window_strides": (2, 1), "padding": "SAME", "feature_group_count": 2}, (3, 3, 2, 6)),
    ("depthwise", {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4}, (3, 3, 1, 8)),
    ("negative padding", {"window_strides": (1, 1), "padding": ((-1, 2), (0, -1))}, (3, 3, 4, 6)),
]:

    @case(f"conv {_name}", {"w": _normal(*_kernel)}, _normal(B, 9, 9, 4))
    def _(p, x, options=_options):
        y = lax.conv_general_dilated(x[None], p["w"], dimension_numbers=_NHWC, **options)
        return jnp.tanh(y).sum() ** 2


@case("conv 1-D", {"w": _normal(6, 4, 3)}, _normal(B, 4, 12))
def _(p, x):
    return jnp.sin(lax.conv_general_dilated(x[None], p["w"], (1,), "SAME")).sum()


@case("conv 3-D", {"w": _normal(2, 4, 2, 3, 2)}, _normal(B, 4, 5, 5, 4))
def _(p, x):
    return jnp.sin(lax.conv_general_dilated(x[None], p["w"], (1, 2, 1), "VALID")).sum()


@case("tied embedding", {"e": _normal(7, 3), "w": _normal(3, 3)}, _ids(0, 7, B, 6))
def _(p, ids):
    h = jnp.tanh(p["e"][ids] @ p["w"]) @ p["w"].T
    return -jax.nn.log_softmax(h @ p["e"].T)[jnp.arange(6), ids].sum()


@case("embedding, some ids out of range", {"e": _normal(7, 3)}, _ids(-9, 9, B, 6))
def _(p, ids):
    return jnp.sin(p["e"][ids]).sum() ** 2


@case("embedding, some ids out of range, and a penalty", {"e": _normal(7, 3)}, _ids(-9, 9, B, 6))
def _(p, ids):
    return jnp.sin(p["e"][ids]).sum() ** 2 + 0.3 * jnp.square(p["e"]).sum() * ids.sum()


@case("scalar and integer parameters", {"s": _normal(), "b": _normal(4), "i": np.arange(3)}, _normal(B, 5, 4))
def _(p, x):
    return jnp.sum(jnp.exp(jnp.minimum(p["s"] * x + p["b"][None], 1.0))) + p["i"].sum()


@case("weight norm of a product", {"u": _normal(5, 2), "v": _normal(2, 4), "g": _normal(4)}, _normal(B, 3, 5))
def _(p, x):
    w = p["u"] @ p["v"]
    w = p["g"][None] * w / jnp.linalg.norm(w, axis=0, keepdims=True)
    return jnp.tanh(x @ w).sum()


@case("recurrent, scan", {"w": _normal(4, 4), "u": _normal(3, 4)}, _normal(B, 6, 3))
def _(p, x):
    h, _ = lax.scan(lambda h, xt: (jnp.tanh(h @ p["w"] + xt @ p["u"]), None), jnp.zeros(4, x.dtype), x)
    return (h**2).sum()


@case("loop", {"a": _normal(3, 3)}, _normal(B, 3))
def _(p, x):
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["a"]), x).sum()


@case("cond", {"w": _normal(4, 4), "u": _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    return lax.cond(
        x[0] > 0, lambda: (x @ p["w"]).sum() ** 2, lambda: jnp.sin(x @ p["u"] @ p["w"]).sum()
    )  # fmt: skip


@jax.custom_vjp
def _clipped(x, w):
    return x @ w


_clipped.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, c: (c @ r[1].T, jnp.clip(jnp.outer(r[0], c), -0.1, 0.1)))


@case("custom_vjp", {"w": _normal(4, 4), "v": _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    return (_clipped(jnp.tanh(x @ p["v"]), p["w"]) ** 2).sum()


@case("a norm divides, and is a penalty", {"w": _normal(4, 3), "v": _normal(3), "only": _normal(2, 2)}, _normal(B, 4))
def _(p, x):
    norm = jnp.sqrt((p["w"] ** 2).sum() + (p["v"] ** 4).sum())
    h = jnp.tanh(x @ p["w"] / norm + p["v"])
    return (h * jnp.exp(p["only"].prod())).sum() ** 2 + norm * (x[0] + 2 * jnp.abs(p["w"]).sum())


@case("a number of tensors that are used in a scan", {"w": 0.5 * _normal(4, 4), "b": _normal(4)}, _normal(B, 3, 4))
def _(p, x):
    h, _ = lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row + p["b"]), None), x[0], x)
    return h.sum() ** 2 * (p["w"] ** 2).sum() + (p["b"] ** 2).sum()


@case("penalty in the loss", {"w": 0.4 * _normal(4, 4), "v": 0.4 * _normal(4, 4)}, _normal(B, 4))  # tanh unsaturated
def _(p, x):
    return jnp.tanh(x @ p["v"] @ p["w"]).sum() + 0.1 * (p["w"] ** 2).sum()


@case("checkpoint, used twice", {"w": 0.4 * _normal(4, 4), "v": 0.4 * _normal(4, 4)}, _normal(B, 4))  # tanh unsaturated
def _(p, x):
    block = jax.checkpoint(lambda h: jnp.tanh(h @ p["v"]) @ p["w"])
    return block(block(x)).sum()


@case("attention", {"qkv": _normal(6, 18), "o": _normal(2, 3, 6)}, _normal(B, 5, 6))
def _(p, x):
    q, k, v = (a.reshape(5, 2, 3) for a in jnp.split(x @ p["qkv"], 3, -1))
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return jnp.einsum("hqk,khd,hde->qe", weights, v, p["o"]).sum() ** 2


@case("vmap inside", {"w": _normal(6, 4)}, _normal(B, 5, 6))
def _(p, x):
    return jax.vmap(lambda row: jnp.tanh(row @ p["w"]).sum())(x).prod()


@case("batched product", {"w": _normal(5, 6, 4)}, _normal(B, 5, 3, 6))
def _(p, x):
    return jnp.tanh(jnp.einsum("nfd,ntd->ntf", p["w"].transpose(0, 2, 1), x)).sum()


@case("parameter on the left", {"w": _normal(3, 6)}, _normal(B, 6, 7))
def _(p, x):
    return jnp.tanh(p["w"] @ x).sum()


@case("dropout by keys in the batch", {"w": _normal(6, 3)}, (_normal(B, 6), np.arange(B, dtype=np.uint32)))
def _(p, e):
    keep = jax.random.bits(jax.random.key(e[1]), (6,), jnp.uint32) % 2  # in no precision, that the oracle's is the same
    return jnp.tanh((e[0] * keep) @ p["w"]).sum()


@case("loss that ignores the example", {"w": _normal(6, 3)}, _normal(B, 6))
def _(p, x):
    return (p["w"] ** 2).sum()


@case("select, an unused tensor", {"a": _normal(3), "b": _normal(3), "unused": _normal(2)}, _normal(B, 3))
def _(p, x):
    return jnp.where(x > 0, p["a"], p["b"]).sum() ** 2


@case("concatenated parameters", {"a": _normal(3, 2), "b": _normal(3, 4)}, _normal(B, 3))
def _(p, x):
    return jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]], 1)).sum() ** 2


@case("complex on the way", {"w": _normal(4, 4), "v": _normal(4)}, _normal(B, 4))
def _(p, x):
    return jnp.abs(jnp.exp(1j * p["w"]) @ x).sum() + x @ p["v"]


@case("Fourier transform of a product", {"w": _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    return jnp.abs(jnp.fft.fft(x @ p["w"])[1]) ** 2


@case("a loop that has no reverse mode", {"w": _normal(4, 4), "v": _normal(4)}, _normal(B, 4))
def _(p, x):
    def shrink(h):
        return 0.3 * jnp.tanh(h @ p["w"])

    small = lax.while_loop(lambda h: jnp.abs(h).sum() > 1, shrink, x)
    return lax.stop_gradient(small) @ p["v"] + jnp.tanh(p["w"] @ x).sum()


import cases_loops  # noqa: E402, F401  (adds its cases to the table)
