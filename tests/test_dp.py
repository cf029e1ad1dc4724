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


def _bounds(grads):
    """Bounds that clip all to nothing, most, and none."""
    return [0.0, 0.7 * float(np.median(jax.vmap(optax.tree.norm)(grads))), 1e30]


def _aggregated(grads, bound):
    """The mean by optax, of clipped gradients without noise."""
    aggregate = contrib.differentially_private_aggregate(bound, noise_multiplier=0.0, key=0)
    return aggregate.update(grads, aggregate.init(None))[0]


def _close(got, want):
    def leaf(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(initial=0))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(leaf, got, want)


@pytest.mark.parametrize("name", [*MODELS, "zero and huge"])
class TestClipping:
    def test_the_mean_is_that_of_differentially_private_aggregate(self, name):
        loss_fn, params, batch, grads = _case(name)
        ours = jax.jit(lambda c: cg.weighted_grads(loss_fn, cg.clip_norm(c))(params, batch)[0])
        theirs = jax.jit(lambda c: _aggregated(grads, c))
        for bound in _bounds(grads):
            _close(ours(bound), theirs(bound))

    def test_the_sum_is_that_of_per_example_global_norm_clip(self, name):
        loss_fn, params, batch, grads = _case(name)
        ours = jax.jit(lambda c: cg.weighted_grads(loss_fn, cg.clip_norm(c, normalize_by=1))(params, batch)[0])
        for bound in _bounds(grads):
            _close(ours(bound), optax.per_example_global_norm_clip(grads, bound)[0])

    @pytest.mark.parametrize("uniform", [True, False])
    def test_the_sum_by_tensor_is_that_of_per_example_layer_norm_clip(self, name, uniform):
        loss_fn, params, batch, grads = _case(name)
        leaves, structure = jax.tree.flatten(grads)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))

        @jax.jit
        def ours(c):
            by_size = jax.tree.map(lambda leaf: c * (leaf.size / size) ** 0.5, params)
            weighting = cg.clip_norm(c if uniform else by_size, per_tensor=uniform, normalize_by=1)
            return cg.weighted_grads(loss_fn, weighting)(params, batch)[0]

        for bound in _bounds(grads):
            want, _ = optax.per_example_layer_norm_clip(leaves, bound, uniform=uniform)
            _close(ours(bound), jax.tree.unflatten(structure, want))

    @pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("over", [1, B, 7.0])
    def test_sum_and_mean_are_those_of_jax_privacy(self, name, over):
        jax_privacy = pytest.importorskip("jax_privacy")
        loss_fn, params, batch, grads = _case(name)
        ours = jax.jit(lambda c: cg.weighted_grads(loss_fn, cg.clip_norm(c, normalize_by=over))(params, batch)[0])
        for bound in _bounds(grads):
            clipped = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=bound, normalize_by=over, keep_batch_dim=False)
            _close(ours(bound), clipped(params, batch))


def test_a_masked_batch_is_that_of_the_examples_that_are_left():
    loss_fn, params, batch, grads = _case("mlp")
    mask = np.arange(B) % 2 == 0
    bound = _bounds(grads)[1]
    want = _aggregated(jax.tree.map(lambda g: g[mask], grads), bound)
    _close(cg.weighted_grads(loss_fn, cg.clip_norm(bound))(params, batch, mask)[0], want)
