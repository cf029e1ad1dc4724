"""Whole models as others write them (Flax linen, Flax NNX, Equinox, plain JAX) against the float64 oracle."""

import zlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import close_to_scale

import cg_jax as cg
from benchmarks.models import GPT, ViT
from experiments.models import CNN, MLP, ResNet

SIZES = (1, 3, 8)
ROWS = {1: (), 3: ((0, 2),), 8: ((0, 3, 4), *((i,) for i in range(8)))}  # that an uneven mask leaves


def _cross_entropy(logits, label):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1).mean()


class Transposed(nn.Module):
    """Down by a strided convolution, up by a transposed one, a depthwise one between."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), 2)(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6)(x))
        x = nn.relu(nn.ConvTranspose(4, (3, 3), (2, 2))(x))
        return nn.Dense(4)(x.mean((1, 2)))


class Normalised(nn.Module):
    """A residual network with BatchNorm on its running averages; layer and weight normalisation at its end."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        for features, stride in ((4, 1), (6, 2)):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(features, (3, 3), stride, use_bias=False)(x)))
            y = nn.BatchNorm(use_running_average=True)(nn.Conv(features, (3, 3))(y))
            x = nn.relu(y + (nn.Conv(features, (1, 1), stride)(x) if stride > 1 else x))
        return nn.WeightNorm(nn.Dense(4))(nn.LayerNorm()(x.mean((1, 2))))


class Recurrent(nn.Module):
    """A recurrent layer over tokens; the last state is read."""

    cell: type

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4)(nn.RNN(self.cell(5, param_dtype=jnp.float64))(nn.Embed(9, 3)(tokens))[:, -1])


class Attention(nn.Module):
    """Masked attention with dropout whose key is the example's own, blocks under nn.scan and nn.remat."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
                y = nn.Dropout(0.3, deterministic=False)(y)
                return x + nn.DenseGeneral(x.shape[-1:], axis=-1)(jnp.tanh(y)), None

        layers = nn.scan(nn.remat(Layer), {"params": 0}, split_rngs={"params": True, "dropout": True}, length=2)
        x, _ = layers()(x, None)
        return nn.Dense(4)(x.mean(1))


IMAGE, SEQUENCE, TOKENS = (8, 8, 3), (6, 4), (7,)
LINEN = {
    "MLP": (MLP(width=12), IMAGE),
    "CNN": (CNN(width=3), IMAGE),
    "ResNet-18, GroupNorm": (ResNet(width=4, depth=18), IMAGE),
    "ViT": (ViT(dim=12, depth=2), IMAGE),
    "GPT, tied": (GPT(vocabulary=9, dim=8, depth=2, heads=2), TOKENS),
    "transposed and depthwise": (Transposed(), IMAGE),
    "BatchNorm, WeightNorm, LayerNorm": (Normalised(), IMAGE),
    "LSTM": (Recurrent(nn.LSTMCell), TOKENS),
    "GRU": (Recurrent(nn.GRUCell), TOKENS),
    "attention, dropout, scan, remat": (Attention(), SEQUENCE),
}


def _inputs(shape, size, seed):
    rng = np.random.default_rng(seed)
    if shape == TOKENS:
        return rng.integers(0, 9, (size, *shape)).astype(np.int32)
    return rng.normal(size=(size, *shape))


def _values(path, like):
    """A random float64 value in place of a floating-point leaf: kernels about as large as they are at the start."""
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return like
    name = jax.tree_util.keystr(path)
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=like.shape)
    if len(like.shape) > 1:
        return jnp.asarray(values / np.sqrt(np.prod(like.shape[:-1])))
    return jnp.asarray(("scale" in name or "var" in name) + 0.1 * values)  # none is 0 or 1 throughout


def _filled(tree):
    return jax.tree_util.tree_map_with_path(_values, tree)


def _check(loss_fn, params, seeds):
    """The engine on each seed's 8 examples, on each alone, on their first 3 and first 1, and with an uneven mask."""
    losses, grads = oracle.per_example(loss_fn, params, jax.tree.map(lambda *rows: np.concatenate(rows), *seeds))
    whole = cg.grad_moments(loss_fn)
    for start, examples in zip((0, 8), seeds, strict=True):
        for size in SIZES:
            batch = jax.tree.map(lambda leaf, n=size: leaf[:n], examples)
            some, some_losses = [g[start : start + size] for g in grads], losses[start : start + size]
            for rows in (range(size), *ROWS[size]):
                want = oracle.statistics(some_losses, some, rows)
                moments = whole(params, batch, np.isin(np.arange(size), rows))
                assert moments.count == len(rows)
                close_to_scale([moments.sum_losses], [want.losses.sum()], 1e-11, [np.abs(want.losses).sum()])
                close_to_scale(jax.tree.leaves(moments.sum_grads), want.sum_grads, 1e-11, want.summed, 1e-4)
                close_to_scale(jax.tree.leaves(moments.sum_sq_norms), want.sum_sq_norms, 1e-11, least=1e-8)


# The others have layers of the same kinds, and take longer to compile.
_QUICK = ("MLP", "CNN", "GRU")


@pytest.mark.parametrize(
    "name", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LINEN]
)
def test_linen(name):
    model, shape = LINEN[name]
    with jax.enable_x64(True):
        key = jax.random.key(0)
        variables = _filled(jax.eval_shape(model.init, {"params": key, "dropout": key}, _inputs(shape, 1, 0)))
        params, fixed = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def loss_fn(params, example):
            x, label, key = example
            logits = model.apply({"params": params, **fixed}, x[None], rngs={"dropout": jax.random.wrap_key_data(key)})
            return _cross_entropy(logits[0], label)

        def examples(seed):
            rng = np.random.default_rng(seed)
            labels = rng.integers(0, 9, (8, 7)) if name.startswith("GPT") else rng.integers(0, 4, 8)
            return _inputs(shape, 8, seed), labels, np.asarray(jax.random.key_data(jax.random.split(key, 8))) + seed

        _check(loss_fn, params, [examples(1), examples(2)])


def test_nnx():
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs), nnx.relu,
            nnx.BatchNorm(4, use_running_average=True, rngs=rngs), lambda x: x.mean((0, 1)),
            nnx.Linear(4, 4, rngs=rngs),
        )  # fmt: skip
        graph, params, fixed = nnx.split(model, nnx.Param, ...)
        fixed = _filled(fixed)

        def loss_fn(params, example):
            return _cross_entropy(nnx.merge(graph, params, fixed)(example[0]), example[1])

        _check(loss_fn, _filled(params), [(_inputs(IMAGE, 8, seed), (np.arange(8) + seed) % 4) for seed in (1, 2)])


@pytest.mark.slow
def test_equinox():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        model = eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.AdaptiveAvgPool2d(2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.LayerNorm(16),
                eqx.nn.MLP(16, 4, 5, 1, key=keys[1]),
            ]
        )
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_fn(params, example):
            return _cross_entropy(eqx.combine(params, static)(example[0]), example[1])

        def examples(seed):
            return _inputs(IMAGE, 8, seed).transpose(0, 3, 1, 2), (np.arange(8) + seed) % 4

        _check(loss_fn, _filled(params), [examples(1), examples(2)])


def test_low_rank_masked_and_fused_weights_in_plain_jax():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"u": (4, 2), "v": (2, 4), "masked": (4, 4), "q": (4, 3), "kv": (4, 6), "std": (4, 4)}
        params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        mask = jnp.asarray(rng.integers(0, 2, (4, 4)))

        def loss_fn(p, x):
            h = jnp.tanh(x @ (p["u"] @ p["v"]))
            h = h @ (p["masked"] * mask + jax.lax.stop_gradient(p["u"] @ p["v"]))
            q, k, v = jnp.split(h @ jnp.concatenate([p["q"], p["kv"]], 1), 3, axis=-1)
            h = jax.nn.softmax(q @ k.T) @ v
            scaled = (p["std"] - p["std"].mean(0, keepdims=True)) / p["std"].std(0, keepdims=True)
            return jnp.tanh(h @ scaled[:3]).sum()

        _check(loss_fn, params, [_inputs(SEQUENCE, 8, 1), _inputs(SEQUENCE, 8, 2)])
