"""Narrow dtypes, and numbers near the ends of their range."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import cg_jax as cg
from cg_jax import trees
from cg_jax.estimators.batch import Batch, BatchState

FLOAT8 = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.float8_e3m4]
NARROW = [*FLOAT8, jnp.float4_e2m1fn]


def linear(w, x):
    return x @ w


def test_the_accumulator_dtype_of_every_floating_dtype():
    for dtype in (*NARROW, jnp.float16, jnp.bfloat16, jnp.float32):
        assert trees.accumulator_dtype(dtype) == jnp.float32
        assert trees.is_differentiable(jnp.ones(2, dtype))
    assert trees.accumulator_dtype(jnp.float64) == jnp.float64
    assert trees.accumulator_dtype(jnp.complex64) == jnp.complex64
    with jax.numpy_dtype_promotion("strict"):
        assert trees.accumulator_dtype(jnp.bfloat16) == jnp.float32


# The direction is out of the range of float16, or has digits that a narrow dtype has not.


def test_alignments_of_float16_fit_in_float32():
    w, x = jnp.ones(4, jnp.float16), np.full((9, 4), 1e3, np.float16)
    got = cg.alignments(linear)(w, x, cg.grad_moments(linear)(w, x).sum_grads / 9)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full(9, 4e6, np.float32))


@jax.custom_vjp
def _same(h):
    return h


_same.defvjp(lambda h: (h, None), lambda _, g: (g,))

# A loss that computes in float16 somewhere, and the dtype of its parameters.
IN_FLOAT16 = {
    "parameters": (linear, jnp.float16),
    "custom_vjp": (lambda w, x: _same(x @ w), jnp.float16),
    "inside": (lambda w, x: (x @ w.astype(jnp.float16)).astype(jnp.float32), jnp.float32),
    "inside a jit": (jax.jit(lambda w, x: (x @ w.astype(jnp.float16)).astype(jnp.float32)), jnp.float32),
    "the loss": (lambda w, x: (x.astype(jnp.float32) @ w).astype(jnp.float16), jnp.float32),
}


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_a_direction_may_leave_the_range_of_float16(name):
    loss, dtype = IN_FLOAT16[name]
    w, x = jnp.ones(4, dtype), np.array([[1e3, 2e3, 3e3, -4e3], [4e3, 0, 0, 1]], np.float16)
    direction = jnp.array([1e5, 1e-6, 3e6, 2e4])
    got = cg.alignments(loss)(w, x, direction)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x.astype(np.float64) @ np.asarray(direction, np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_no_digits_of_a_direction_are_lost(dtype):
    w, x = jnp.ones(64, dtype), jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), dtype)
    direction = jnp.full(64, 1.001)
    got = cg.alignments(linear)(w, x, direction)  # whose gradients are x, in any dtype
    want = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(direction, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_every_result_of_narrow_parameters_is_in_float32(dtype):
    """Losses whose sum leaves the range of float16, and gradients whose squares do."""
    w, x = jnp.ones(4, dtype), jnp.asarray(np.random.default_rng(0).uniform(5e3, 1e4, size=(12, 4)), dtype)
    grads = np.asarray(x.astype(jnp.float32), np.float64)
    losses = np.asarray(jax.vmap(linear, (None, 0))(w, x).astype(jnp.float32), np.float64)
    for method in ("ghost", "vmap"):
        moments = cg.grad_moments(linear, method=method)(w, x)
        assert {leaf.dtype for leaf in moments[1:]} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(moments.sum_losses, losses.sum(), rtol=1e-6)
        np.testing.assert_allclose(moments.sum_grads, grads.sum(0), rtol=1e-6)
        np.testing.assert_allclose(moments.sum_sq_norms, np.square(grads).sum(), rtol=1e-6)
        got = cg.measure_coherence(linear, w, x, batch_size=8, method=method, confidence=True)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
        np.testing.assert_allclose(got.alpha, oracle.ratios(grads)["alpha"], rtol=1e-5)
        np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-6)
    exact = cg.measure_coherence(linear, jnp.ones(4), x.astype(jnp.float32), batch_size=8, confidence=True)
    np.testing.assert_allclose(got.alpha_stderr, exact.alpha_stderr, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("estimator", ["signs", "batch"])
def test_estimates_of_narrow_parameters_are_in_float32(estimator, dtype):
    w, x = jnp.ones(4, dtype), jnp.asarray(np.random.default_rng(0).uniform(4e3, 8e3, size=(8, 4)), dtype)
    loss = linear if estimator == "signs" else lambda w, x: jax.vmap(linear, (None, 0))(w, x / 2).mean()
    got, want = (
        cg.measure_coherence(loss, w.astype(d), x.astype(d), batch_size=2, estimator=estimator)
        for d in (dtype, jnp.float32)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    for field in ("loss", "alpha", "mean_grad_norm"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), rtol=2e-2, err_msg=field)


# float8 and float4: gradients of these are exact in each.


def widened(w, x):
    return (x @ w.astype(jnp.float32)) ** 2


X = np.random.default_rng(0).choice([-1.0, 1.0], size=(8, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_parameters_in_float8_and_float4_give_what_they_give_in_float32(dtype):
    narrow, wide = jnp.full(4, 0.5, dtype), jnp.full(4, 0.5)
    assert jax.grad(widened)(narrow, X[0]).dtype == dtype
    for method in ("ghost", "vmap"):
        got, want = (cg.grad_moments(widened, method=method)(w, X) for w in (narrow, wide))
        chex.assert_trees_all_equal(got, want)
        assert got.sum_grads.dtype == got.sum_sq_norms.dtype == jnp.float32
        chex.assert_trees_all_equal(cg.merge(cg.GradMoments.zeros(narrow), got), want)
        got, want = (cg.per_example_sq_norms(widened, method=method)(w, X) for w in (narrow, wide))
        np.testing.assert_array_equal(got, want)
    got, want = (cg.per_example_grads(widened)(w, X) for w in (narrow, wide))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want)
    direction = jnp.array([1e3, 1.001, -1e-3, 7.0])
    got, want = (cg.alignments(widened)(w, X, direction) for w in (narrow, wide))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(cg.alignments(widened)(narrow, X, narrow), cg.alignments(widened)(wide, X, wide))
    assert cg.explain(widened, narrow, X[0])[0].rule == "closed"


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float4_e2m1fn])
def test_measurements_of_parameters_in_float8_and_float4(dtype):
    mean = lambda w, x: jax.vmap(widened, (None, 0))(w, x).mean()  # noqa: E731
    for loss, more in (
        (widened, {"confidence": True, "method": "ghost"}),
        (widened, {"confidence": True, "method": "vmap"}),
        (mean, {"estimator": "batch"}),
        *([(widened, {"estimator": "signs"})] if dtype == jnp.float8_e4m3fn else []),  # its sums are float4
    ):
        got, want = (
            cg.measure_coherence(loss, jnp.full(4, 0.5, d), X, batch_size=2, **more) for d in (dtype, jnp.float32)
        )
        np.testing.assert_allclose(got.alpha, want.alpha, rtol=1e-6)
        np.testing.assert_allclose(got.alpha_stderr, want.alpha_stderr, rtol=1e-6)


def test_a_sum_that_leaves_the_range_of_float8():
    moments = cg.grad_moments(widened, method="vmap")(
        jnp.full(4, 0.5, jnp.float8_e4m3fn), np.ones((200, 4), np.float32)
    )
    np.testing.assert_array_equal(moments.sum_grads, np.full(4, 800.0))


# The ends of float32.


def test_a_finite_loss_and_a_finite_square_whose_sum_is_not_are_finite():
    x = np.array([[1.2e19]], np.float32)
    for name, loss in (("exact", linear), ("signs", linear), ("batch", lambda w, x: (x @ w).mean())):
        got = cg.measure_coherence(loss, jnp.array([2.5e19]), x, batch_size=1, estimator=name)
        np.testing.assert_allclose([got.loss, got.mean_grad_norm], [3e38, 1.2e19], rtol=1e-5)


def test_a_squared_norm_above_the_range_is_said_not_to_be_finite():
    with pytest.raises(FloatingPointError, match=r"got 1 of 1 examples in one batch that are not"):
        cg.measure_coherence(linear, jnp.ones(1), np.array([[1e20]], np.float32), batch_size=1)


def test_the_estimate_of_batches_fits_where_the_square_of_the_sum_does_not():
    m, k, size = 16, 2, 4e18
    zero = jnp.float32(0)
    state = BatchState(
        count=jnp.int32(m),
        number=jnp.int32(m // k),
        sum_losses=zero,
        sum_grads=jnp.full(1, m * size),
        sq_means=jnp.float32(m / k * size**2),
        sum_apart=zero,
        sum_sq_apart=zero,
        previous=jnp.zeros(1),
    )
    moments = Batch().moments(state)
    np.testing.assert_allclose(moments.sum_sq_norms, m * size**2, rtol=1e-5)
