"""The trainers and the models, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.train import METHODS, predict, trainer

BATCH, RATE = 4, 0.5


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(36, 4, 4, 1)), jnp.float32)
    return models.build("mlp", 8, 1, 10), images, jnp.asarray(rng.integers(0, 10, 36), jnp.int32)


def _mini_batch_gradient(model, params, images, labels):
    def loss(p):
        log_probabilities = jax.nn.log_softmax(model.apply(p, images))
        return -log_probabilities[jnp.arange(len(labels)), labels].mean()

    return jax.grad(loss)(params)


def _by_hand(name, model, params, images, labels):
    """The parameters after 36 examples in mini-batches of 4, written out."""
    combine = {"mean3": np.mean, "ra3": np.mean, "m3": np.median, "rm3": np.median, "sgd": lambda g, axis: g[-1]}[name]
    recent = []
    for start in range(0, 36, BATCH):
        rows = slice(start, start + BATCH)
        recent.append(_mini_batch_gradient(model, params, images[rows], labels[rows]))
        if METHODS[name].groups == 3 and len(recent) < 3:
            continue
        direction = jax.tree.map(lambda *g: combine(np.stack(g), axis=0), *recent)
        if name in ("rm3", "ra3") and len(recent) < 3:
            direction = recent[-1]
        params = jax.tree.map(lambda p, d: p - RATE * d, params, direction)
        recent = [] if METHODS[name].groups == 3 else recent[-2:]
    return params


@pytest.mark.parametrize("name", METHODS)
def test_each_method_takes_the_steps_written_out_by_hand(problem, name):
    model, images, labels = problem
    method = trainer(model, name, RATE, BATCH)
    state = method.init(jax.random.key(1), images)
    start = jax.tree.map(jnp.array, state.params)  # the step donates its state
    for first in range(0, 36, method.rows_per_step):
        state = method.step(state, images, labels, jnp.arange(first, first + method.rows_per_step))
    want = _by_hand(name, model, start, images, labels)
    for got, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "width", "depth", "convolutions"), [("cnn", 4, None, 2), ("resnet", 8, 8, 9), ("resnet", 8, 18, 20)]
)
def test_convolutional_models_have_the_layers_of_their_name(name, width, depth, convolutions):
    model = models.build(name, width, depth, 10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert model.apply(params, jnp.zeros((2, 16, 16, 3))).shape == (2, 10)
    assert sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params)) == convolutions


def test_equal_models_share_one_loss_function():
    assert models.loss_of(models.build("mlp", 8, 1, 10)) is models.loss_of(models.build("mlp", 8, 1, 10))


@pytest.mark.parametrize("batch_size", [5, 36, 100])
def test_prediction_does_not_depend_on_the_batch_size(problem, batch_size):
    model, images, _ = problem
    params = model.init(jax.random.key(0), images)
    want = np.asarray(model.apply(params, images)).argmax(-1)
    np.testing.assert_array_equal(predict(model, params, images, batch_size), want)
