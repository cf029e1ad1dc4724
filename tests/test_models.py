"""Whole models as others write them (Flax linen, Flax NNX, Equinox, plain JAX) against the float64 oracle."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import cg_jax as cg
from benchmarks.models import GPT, ViT
from experiments.models import CNN, MLP, ResNet

SIZES = (1, 3, 8)


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
    """A residual block with BatchNorm on its running averages, weight and layer normalisation."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(x.shape[-1], (3, 3))(y))
        x = nn.LayerNorm()((x + y).reshape(x.shape[0], -1))
        return nn.WeightNorm(nn.Dense(4))(x)


class Recurrent(nn.Module):
    """A recurrent layer over tokens; the last state is read."""

    cell: type

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4)(nn.RNN(self.cell(5))(nn.Embed(9, 3)(tokens))[:, -1])


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


def _wide(tree):
    """Floating-point leaves in float64, moved a little, so that none is 0 or 1 throughout."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(p, jnp.float64) + 0.1 * rng.normal(size=p.shape) if oracle.is_float(p) else p, tree
    )


def _close(got, want, scales=None):
    for a, b, scale in zip(got, want, scales or [np.abs(b).max() for b in want], strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-11 * max(scale, 1e-300))


def _check(loss_fn, params, examples):
    """The engine on `examples` of 8, on their first 3 and first 1, and with an uneven mask."""
    losses, grads = oracle.per_example(loss_fn, params, examples)
    whole = cg.grad_moments(loss_fn)
    for size in SIZES:
        batch = jax.tree.map(lambda leaf, n=size: leaf[:n], examples)
        norms = cg.per_example_sq_norms(loss_fn)(params, batch)
        for rows in (range(size),) if size < max(SIZES) else (range(size), (0, 3, 4)):
            want = oracle.statistics(losses[:size], [g[:size] for g in grads], rows)
            moments = whole(params, batch, np.isin(np.arange(size), rows))
            _close([moments.sum_losses], [want.losses.sum()], [np.abs(want.losses).sum()])
            _close(jax.tree.leaves(moments.sum_grads), want.sum_grads, want.summed)
            _close(jax.tree.leaves(moments.sum_sq_norms), want.sum_sq_norms)
        _close(jax.tree.leaves(norms), [np.square(g[:size]).reshape(size, -1).sum(1) for g in grads])


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, shape = LINEN[name]
    with jax.enable_x64(True):
        key = jax.random.key(0)
        variables = _wide(model.init({"params": key, "dropout": key}, _inputs(shape, 1, 0)))
        params, fixed = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def loss_fn(params, example):
            x, label, key = example
            logits = model.apply({"params": params, **fixed}, x[None], rngs={"dropout": key})
            return _cross_entropy(logits[0], label)

        for seed in (1, 2):
            inputs = _inputs(shape, max(SIZES), seed)
            rng = np.random.default_rng(seed)
            labels = rng.integers(0, 9, (8, 7)) if name.startswith("GPT") else rng.integers(0, 4, 8)
            _check(loss_fn, params, (inputs, labels, jax.random.split(jax.random.key(seed), 8)))


def test_nnx():
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs), nnx.relu,
            lambda x: x.mean((0, 1)), nnx.Linear(4, 4, rngs=rngs),
        )  # fmt: skip
        graph, params = nnx.split(model, nnx.Param)

        def loss_fn(params, example):
            return _cross_entropy(nnx.merge(graph, params)(example[0]), example[1])

        _check(loss_fn, _wide(params), (_inputs(IMAGE, 8, 1), np.arange(8) % 4))


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

        _check(loss_fn, _wide(params), (_inputs(IMAGE, 8, 1).transpose(0, 3, 1, 2), np.arange(8) % 4))


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

        _check(loss_fn, params, _inputs(SEQUENCE, 8, 1))
