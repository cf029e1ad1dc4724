"""The estimators of coherence that need no per-example gradients, and the standard errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import compilations, mesh_of

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
    mesh = n and mesh_of(n)
    for data in (x, jnp.asarray(x), [x[i : i + k] for i in range(0, m, k)]):
        got = cg.measure_coherence(batch_loss, W, data, batch_size=k, estimator="batch", mesh=mesh)
        np.testing.assert_allclose(got.alpha, _alpha_of_batches(x, k), rtol=2e-5)
        assert (int(got.count), int(got.num_skipped)) == (m // k * k, m % k)
        np.testing.assert_allclose(got.m_coherence, got.alpha * got.count, rtol=1e-6)
        assert got.alpha_stderr > 0


def _alphas(measure, number=60):
    """(mean, spread, mean of the standard errors) of α over repeated measurements."""
    found = [measure(seed) for seed in range(number)]
    alphas, errors = np.array([f.alpha for f in found]), np.array([f.alpha_stderr for f in found])
    return alphas.mean(), alphas.std(ddof=1), errors.mean()


# The spread of 60 draws is itself known to 9%; the estimates are ratios, a little off their mean.
def _check_error(found, want, *, bias=0.1, error=0.25):
    mean, spread, stderr = found
    assert abs(mean / want - 1) < bias
    assert 1 - error < stderr / spread < 1 + error


@pytest.mark.parametrize("signal", [0.4, 3.0])
@pytest.mark.parametrize("k", [8, 32])
def test_batches_estimate_the_exact_alpha_and_say_how_well(k, signal):
    x = _draw(0, 256, signal=signal)

    def measure(seed):
        shuffled = np.random.default_rng(seed).permutation(x)
        return cg.measure_coherence(batch_loss, W, shuffled, batch_size=k, estimator="batch")

    _check_error(_alphas(measure), oracle.ratios(x.astype(np.float64))["alpha"])


@pytest.mark.parametrize("number", [4, 8])
def test_the_errors_of_few_batches_are_right_on_average(number):
    x = _draw(0, 16 * number, signal=1.0)

    def batches(seed):
        shuffled = np.random.default_rng(seed).permutation(x)
        return cg.measure_coherence(batch_loss, W, shuffled, batch_size=16, estimator="batch")

    def signs(seed):
        return cg.measure_coherence(loss_fn, W, x, batch_size=4 * number, estimator="signs", seed=seed)

    for measure in (batches, signs):
        found = [measure(seed) for seed in range(150)]
        spread = np.std([f.alpha for f in found], ddof=1)
        assert 0.85 < np.mean([f.alpha_stderr for f in found]) / spread < 1.2


@pytest.mark.parametrize("signal", [0.4, 3.0])
def test_signs_estimate_the_exact_alpha_and_say_how_well(signal):
    x = _draw(0, 256, signal=signal)

    def measure(seed):
        return cg.measure_coherence(loss_fn, W, x, batch_size=16, estimator="signs", seed=seed)

    _check_error(_alphas(measure), oracle.ratios(x.astype(np.float64))["alpha"])


def _jackknife(seed, m, signal):
    return cg.measure_coherence(loss_fn, W, _draw(seed, m, signal=signal), batch_size=m, confidence=True)


@pytest.mark.parametrize(("signal", "m"), [(1.2, 400), (3.0, 256)])
def test_the_jackknife_says_how_alpha_scatters_over_new_draws(signal, m):
    mean, spread, stderr = _alphas(lambda seed: _jackknife(seed, m, signal))
    assert mean * m >= 10
    assert 0.8 < stderr / spread < 1.25


def test_the_jackknife_is_conservative_near_the_orthogonal_limit():
    mean, spread, stderr = _alphas(lambda seed: _jackknife(seed, 256, 0.1))
    assert mean * 256 < 2
    assert 1.1 < stderr / spread < 2


def test_the_jackknife_is_its_formula():
    x = _draw(0, 50).astype(np.float64)
    alpha, mean, q = oracle.ratios(x)["alpha"], x.mean(0), np.square(x).sum(1)
    moved = 2 * (x @ mean - mean @ mean) / q.mean() - mean @ mean * (q - q.mean()) / q.mean() ** 2
    want = np.sqrt(np.square(moved).sum()) / len(x)
    data = x.astype(np.float32)
    for mesh in (None, mesh_of(8)):
        for given in (data, jnp.asarray(data), [data[:7], data[7:23], data[23:39], data[39:]]):
            got = cg.measure_coherence(loss_fn, W, given, batch_size=16, confidence=True, mesh=mesh)
            np.testing.assert_allclose([got.alpha, got.alpha_stderr], [alpha, want], rtol=1e-4)
    spoilt = np.concatenate([data[:5], np.full((1, 40), np.nan, np.float32), data[5:]])
    got = cg.measure_coherence(loss_fn, W, spoilt, batch_size=16, confidence=True, nonfinite="skip")
    np.testing.assert_allclose([got.alpha, got.alpha_stderr], [alpha, want], rtol=1e-4)


def test_what_reads_twice_needs_data_that_can_be_read_twice():
    data = _draw(0, 64)
    with pytest.raises(TypeError, match=r"arrays or a list of batches with confidence=True, .* got generator"):
        cg.measure_coherence(loss_fn, W, (data[i : i + 8] for i in range(8)), batch_size=8, confidence=True)
    for name in ("batch", "signs"):
        with pytest.raises(ValueError, match=rf"Expected estimator='exact' with confidence=True, got .*'{name}'"):
            cg.measure_coherence(loss_fn, W, data, batch_size=8, confidence=True, estimator=name)


def test_the_sum_is_exact_whatever_the_estimator():
    x = _draw(0, 64)
    exact = cg.measure_coherence(loss_fn, W + 1, x, batch_size=8)
    assert np.isnan(exact.alpha_stderr)
    for name, loss in (("signs", loss_fn), ("batch", batch_loss)):
        got = cg.measure_coherence(loss, W + 1, x, batch_size=8, estimator=name)
        for field in ("loss", "mean_grad_norm", "count"):
            np.testing.assert_allclose(getattr(got, field), getattr(exact, field), rtol=1e-5, err_msg=f"{name} {field}")


@pytest.mark.parametrize("name", ["signs", "batch"])
def test_tensors_add_up(name):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.zeros(3)}

    def one(p, x):
        return (jnp.tanh(x @ p["a"] + p["b"]) ** 2).sum()

    loss = one if name == "signs" else lambda p, x: jax.vmap(one, (None, 0))(p, x).mean()
    got = cg.measure_coherence(loss, params, rng.normal(size=(64, 4)).astype(np.float32), batch_size=8, estimator=name)
    assert list(got.per_tensor) == ["a", "b"]
    parts = [float(tensor.share * tensor.alpha) for tensor in got.per_tensor.values()]
    np.testing.assert_allclose(sum(parts), got.alpha, rtol=1e-5)


def test_too_few_batches_are_nan_and_no_batch_is_an_error():
    one = cg.measure_coherence(batch_loss, W, _draw(0, 8), batch_size=8, estimator="batch")
    assert np.isnan(one.alpha)
    assert np.isfinite(one.mean_grad_norm)
    two = cg.measure_coherence(batch_loss, W, _draw(0, 16), batch_size=8, estimator="batch")
    assert np.isfinite(two.alpha)
    assert np.isnan(two.alpha_stderr)
    assert cg.measure_coherence(loss_fn, W, _draw(0, 8), batch_size=8, estimator="signs").alpha_stderr > 0
    assert np.isnan(cg.measure_coherence(loss_fn, W, _draw(0, 1), batch_size=8, confidence=True).alpha_stderr)
    with pytest.raises(ValueError, match=r"Expected at least one whole batch of batch_size=8, got 7 examples"):
        cg.measure_coherence(batch_loss, W, _draw(0, 7), batch_size=8, estimator="batch")
    mesh = mesh_of(8)
    with pytest.raises(ValueError, match=r"Expected the data axis to divide batch_size, got the data axis=8 and"):
        cg.measure_coherence(batch_loss, W, _draw(0, 60), batch_size=12, estimator="batch", mesh=mesh)
    with pytest.raises(ValueError, match=r"Expected estimator in \['batch', 'exact', 'signs'\], got estimator='other'"):
        cg.measure_coherence(loss_fn, W, _draw(0, 8), batch_size=8, estimator="other")
    with pytest.raises(TypeError, match=r"one scalar, the mean loss of a batch, got shape \(8,\)"):
        cg.measure_coherence(lambda w, x: x @ w, W, _draw(0, 8), batch_size=8, estimator="batch")


@pytest.mark.parametrize("n", [None, 8])
@pytest.mark.parametrize(("name", "loss"), [("signs", loss_fn), ("batch", batch_loss)])
def test_a_batch_that_is_not_finite_is_left_out_whole(name, loss, n):
    x = _draw(0, 64)
    spoilt = x.copy()
    spoilt[10] = np.inf
    mesh = n and mesh_of(n)
    got = cg.measure_coherence(loss, W + 1, spoilt, batch_size=8, estimator=name, mesh=mesh, nonfinite="skip")
    lost = 1 if name == "signs" and n else 8  # each device has a batch of its own
    assert (int(got.num_skipped), int(got.count)) == (lost, 64 - lost)
    assert np.isfinite(got.alpha)
    with pytest.raises(FloatingPointError, match=r"from index (8|10) on"):
        cg.measure_coherence(loss, W + 1, spoilt, batch_size=8, estimator=name, mesh=mesh)


@pytest.mark.parametrize("n", [None, 8])
def test_a_batch_of_signs_is_skipped_and_counted_whole_and_padding_is_not(n):
    mesh = n and mesh_of(n)
    x = _draw(0, 20)
    x[-1] = np.nan
    got = cg.measure_coherence(loss_fn, W, x, batch_size=16, estimator="signs", nonfinite="skip", mesh=mesh)
    assert np.isfinite(got.alpha)
    assert int(got.count) + int(got.num_skipped) == 20
    assert int(got.num_skipped) == (4 if n is None else 2)

    def infinite(w, x):  # its gradient is finite
        return w @ x + jnp.where(x[1] > 2, jnp.inf, 0)

    x = _draw(0, 20)
    x[:, 1] = np.where(np.arange(20) == 3, 3, 0)
    got = cg.measure_coherence(infinite, W, x, batch_size=10, estimator="signs", nonfinite="skip", mesh=mesh)
    assert int(got.count) + int(got.num_skipped) == 20
    assert int(got.num_skipped) == (10 if n is None else 2)


@pytest.mark.parametrize("scale", [1e-10, 1e-7, 1e7])
def test_the_errors_do_not_depend_on_the_size_of_the_gradients_or_are_nan(scale):
    x = _draw(0, 64)
    for loss, more in (
        (loss_fn, {"confidence": True}),
        (loss_fn, {"estimator": "signs"}),
        (batch_loss, {"estimator": "batch"}),
    ):
        want, got = (cg.measure_coherence(loss, W, data, batch_size=8, **more) for data in (x, np.float32(scale) * x))
        np.testing.assert_allclose(got.alpha, want.alpha, rtol=1e-4)
        if scale == 1e-10 and "estimator" in more:
            assert np.isnan(got.alpha_stderr)
        else:
            np.testing.assert_allclose(got.alpha_stderr, want.alpha_stderr, rtol=1e-3)


def test_the_error_of_signs_is_theirs_alone_where_norms_differ():
    rng = np.random.default_rng(0)
    x = _draw(0, 256, signal=1.0) * np.exp(1.5 * rng.normal(size=(256, 1))).astype(np.float32)

    def measure(seed):
        return cg.measure_coherence(loss_fn, W, x, batch_size=16, estimator="signs", seed=seed)

    _check_error(_alphas(measure), oracle.ratios(x.astype(np.float64))["alpha"])
    mesh = mesh_of(8)
    alone = cg.measure_coherence(loss_fn, W, x, batch_size=8, estimator="signs", mesh=mesh)
    exact = cg.measure_coherence(loss_fn, W, x, batch_size=8)
    np.testing.assert_allclose(alone.alpha, exact.alpha, rtol=1e-4)  # one example for each device: Q itself
    assert alone.alpha_stderr < 1e-5


def test_a_seed_is_no_other_program():
    x = _draw(0, 24, dim=41)[:, :40]
    with compilations("step") as names:
        for seed in range(3):
            cg.measure_coherence(loss_fn, W, x, batch_size=12, estimator="signs", seed=seed)
    assert len(names) == 1


def test_batch_normalisation_in_training_mode_is_of_the_whole_batch_on_any_mesh():
    model = nn.Sequential([nn.Dense(16), nn.BatchNorm(use_running_average=False), nn.relu, nn.Dense(3)])
    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 3, 96)
    variables = model.init(jax.random.key(0), x[:8])

    def loss(params, batch):
        images, labels = batch
        logits, _ = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    want = [jax.grad(loss)(variables["params"], (x[i : i + 16], y[i : i + 16])) for i in range(0, 96, 16)]
    means = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in want])
    alpha = oracle.ratios(means.astype(np.float64))["alpha"]
    c = (96 - 16) / (16 * 95)
    for mesh in (None, mesh_of(8)):
        got = cg.measure_coherence(loss, variables["params"], (x, y), batch_size=16, estimator="batch", mesh=mesh)
        np.testing.assert_allclose(got.alpha, c * alpha / (1 - alpha * (1 - c)), rtol=1e-4)
