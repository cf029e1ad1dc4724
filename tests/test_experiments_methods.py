"""Steps that average over the examples of a batch, or over agreeing mini-batches, against steps written out by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_weights
import pytest
from test_experiments_train import WithBatchNorm

from experiments import models
from experiments.filtering import gradient_agreement
from experiments.methods import METHODS, check_method
from experiments.train import Recipe, trainer

BATCH, RATE = 4, 0.5
BY_EXAMPLE = [name for name, method in METHODS.items() if method.average is not None and method.groups == 3]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(36, 4, 4, 1)), jnp.float32)
    return models.build("mlp", 8, 1, 10), images, jnp.asarray(rng.integers(0, 10, 36), jnp.int32)


def _gradients(model, params, images, labels):
    """Materialised: [B, P] in float64, and the losses [B]."""

    def loss(p, image, label):
        return -jax.nn.log_softmax(model.apply(p, image[None])[0])[label]

    losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, images, labels)
    return np.asarray(losses, np.float64), oracle_weights.flat([np.float64(g) for g in jax.tree.leaves(grads)])


def _winsorized(losses, grads):
    """Of 12 values the three lowest become the fourth, the three highest the ninth."""
    del losses
    ordered = np.sort(grads, axis=0)
    return np.clip(grads, ordered[3], ordered[8]).mean(0)


def _weighted(weighting, **options):
    return lambda losses, grads: weighting(losses, grads, **options) @ grads


AVERAGES = {
    "clip": _weighted(oracle_weights.clip_quantile, q=0.5),
    "agreement": _weighted(oracle_weights.agreement, share=0.5),
    "clip_agreement": lambda losses, grads: (
        oracle_weights.compose(
            losses,
            grads,
            functools.partial(oracle_weights.clip_quantile, q=0.25),
            functools.partial(oracle_weights.agreement, share=0.7),
        )
        @ grads
    ),
    "geomed": _weighted(oracle_weights.geometric_median, iterations=4),
    "trim_loss": _weighted(oracle_weights.trim_loss, share=0.7),
    "winsorized": _winsorized,
}


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_a_step_is_one_of_the_average_over_all_examples_of_its_mini_batches(problem, name):
    model, images, labels = problem
    method = trainer(model, name, Recipe(BATCH, RATE), 36)
    assert (method.rows_per_step, method.per_epoch) == (12, 3)
    state = method.init(jax.random.key(1), images)
    for first in range(0, 36, 12):
        params = jax.tree.map(jnp.array, state.params)  # the step donates its state
        rows = first + jnp.arange(12)
        direction = AVERAGES[name](*_gradients(model, params, images[rows], labels[rows]))
        state = method.step(state, images, labels, rows.reshape(3, BATCH))
        start, end = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(p)]) for p in (params, state.params))
        np.testing.assert_allclose(end, start - RATE * direction, rtol=1e-4, atol=2e-6)


def test_weights_decay_beside_the_average(problem):
    model, images, labels = problem
    plain, decayed = (trainer(model, "clip", Recipe(BATCH, RATE, weight_decay=w), 36) for w in (0.0, 0.1))
    state = plain.init(jax.random.key(1), images)
    params, again = (jax.tree.map(jnp.array, state) for _ in range(2))
    rows = jnp.arange(12).reshape(3, BATCH)
    want = plain.step(state, images, labels, rows).params
    want = jax.tree.map(lambda w, p: w - RATE * 0.1 * p, want, params.params)
    chex.assert_trees_all_close(decayed.step(again, images, labels, rows).params, want, rtol=1e-5, atol=1e-7)


def test_one_gradient_cannot_be_taken_of_every_example_under_batch_norm(problem):
    _, images, _ = problem
    with pytest.raises(ValueError, match="Expected a model without BatchNorm for geomed"):
        trainer(WithBatchNorm(), "geomed", Recipe(BATCH, RATE), 36).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"Expected model in \('mlp',\) for winsorized, got model=vit_s16"):
        check_method("winsorized", "vit_s16")
    check_method("winsorized", "mlp")
    check_method("m3", "resnet50", batch_norm=True)


def test_a_training_set_is_three_mini_batches_or_more(problem):
    model, *_ = problem
    with pytest.raises(ValueError, match="Expected 3 mini-batches of batch_size=4 or more to train on, got 11"):
        trainer(model, "sgd", Recipe(BATCH, RATE), 11)


def _filtered(parts, threshold):
    total, count = parts[0].copy(), 1
    for part in parts[1:]:
        norms = np.linalg.norm(total) * np.linalg.norm(part)
        if norms > 0 and 1 - total @ part / norms <= threshold:
            total, count = total + part, count + 1
    return total / count if count > 1 else 0 * total


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("threshold", [0.5, 0.97, 1.2, 2.0])
def test_agreeing_mini_batches_are_added_one_after_another(k, threshold):
    for seed in range(20):
        parts = np.random.default_rng(seed).normal(size=(k, 5))
        tree = {"a": jnp.asarray(parts[:, :2], jnp.float32), "b": jnp.asarray(parts[:, 2:], jnp.float32)[..., None]}
        transform = gradient_agreement(threshold)
        got, _ = jax.jit(transform.update)(tree, transform.init(tree))
        want = _filtered(parts, threshold)
        np.testing.assert_allclose(np.concatenate([got["a"], got["b"][:, 0]]), want, rtol=1e-4, atol=1e-6)


def test_mini_batches_that_disagree_skip_the_step():
    transform = gradient_agreement(0.97)
    first, second = np.eye(2, dtype=np.float32)

    def of(*parts):
        return np.asarray(transform.update(jnp.stack(parts), optax.EmptyState())[0])

    np.testing.assert_array_equal(of(first, -first, second), [0, 0])
    np.testing.assert_array_equal(of(0 * first, first, second), [0, 0])
    np.testing.assert_allclose(of(first, -first, first), first)
    np.testing.assert_allclose(of(first, second, first + second), first + second / 2)
    np.testing.assert_allclose(of(first, 3 * first, 2 * first), 2 * first)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 2.1, float("nan")])
def test_a_distance_that_no_two_gradients_can_have_is_refused(threshold):
    with pytest.raises(ValueError, match=r"Expected 0 < threshold <= 2, got threshold="):
        gradient_agreement(threshold)
