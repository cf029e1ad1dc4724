"""The estimators of coherence that need no per-example gradients, and the standard errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType

import cg_jax as cg


def loss_fn(w, x):
    """Its gradient is x; nothing but the data decides what is measured."""
    return w @ x


def batch_loss(w, x):
    return (x @ w).mean()


def _draw(seed, m, dim=40, signal=0.4):
    """m gradients of independent coordinates around a common mean."""
    return (
        np.random.default_rng(seed).normal(size=(m, dim)).astype(np.float32)
        + np.float32(signal) * np.eye(dim, dtype=np.float32)[0]
    )


W = jnp.zeros(40)


def _alpha_of_batches(x, k):
    """The dumbest way: α of the mean gradients of disjoint batches, then the inverse of the formula of k-batches."""
    m = len(x) // k * k
    means = x[:m].reshape(-1, k, x.shape[1]).astype(np.float64).mean(1)
    alpha = oracle.ratios(means)["alpha"]
    c = (m - k) / (k * (m - 1))
    return c * alpha / (1 - alpha * (1 - c))


@pytest.mark.parametrize("n", [None, 1, 8])
@pytest.mark.parametrize(("m", "k"), [(64, 8), (70, 8), (64, 16)])
def test_disjoint_batches_give_what_their_formula_gives(m, k, n):
    x = _draw(0, m)
    mesh = None if n is None else jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    for data in (x, jnp.asarray(x), [x[i : i + k] for i in range(0, m, k)]):
        got = cg.measure_coherence(batch_loss, W, data, batch_size=k, estimator="batch", mesh=mesh)
        np.testing.assert_allclose(got.alpha, _alpha_of_batches(x, k), rtol=2e-5)
        assert (int(got.count), int(got.num_skipped)) == (m // k * k, m % k)
        np.testing.assert_allclose(got.m_coherence, got.alpha * got.count, rtol=1e-6)
        assert got.alpha_stderr > 0
