"""What bad input is told: one clear error, by the name, value and bound of what is wrong."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of

import cg_jax as cg

BATCH = jnp.array([1.0, 4.0, 7.0])


def _two_views(w, x):
    """Consistency of two views of an input: positions are nearly alike, and their cotangents cancel."""
    h = x @ w
    return ((h[0] - h[1]) ** 2).sum()


def _smoothness(w, x):
    return (jnp.diff(jnp.tanh(x @ w), axis=0) ** 2).sum()


@pytest.mark.parametrize(("loss_fn", "positions"), [(_two_views, 2), (_smoothness, 8)])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_norms_of_gradients_that_cancel_over_positions_are_as_good_as_those_of_vmap(loss_fn, positions, apart):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 1, 16)) + apart * rng.normal(size=(32, positions, 16))
    w, x = (rng.normal(size=(16, 16)) / 4).astype(np.float32), x.astype(np.float32)
    assert cg.explain(loss_fn, w, x[0])[0].rule == "gram"
    with jax.enable_x64(True):
        double = functools.partial(loss_fn)  # a function of its own, compiled for its own dtype
        want = np.asarray(cg.per_example_sq_norms(double, method="vmap")(w.astype(np.float64), x.astype(np.float64)))
    ours, plain = (
        np.abs(np.asarray(cg.per_example_sq_norms(loss_fn, method=m)(w, x)) / want - 1) for m in ("ghost", "vmap")
    )
    assert np.median(ours) <= 2 * np.median(plain) + 1e-6


def test_leaves_that_have_no_real_gradient_are_named():
    x = jnp.ones((3, 2))
    with pytest.raises(TypeError, match=r"Expected real parameters, got params\['c'\] of dtype complex64"):
        cg.grad_moments(lambda p, x: jnp.abs((x * p["w"] * p["c"]).sum()))({"w": jnp.ones(2), "c": jnp.ones(2) * 1j}, x)
    for f in (cg.grad_moments, cg.per_example_sq_norms, cg.per_example_grads):
        with pytest.raises(
            TypeError, match=r"every leaf of params to be an array or a number, got params\['s'\] of str"
        ):
            f(lambda p, x: (x * p["w"]).sum())({"w": jnp.ones(2), "s": "name"}, x)
        with pytest.raises(TypeError, match=r"Expected loss_fn to be a function, got int"):
            f(3)


def loss_fn(w, x):
    return 0.5 * (w - x) ** 2


def no_scalar(w, x):
    return jnp.stack([w, x])


def a_pair(w, x):
    return loss_fn(w, x), x


def an_integer(w, x):
    return jnp.int32(3)


def independent(w, x):
    return x**2


# Every function that takes a loss_fn, the arguments after the batch bound.
TAKERS = {
    "grad_moments": lambda f, p, b: cg.grad_moments(f)(p, b),
    "grad_moments, vmap": lambda f, p, b: cg.grad_moments(f, method="vmap")(p, b),
    "per_example_sq_norms": lambda f, p, b: cg.per_example_sq_norms(f)(p, b),
    "per_example_grads": lambda f, p, b: cg.per_example_grads(f)(p, b),
    "alignments": lambda f, p, b: cg.alignments(f)(p, b, p),
    "micro_batch_grads": lambda f, p, b: cg.micro_batch_grads(f, 1)(p, b),
    "measure_coherence": lambda f, p, b: cg.measure_coherence(f, p, b, batch_size=2),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_what_every_function_of_a_loss_refuses(take):
    with pytest.raises(ValueError, match=r"Expected a leading axis of (batch|data) >= 1, got an empty (batch|data)"):
        take(loss_fn, 0.0, jnp.zeros(0))
    with pytest.raises(ValueError, match=r"to share their leading axis, got \{.*\[0\]': 3, .*\[1\]': 2\}"):
        take(lambda w, e: w * e[0] * e[1], 0.0, (BATCH, BATCH[:2]))
    with pytest.raises(ValueError, match=r"to have a leading axis, got (batch|data)\[1\] of shape \(\)"):
        take(lambda w, e: w * e[0] * e[1], 0.0, (BATCH, jnp.asarray(1.0)))
    with pytest.raises(
        ValueError, match=r"Expected (batch|data) to hold at least one (array|batch), got (\(\)|an empty)"
    ):
        take(loss_fn, 0.0, ())
    with pytest.raises(TypeError, match=r"to return one scalar, the loss of ONE example .*, got shape \(2,\)"):
        take(no_scalar, 0.0, BATCH)
    with pytest.raises(TypeError, match=r"to return one scalar, .*, got shape \(\(\), \(\)\)"):
        take(a_pair, 0.0, BATCH)
    with pytest.raises(TypeError, match=r"to return a real floating-point scalar, got dtype int32"):
        take(an_integer, 0.0, BATCH)
    with pytest.raises(ValueError, match=r"Expected loss_fn to depend on params, but its result does not"):
        take(independent, 0.0, BATCH)
    with pytest.raises(ValueError, match=r"Expected params to hold at least one floating-point array, got none"):
        take(lambda w, x: w * x, jnp.asarray(3), BATCH)


@pytest.mark.parametrize("build", [cg.grad_moments, cg.per_example_sq_norms])
def test_an_unknown_method_is_refused_when_built(build):
    with pytest.raises(ValueError, match=r"Expected method in \['ghost', 'vmap'\], got method='goast'"):
        build(loss_fn, method="goast")


@pytest.mark.parametrize("mask", [np.ones(2, bool), np.ones(3, np.int32), np.ones((3, 1), bool)])
def test_a_mask_is_boolean_of_the_batch_size(mask):
    with pytest.raises(ValueError, match=r"Expected mask to be boolean of shape \[3\], got mask of dtype"):
        cg.grad_moments(loss_fn)(0.0, BATCH, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"Expected batch_size >= 1, got batch_size=0"),
        ({"batch_size": 2.5}, r"Expected batch_size to be a whole number >= 1, got batch_size=2.5"),
        ({"batch_size": 2, "method": "exact"}, r"Expected method in .*, got method='exact'"),
        ({"batch_size": 2, "nonfinite": "ignore"}, r"Expected nonfinite in .*'skip'\], got nonfinite='ignore'"),
    ],
)
def test_arguments_of_measure_coherence(arguments, message):
    with pytest.raises(ValueError, match=message):
        cg.measure_coherence(loss_fn, 0.0, BATCH, **arguments)


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(k):
    for build in (
        lambda: cg.consecutive(cg.mean(), k, optax.sgd(1.0)),
        lambda: cg.rolling(cg.mean(), k),
        lambda: cg.median_of_k(k),
        lambda: cg.micro_batch_grads(loss_fn, k),
    ):
        with pytest.raises(ValueError, match=rf"Expected k >= 1, got k={k}\."):
            build()


def test_k_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"Expected k to divide the batch size B, got k=2 and .* B=3 \(remainder 1\)"):
        cg.micro_batch_grads(loss_fn, 2)(0.0, BATCH)


def test_stacked_updates_have_a_leading_axis_of_k():
    with pytest.raises(ValueError, match=r"Expected updates of shape \[k, \*shape\] with k=3, got a leading axis of 2"):
        cg.median_of_k(3).update(jnp.zeros((2, 5)), optax.EmptyState())
    with pytest.raises(ValueError, match=r"Expected all arrays of updates to share their leading axis"):
        cg.stacked(cg.mean()).update({"a": jnp.zeros(2), "b": jnp.zeros(3)}, optax.EmptyState())


@pytest.mark.parametrize(("rule", "name"), [(cg.trimmed_mean, "trim"), (cg.winsorized_mean, "clip")])
def test_values_cut_per_side_are_fewer_than_half(rule, name):
    with pytest.raises(ValueError, match=rf"Expected {name} >= 0, got {name}=-1"):
        rule(-1)
    with pytest.raises(ValueError, match=rf"Expected {name} to be a whole number >= 0, got {name}=0.1"):
        rule(0.1)
    for k in (3, 4):
        with pytest.raises(ValueError, match=rf"Expected {name} < k/2, got {name}=2 and k={k}"):
            rule(2)(jnp.zeros((k, 2)))


@pytest.mark.parametrize("rule", [cg.mean(), cg.median(), cg.trimmed_mean(0), cg.winsorized_mean(0)])
def test_rules_want_floating_values_with_a_leading_axis(rule):
    for shape in ((), (0, 2)):
        with pytest.raises(ValueError, match=r"Expected values of shape \[k, \*shape\] with k >= 1, got shape"):
            rule(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"Expected values of a floating dtype, got dtype int32"):
        rule(jnp.zeros((3, 2), jnp.int32))


def test_integer_leaves_are_left_out_of_every_sum():
    def loss(p, x):
        return p["w"] * x * p["n"]

    params = {"w": jnp.asarray(2.0), "n": jnp.asarray(3)}
    for method in ("ghost", "vmap"):
        moments = cg.grad_moments(loss, method=method)(params, BATCH)
        assert moments.sum_grads["n"] is None is moments.sum_sq_norms["n"]
        assert list(cg.coherence(moments).per_tensor) == ["w"]
        assert cg.per_example_sq_norms(loss, method=method)(params, BATCH)["n"] is None
        np.testing.assert_allclose(moments.sum_grads["w"], 36.0)


def test_grad_moments_propagates_what_is_not_finite():
    moments = cg.grad_moments(loss_fn)(0.0, jnp.array([1.0, jnp.nan]))
    assert np.isnan(moments.sum_grads)
    assert np.isnan(moments.sum_sq_norms)


def accuracy(w, e):
    x, y = e
    return (jnp.sign(w @ x) == y).astype(jnp.float32) + 0.0 * w.sum()


ALL_ZERO = r"Expected some gradient other than zero, got 3 that are zero or so small .*; measure a loss that can be"


@pytest.mark.parametrize("more", [{"confidence": True}, {"estimator": "signs"}, {"method": "vmap"}])
def test_all_gradients_zero_is_nan_and_warned_of(more):
    data = (np.ones((3, 2), np.float32), np.ones(3, np.float32))
    for mesh in (None, mesh_of(2)):
        with pytest.warns(UserWarning, match=ALL_ZERO):
            result = cg.measure_coherence(accuracy, jnp.ones(2), data, batch_size=2, mesh=mesh, **more)
        assert np.isnan(result.alpha)
        assert np.isnan(result.m_coherence)
        assert float(result.loss) == 1


def test_all_gradients_zero_of_batches():
    with pytest.warns(UserWarning, match=r"Expected some gradient other than zero, got 2 that are zero"):
        cg.measure_coherence(lambda w, x: (0.0 * w * x).mean(), 1.0, BATCH, batch_size=2, estimator="batch")


def test_squares_below_the_range_are_warned_of():
    with pytest.warns(UserWarning, match=ALL_ZERO):
        assert np.isnan(cg.measure_coherence(lambda w, x: 1e-30 * w * x, 1.0, BATCH, batch_size=2).alpha)


def test_other_reasons_for_nan_are_not_warned_of():
    """Nothing was measured, or is finite; or random signs cancel."""
    nan = jnp.full(3, jnp.nan)
    assert np.isnan(cg.measure_coherence(loss_fn, 0.0, nan, batch_size=2, nonfinite="skip").alpha)
    assert np.isnan(cg.measure_coherence(loss_fn, 0.0, nan, batch_size=2, nonfinite="propagate").alpha)
    for seed in range(12):
        cg.measure_coherence(lone, 1.0, jnp.ones(2), batch_size=2, estimator="signs", seed=seed)
    assert np.isfinite(
        cg.measure_coherence(lambda p, x: p["a"] * x + 0 * p["b"], {"a": 1.0, "b": 1.0}, BATCH, batch_size=2).alpha
    )


def lone(w, x):
    return w * x


def test_a_masked_row_under_a_norm_spoils_nothing():
    # At w = 0 the derivative of ‖w x‖ is 0/0 for x = 0: a padding row of zeros times a weight of 0 would be NaN.
    def loss(w, x):
        return jnp.sqrt(jnp.sum((w * x) ** 2))

    rows = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    for method in ("ghost", "vmap"):
        moments = cg.grad_moments(loss, method=method)(jnp.ones(2), rows, np.array([True, False, True]))
        want = cg.grad_moments(loss, method=method)(jnp.ones(2), rows[::2])
        chex.assert_trees_all_close(moments, want, rtol=1e-6)


def test_a_mask_of_nothing_gives_the_moments_of_no_examples():
    for method in ("ghost", "vmap"):
        moments = cg.grad_moments(loss_fn, method=method)(0.0, BATCH, np.zeros(3, bool))
        assert [float(leaf) for leaf in moments] == [0, 0, 0, 0]
