"""Random small programs: the engine against the float64 oracle. CG_JAX_FUZZ=500 runs that many in the slow test."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import cg_jax as cg

B, T, D = 3, 4, 4
NUMBER = int(os.environ.get("CG_JAX_FUZZ", "50"))
RUNS = itertools.count(1)

# Each part takes [T, D] to [T, D] by a matrix [D, D] and a vector [D], views of parameters.
PARTS = {
    "product": lambda h, w, b: h @ w,
    "product from the left": lambda h, w, b: (w @ h.T).T,
    "bias": lambda h, w, b: h + b[None],
    "scale": lambda h, w, b: h * b[None],
    "one row scaled": lambda h, w, b: h.at[1].multiply(b),
    "quotient": lambda h, w, b: h / (2 + jnp.sin(b))[None],
    "maximum": lambda h, w, b: jnp.maximum(h, b[None]),
    "convolution": lambda h, w, b: lax.conv_general_dilated(
        h[None], w.reshape(2, 2, 4), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )[0],
    "rows by index": lambda h, w, b: h + w[jnp.argsort(h[:, 0])],
    "attention": lambda h, w, b: jax.nn.softmax(h @ w @ h.T / 4) @ h,
    "recurrence": lambda h, w, b: lax.scan(lambda c, row: (jnp.tanh(c @ w + row),) * 2, b, h)[1],
    "recurrence backwards": lambda h, w, b: lax.scan(
        lambda c, row: (0.5 * c + row @ w, jnp.sin(c)), jnp.zeros(D), h, reverse=True
    )[1],
    "layers in a scan": lambda h, w, b: lax.scan(
        lambda c, layer: (jnp.tanh(c @ layer + b[None]), None), h, jnp.stack([w, w.T])
    )[0],
    "checkpoint": lambda h, w, b: jax.checkpoint(lambda h: jnp.tanh(h @ w) * b[None])(h),
    "condition": lambda h, w, b: lax.cond(h[0, 0] > 0, lambda: jnp.tanh(h @ w), lambda: h * b[None]),
    "vmap": lambda h, w, b: jax.vmap(lambda row: w @ row + b)(h),
    "nothing": lambda h, w, b: jnp.tanh(h),
}
MATRICES = {
    "itself": lambda w, v: w,
    "transposed": lambda w, v: w.T,
    "product": lambda w, v: w @ v / 2,
    "sum": lambda w, v: w + 0.5 * v,
    "masked": lambda w, v: w * (jnp.arange(16.0).reshape(4, 4) % 3),
    "halves": lambda w, v: jnp.concatenate([w[:2], v[:2]]),
    "stopped": lambda w, v: w * lax.stop_gradient(v),
    "normalised": lambda w, v: w / jnp.linalg.norm(w),
}
STEP = st.tuples(
    st.sampled_from(sorted(PARTS)), st.sampled_from(sorted(MATRICES)), st.integers(0, 2), st.integers(0, 2)
)


def _check(program, seed):
    if next(RUNS) % 20 == 0:
        jax.clear_caches()  # hundreds of compiled programs use up the memory maps that a process may have
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        params = {
            "w": [jnp.asarray(0.6 * rng.normal(size=(D, D))) for _ in range(3)],
            "b": [jnp.asarray(rng.normal(size=D)) for _ in range(3)],
        }
        batch = rng.normal(size=(B, T, D))

        def loss_fn(p, x):
            for part, view, i, j in program:
                x = PARTS[part](x, MATRICES[view](p["w"][i], p["w"][j]), p["b"][j])
            # Every parameter is used, so that no program is refused for using none.
            return jnp.sin(x).sum() + sum(x[0] @ b for b in p["b"]) / 3

        want = oracle.statistics(*oracle.per_example(loss_fn, params, batch))
        moments = cg.grad_moments(loss_fn)(params, batch)
        norms = cg.per_example_sq_norms(loss_fn)(params, batch)
        whole = max(scale for scale in want.summed)
        for got, exact in zip(jax.tree.leaves(moments.sum_grads), want.sum_grads, strict=True):
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-11 * whole)
        for got, exact in zip(jax.tree.leaves(norms), want.sq_norms, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-12 * whole**2)


# A program is a loss of its own.
_FRESH_LOSSES = pytest.mark.filterwarnings("ignore:Expected the same loss_fn object")
_PROGRAMS = given(st.lists(STEP, min_size=1, max_size=5), st.integers(0, 2**16))


@_FRESH_LOSSES
@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@_PROGRAMS
def test_a_few_random_programs(program, seed):
    _check(program, seed)


@pytest.mark.slow
@_FRESH_LOSSES
@settings(deadline=None, max_examples=NUMBER, derandomize=NUMBER == 50, suppress_health_check=[HealthCheck.too_slow])
@_PROGRAMS
def test_random_programs(program, seed):
    _check(program, seed)
