"""Clipping equals that of the libraries for differential privacy, at noise 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, B
from optax import contrib

import cg_jax as cg

MODELS = ["mlp", "cnn", "resnet", "layer norm over positions", "tied embedding", "recurrent, scan", "custom_vjp"]
# 0 clips all to nothing, 1e30 clips none, 0.7 times the median norm clips most.
BOUNDS = [0.0, 0.7, 1e30]


def _zero_and_huge():
    """Gradients of norm 0, about 1, and 1e15, in three tensors."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(B, 6))
    rows[0], rows[1] = 0, 1e15 * rows[1]
    params = {"w": jnp.zeros(6), "v": (jnp.zeros(6), jnp.zeros(()))}

    def loss_fn(p, x):
        return p["w"] @ x + 0.5 * p["v"][0] @ x[::-1] + p["v"][1] * x[0]

    return loss_fn, params, jnp.asarray(rows, jnp.float32)


def _case(name):
    """(loss_fn, params, batch, gradients of the examples)."""
    if name == "zero and huge":
        loss_fn, params, batch = _zero_and_huge()
    else:
        loss_fn = CASES[name].loss_fn
        params, batch = CASES[name].cast(jnp.float32)
    return loss_fn, params, batch, jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)


def _bound(share, grads):
    """share times the median norm of the gradients."""
    return float(share * np.median(jax.vmap(optax.tree.norm)(grads)))


def _close(got, want):
    def leaf(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(initial=0))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(leaf, got, want)


@pytest.mark.parametrize("share", BOUNDS)
@pytest.mark.parametrize("name", [*MODELS, "zero and huge"])
class TestClipping:
    def test_the_mean_is_that_of_differentially_private_aggregate(self, name, share):
        loss_fn, params, batch, grads = _case(name)
        bound = _bound(share, grads)
        aggregate = contrib.differentially_private_aggregate(bound, noise_multiplier=0.0, key=0)
        want, _ = aggregate.update(grads, aggregate.init(params))
        _close(cg.weighted_grads(loss_fn, cg.clip_norm(bound))(params, batch)[0], want)

    def test_the_sum_is_that_of_per_example_global_norm_clip(self, name, share):
        loss_fn, params, batch, grads = _case(name)
        bound = _bound(share, grads)
        want, _ = optax.per_example_global_norm_clip(grads, bound)
        _close(cg.weighted_grads(loss_fn, cg.clip_norm(bound, normalize_by=1))(params, batch)[0], want)

    def test_the_sum_by_tensor_is_that_of_per_example_layer_norm_clip(self, name, share):
        loss_fn, params, batch, grads = _case(name)
        bound = _bound(share, grads)
        leaves, structure = jax.tree.flatten(grads)
        want, _ = optax.per_example_layer_norm_clip(leaves, bound, uniform=True)
        clipped = cg.weighted_grads(loss_fn, cg.clip_norm(bound, per_tensor=True, normalize_by=1))
        _close(clipped(params, batch)[0], jax.tree.unflatten(structure, want))

    def test_bounds_of_tensors_are_those_of_per_example_layer_norm_clip_by_size(self, name, share):
        loss_fn, params, batch, grads = _case(name)
        bound, size = _bound(share, grads), sum(leaf.size for leaf in jax.tree.leaves(params))
        leaves, structure = jax.tree.flatten(grads)
        want, _ = optax.per_example_layer_norm_clip(leaves, bound, uniform=False)
        bounds = jax.tree.map(lambda leaf: bound * (leaf.size / size) ** 0.5, params)
        clipped = cg.weighted_grads(loss_fn, cg.clip_norm(bounds, normalize_by=1))
        _close(clipped(params, batch)[0], jax.tree.unflatten(structure, want))

    @pytest.mark.parametrize("over", [1, B, 7.0])
    def test_sum_and_mean_are_those_of_jax_privacy(self, name, share, over):
        jax_privacy = pytest.importorskip("jax_privacy")
        loss_fn, params, batch, grads = _case(name)
        bound = _bound(share, grads)
        theirs = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=bound, normalize_by=over, keep_batch_dim=False)
        ours = cg.weighted_grads(loss_fn, cg.clip_norm(bound, normalize_by=over))
        _close(ours(params, batch)[0], theirs(params, batch))


def test_a_masked_batch_is_that_of_the_examples_that_are_left():
    loss_fn, params, batch, grads = _case("mlp")
    mask = np.arange(B) % 2 == 0
    bound = _bound(0.7, grads)
    aggregate = contrib.differentially_private_aggregate(bound, noise_multiplier=0.0, key=0)
    want, _ = aggregate.update(jax.tree.map(lambda g: g[mask], grads), aggregate.init(params))
    _close(cg.weighted_grads(loss_fn, cg.clip_norm(bound))(params, batch, mask)[0], want)
