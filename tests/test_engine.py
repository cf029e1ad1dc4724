"""The engine against vmap(grad) and against a float64 loop, case by case."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import close_to_scale, temporary_bytes

import cg_jax as cg

PRECISIONS = {"float32": (jnp.float32, 1e-5), "float64": (jnp.float64, 1e-11)}
METHODS = ("ghost", "vmap")


def _poisoned(batch, mask):
    """The batch with garbage in every row where the mask is False."""

    def leaf(x):
        valid = mask.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(valid, x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0)

    return jax.tree.map(leaf, batch)


@pytest.fixture(scope="module")
def wanted():
    """The oracle's word on a case, at numbers that float32 holds, so that it serves both precisions."""
    found = {}

    def statistics(name, rows=None):
        if name not in found:
            with jax.enable_x64(True):
                found[name] = oracle.per_example(cases.CASES[name].loss_fn, *_numbers(name, jnp.float64))
        return oracle.statistics(*found[name], rows)

    return statistics


def _numbers(name, dtype):
    """(params, batch) of a case, rounded to float32, in `dtype`."""
    case = cases.CASES[name]
    return case._replace(**dict(zip(("params", "batch"), case.cast(jnp.float32), strict=True))).cast(dtype)


def _check(moments, want, tolerance):
    assert int(moments.count) == want.count
    close_to_scale([moments.sum_losses], [want.losses.sum()], tolerance, [np.abs(want.losses).sum()])
    close_to_scale(jax.tree.leaves(moments.sum_grads), want.sum_grads, tolerance, want.summed)
    close_to_scale(jax.tree.leaves(moments.sum_sq_norms), want.sum_sq_norms, tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", cases.CASES)
def test_sums_and_norms_are_those_of_the_oracle(name, precision, wanted):
    dtype, tolerance = PRECISIONS[precision]
    rows = np.isin(np.arange(cases.B), (0, 3))
    with jax.enable_x64(precision == "float64"):
        loss_fn = cases.CASES[name].loss_fn
        params, batch = _numbers(name, dtype)
        for method in METHODS:
            moments = cg.grad_moments(loss_fn, method=method)
            _check(moments(params, batch, np.full(cases.B, True)), wanted(name), tolerance)
            _check(moments(params, _poisoned(batch, rows), rows), wanted(name, (0, 3)), tolerance)
        norms = cg.per_example_sq_norms(loss_fn)(params, batch)
        close_to_scale(jax.tree.leaves(norms), wanted(name).sq_norms, tolerance)


def test_the_oracle_agrees_with_backpropagation_by_hand():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=s) for s in ((6, 5), (5,), (5, 4), (4,))]
    images, labels = rng.normal(size=(7, 6)), rng.integers(0, 4, 7)

    def loss_fn(p, e):
        return -jax.nn.log_softmax(jax.nn.relu(e[0] @ p[0] + p[1]) @ p[2] + p[3])[e[1]]

    with jax.enable_x64(True):
        _, grads = oracle.per_example(loss_fn, [jnp.asarray(p) for p in params], (images, labels))
        moments = cg.grad_moments(loss_fn)(params, (images, labels))
    want = oracle.mlp_backprop(params, images, labels)
    close_to_scale(grads, want, 1e-12)
    close_to_scale(jax.tree.leaves(moments.sum_grads), [g.sum(0) for g in want], 1e-12)
    close_to_scale(jax.tree.leaves(moments.sum_sq_norms), [np.square(g).sum() for g in want], 1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_accumulated_in_float32(name, dtype):
    case = cases.CASES[name]
    params, batch = case.cast(dtype)
    with jax.enable_x64(True):
        wide = cases.Case(case.loss_fn, params, batch).cast(jnp.float64)
        want = oracle.statistics(*oracle.per_example(case.loss_fn, *wide))
    error = {}
    for method in METHODS:
        moments = cg.grad_moments(case.loss_fn, method=method)(params, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(moments[1:])} == {jnp.dtype("float32")}
        got = [*jax.tree.leaves(moments.sum_grads), *jax.tree.leaves(moments.sum_sq_norms)]
        error[method] = [
            np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
            for a, b in zip(got, [*want.sum_grads, *want.sum_sq_norms], strict=True)
        ]
    assert max(error["ghost"]) < 2e-2
    assert max(error["ghost"]) <= 2 * max(error["vmap"])


def test_no_array_of_batch_times_parameters_is_built():
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((784, 512), (512, 512), (512, 10))]
    batch = (jnp.zeros((128, 784)), jnp.zeros(128, jnp.int32))

    def loss_fn(p, e):
        return -jax.nn.log_softmax(jax.nn.relu(jax.nn.relu(e[0] @ p[0]) @ p[1]) @ p[2])[e[1]]

    size = 4 * 128 * sum(p.size for p in params)
    assert temporary_bytes(cg.grad_moments(loss_fn), params, batch) < size / 50
    assert temporary_bytes(cg.grad_moments(loss_fn, method="vmap"), params, batch) > size


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied embedding"])
def test_the_sum_is_the_gradient_of_the_summed_loss(name):
    case = cases.CASES[name]
    params, batch = case.cast(jnp.float32)
    moments = jax.jit(lambda p, b: cg.grad_moments(case.loss_fn)(p, b))(params, batch)
    grad = jax.grad(lambda p: jax.vmap(case.loss_fn, in_axes=(None, 0))(p, batch).sum())(params)
    close_to_scale(jax.tree.leaves(moments.sum_grads), [np.asarray(g) for g in jax.tree.leaves(grad)], 1e-5)
