"""The trainers and the models, against plain loops."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cg_jax as cg
from experiments import devices, models
from experiments.methods import METHODS
from experiments.train import Recipe, predict, trainer

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


@pytest.mark.parametrize("name", ["sgd", "m3"])
def test_the_mini_batches_of_a_step_are_divided_over_the_devices(name):
    """No device gathers images or computes more than its part; of batches side by side, each would compute all."""
    model = models.build("cnn", 4, None, 10)
    method = trainer(model, name, Recipe(16, RATE), 48)
    images = np.zeros((METHODS[name].groups, 16, 8, 8, 1), np.float32)
    state = method.init(jax.random.key(0), images[0])

    def compiled(put, batches):
        return method.step.lower(put(jax.device_get(state)), *batches, None).compile()

    one = compiled(jax.device_put, jax.device_put((images, np.zeros(images.shape[:2], np.int32))))
    on = devices.devices()
    divided = compiled(on.replicate, on.assemble((images, np.zeros(images.shape[:2], np.int32)), 1))
    assert "all-gather" not in divided.as_text()
    assert "all-reduce" in divided.as_text()
    # Of the mini-batches, which a loop goes through, both count one.
    assert divided.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 8 * 1.2


@pytest.mark.parametrize("name", ["sgd", "mean3", "m3", "rm3", "ra3"])
def test_each_method_takes_the_steps_written_out_by_hand(problem, name):
    model, images, labels = problem
    method = trainer(model, name, Recipe(BATCH, RATE), 36)
    state = method.init(jax.random.key(1), images)
    start = jax.tree.map(jnp.array, state.params)  # the step donates its state
    for first in range(0, 36, method.rows_per_step):
        state = method.step(state, images, labels, first + jnp.arange(method.rows_per_step).reshape(-1, BATCH))
    want = _by_hand(name, model, start, images, labels)
    for got, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "width", "depth", "convolutions"),
    [
        ("cnn", 4, None, 2),
        pytest.param("resnet", 8, 8, 9, marks=pytest.mark.slow),
        pytest.param("resnet", 8, 18, 20, marks=pytest.mark.slow),
    ],
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


def test_the_learning_rate_falls_and_weights_decay_before_the_median(problem):
    model, images, labels = problem
    method = trainer(model, "m3", Recipe(BATCH, RATE, weight_decay=0.1, decay_at=(1,)), 36)
    assert method.per_epoch == 3
    state = method.init(jax.random.key(1), images)
    params = jax.tree.map(jnp.array, state.params)
    for step in range(4):
        rows = 12 * (step % 3) + jnp.arange(12)
        parts = [_mini_batch_gradient(model, params, images[part], labels[part]) for part in rows.reshape(3, 4)]
        rate = RATE if step < 3 else RATE / 10
        direction = jax.tree.map(lambda p, *g: np.median([each + 0.1 * p for each in g], 0), params, *parts)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)  # noqa: B023 called at once
        state = method.step(state, images, labels, rows.reshape(3, 4))
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


class WithBatchNorm(nn.Module):
    """Small, with all that the trainer looks at."""

    norm: str = "batch"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.BatchNorm(not train, momentum=0.9)(x)))


@pytest.mark.parametrize("name", ["sgd", "m3", "mean3"])
def test_batch_norm_normalises_by_each_mini_batch_and_its_averages_follow(problem, name):
    _, images, labels = problem
    model, groups = WithBatchNorm(), METHODS[name].groups
    method = trainer(model, name, Recipe(BATCH, RATE, weight_decay=0.1), 36)
    state = method.init(jax.random.key(1), images)
    want = jax.tree.map(jnp.array, state.params)
    for first in range(0, 24, 4 * groups):
        found = [
            _by_batch(model, want, images[i : i + 4], labels[i : i + 4]) for i in range(first, first + 4 * groups, 4)
        ]
        grads, statistics = zip(*found, strict=True)
        combine = np.median if name == "m3" else np.mean
        direction = jax.tree.map(lambda *g: combine(np.stack(g), 0), *grads)  # noqa: B023 called at once
        weights = jax.tree.map(lambda p, d: p - RATE * (d + 0.1 * p), want["params"], direction)
        want = {"params": weights, "batch_stats": jax.tree.map(lambda *s: np.mean(s, 0), *statistics)}
        state = method.step(state, images, labels, first + jnp.arange(4 * groups).reshape(groups, 4))
    chex.assert_trees_all_close(state.params, want, rtol=1e-3, atol=1e-5)


def _by_batch(model, variables, images, labels):
    """The gradient of the mean loss by the weights, and the running averages after it."""

    def loss(weights):
        everything = {**variables, "params": weights}
        logits, changed = model.apply(everything, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean(), changed["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 25_557_032), ("resnet50_gn", 25_557_032), ("vit_s16", 22_050_664)]
)
def test_the_models_of_imagenet_have_the_parameters_of_the_papers(name, millions):
    model = models.build(name, None, None, 1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == millions
    assert ("batch_stats" in shapes) == (name == "resnet50") == models.has_batch_norm(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_s16"])
def test_the_engine_measures_the_models_of_imagenet(name):
    """Of ResNet-50 by running averages, which are its state."""
    model = models.build(name, 8, 1, 3)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), models.as_input(images[:1]))
    # The last normalisation of a block starts at zero, and all before it has no gradient.
    params["params"] = jax.tree.map(lambda p: jnp.where(p == 0, 0.1, p), params["params"])
    batch = images, np.array([0, 1, 2, 0], np.int32)
    params, state = models.with_state(params)
    loss_fn = models.loss_of(model)
    ghost, plain = (jax.jit(cg.grad_moments(loss_fn, method=m))(params, batch, state=state) for m in ("ghost", "vmap"))
    for part in ("sum_grads", "sum_sq_norms"):
        got, want = (jax.tree.leaves(getattr(each, part)["params"]) for each in (ghost, plain))
        least = 1e-5 * max(float(np.abs(leaf).max()) for leaf in want)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=least)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(ghost.sum_sq_norms["params"]))


def test_bytes_are_normalised_and_numbers_are_not():
    white = models.as_input(jnp.full((1, 2, 2, 3), 255, jnp.uint8))
    np.testing.assert_allclose(
        white[0, 0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )
    np.testing.assert_array_equal(models.as_input(jnp.full((1, 2), 0.5)), jnp.full((1, 2), 0.5))
