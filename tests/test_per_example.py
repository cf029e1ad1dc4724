"""Materialised per-example gradients and alignments."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import temporary_bytes

import cg_jax as cg


@pytest.mark.parametrize("name", ["mlp", "scalar and integer parameters", "tied embedding", "cnn"])
def test_gradients_and_alignments_are_those_of_the_oracle(name):
    case = cases.CASES[name]
    with jax.enable_x64(True):
        params, batch = case.cast(jnp.float64)
        losses, want = oracle.per_example(case.loss_fn, params, batch)
        got = cg.per_example_grads(case.loss_fn)(params, batch)
        assert jax.tree.structure(got) == jax.tree.structure(
            jax.tree.map(lambda p: p if oracle.is_float(p) else None, params)
        )
        for a, b in zip(jax.tree.leaves(got), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())

        mean = jax.tree.map(lambda g: g.mean(0), got)
        aligned = np.asarray(cg.alignments(case.loss_fn)(params, batch, mean))
    flat = np.concatenate([g.reshape(len(losses), -1) for g in want], 1)
    np.testing.assert_allclose(aligned, flat @ flat.mean(0), rtol=1e-10, atol=1e-12 * np.square(flat).sum())
    np.testing.assert_allclose(np.mean(aligned), np.square(flat.mean(0)).sum(), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 16, 37])
def test_alignments_of_a_loss_that_forward_mode_refuses(size):
    case, rng = cases.CASES["custom_vjp"], np.random.default_rng(size)
    with jax.enable_x64(True):
        params, _ = case.cast(jnp.float64)
        batch = rng.normal(size=(size, 4))
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda p: case.loss_fn(p, batch[0]), (params,), (params,))
        _, grads = oracle.per_example(case.loss_fn, params, batch)
        got = cg.alignments(case.loss_fn)(params, batch, params)
    want = sum(
        (g * np.asarray(p)).reshape(size, -1).sum(1) for g, p in zip(grads, jax.tree.leaves(params), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_alignments_build_no_array_of_batch_times_parameters():
    params = jnp.zeros((512, 512))
    batch = jnp.ones((64, 512))

    def loss_fn(w, x):
        return jnp.tanh(x @ w).sum()

    assert temporary_bytes(cg.alignments(loss_fn), params, batch, params) < params.nbytes


def test_the_direction_must_look_like_the_parameters():
    aligned = cg.alignments(lambda p, x: (p["w"] * x).sum())
    params, batch = {"w": jnp.ones(3)}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"Expected direction to have the structure of params, .*, got "):
        aligned(params, batch, {"v": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"Expected direction\['w'\] of shape \(3,\), as in params, got \(2,\)"):
        aligned(params, batch, {"w": jnp.ones(2)})


def test_integer_leaves_have_no_gradient_and_need_no_direction():
    def loss_fn(p, x):
        return p["w"] * x * p["n"]

    params, batch = {"w": jnp.asarray(2.0), "n": jnp.asarray(3)}, jnp.array([1.0, 2.0])
    grads = cg.per_example_grads(loss_fn)(params, batch)
    assert grads["n"] is None
    np.testing.assert_allclose(grads["w"], [3.0, 6.0])
    for direction in ({"w": 1.0, "n": None}, params | {"w": jnp.asarray(1.0)}):
        np.testing.assert_allclose(cg.alignments(loss_fn)(params, batch, direction), [3.0, 6.0])
