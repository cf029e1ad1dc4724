"""Flax training on real digits through every source: linen's TrainState and nnx.Optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import cg_jax as cg

BATCH, STEPS = 30, 240


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def _batches(data):
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        rows = rng.integers(0, len(data[1]), BATCH)
        yield data[0][rows], data[1][rows]


OPTIMIZERS = {  # (optimizer, groups of the batch that it wants)
    "stacked": (lambda: optax.chain(cg.median_of_k(3), optax.sgd(0.3)), 3),
    "m3": (lambda: cg.m3(optax.sgd(0.5)), 1),
    "rm3": (lambda: optax.chain(cg.rm3(), optax.sgd(0.2)), 1),
    "ra3": (lambda: optax.chain(cg.ra3(), optax.sgd(0.2)), 1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_linen_train_state(digits, name):
    train, (images, labels) = digits
    make, groups = OPTIMIZERS[name]
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    params = model.init(jax.random.key(0), train[0][:1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make())

    def loss_fn(params, example):
        image, label = example
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, image), label)

    @jax.jit
    def step(state, batch):
        grads = cg.micro_batch_grads(loss_fn, groups)(state.params, batch)
        if groups == 1:
            grads = jax.tree.map(lambda g: g[0], grads)
        return state.apply_gradients(grads=grads)

    for batch in _batches(train):
        state = step(state, batch)
    assert int(state.step) == STEPS
    assert np.mean(np.argmax(model.apply(state.params, images), -1) == labels) > 0.85
    assert np.mean(np.argmax(model.apply(params, images), -1) == labels) < 0.3


@pytest.mark.parametrize("name", ["stacked", "rm3"])
def test_nnx_optimizer(digits, name):
    train, (images, labels) = digits
    make, groups = OPTIMIZERS[name]
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        graph, params = nnx.split(model, nnx.Param)

        def loss_fn(params, example):
            image, label = example
            logits = nnx.merge(graph, params)(image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)

        grads = cg.micro_batch_grads(loss_fn, groups)(params, batch)
        if groups == 1:
            grads = jax.tree.map(lambda g: g[0], grads)
        optimizer.update(model, grads)

    for batch in _batches(train):
        step(model, optimizer, batch)
    assert np.mean(np.argmax(model(jnp.asarray(images)), -1) == labels) > 0.85


def test_coherence_of_an_nnx_model(digits):
    train, _ = digits
    model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss_fn(params, example):
        image, label = example
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(image), label)

    result = cg.measure_coherence(loss_fn, params, train, batch_size=256)
    plain = cg.measure_coherence(loss_fn, params, train, batch_size=256, method="vmap")
    assert int(result.count) == 1500
    np.testing.assert_allclose(result.alpha, plain.alpha, rtol=1e-5)
    assert {name.split("/")[0] for name in result.per_tensor} == {"kernel", "bias"}
