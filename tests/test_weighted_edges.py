"""Robust averages at their edges, zero, equal, huge and non-finite gradients, one example, none; and properties."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle_weights as weights
import pytest
from helpers import trees_close

import cg_jax as cg

ALL = {
    "clip_norm": cg.clip_norm(2.0),
    "per_tensor": cg.clip_norm(2.0, per_tensor=True),
    "clip_quantile": cg.clip_quantile(0.5),
    "normalize": cg.normalize(),
    "agreement": cg.agreement(0.5),
    "geometric_median": cg.geometric_median(4),
    "trim_loss": cg.trim_loss(0.5),
    "compose": cg.compose(cg.clip_quantile(0.25), cg.agreement(0.7)),
}
AVERAGES = ("agreement", "geometric_median", "trim_loss", "compose")
each = pytest.mark.parametrize("name", ALL)


def linear(w, x):
    """A loss whose gradients are the examples themselves."""
    return w @ x


W = jnp.ones(4)


def _of(name, rows, mask=None, method="ghost", **options):
    return cg.weighted_grads(linear, ALL[name], method=method, **options)(W, jnp.asarray(rows, jnp.float32), mask)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@each
@pytest.mark.parametrize(
    "rows", [np.zeros((3, 4)), np.zeros((1, 4)), np.concatenate([np.zeros((2, 4)), _normal(1, 4)])]
)
def test_zero_gradients(name, rows):
    grads, info = _of(name, rows)
    assert np.isfinite(jax.tree.leaves(info.weights)).all()
    assert np.isfinite(grads).all()
    if not rows.any():
        assert not np.asarray(grads).any()


@each
def test_one_example(name):
    grads, _ = _of(name, [[0.3, 0.4, 0.0, 0.0]])
    np.testing.assert_allclose(grads, [0.3, 0.4, 0.0, 0.0], rtol=1e-6)


@each
def test_all_equal(name):
    row = np.array([0.1, -0.7, 0.3, 0.2])
    grads, info = _of(name, np.tile(row, (7, 1)))
    np.testing.assert_allclose(grads, row, rtol=1e-6)
    if name in AVERAGES:
        np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-6)


@each
def test_one_huge_gradient(name):
    rows = _normal(9, 4)
    rows[4] *= 1e10
    grads, info = _of(name, rows)
    assert np.isfinite(info.sq_norms).all()
    assert np.linalg.norm(grads) < (1e10 if name == "trim_loss" else 10)


@each
@pytest.mark.parametrize("method", ["ghost", "vmap"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_gradient_propagates_or_is_skipped(name, method, value):
    rows = _normal(6, 4)
    rows[2, 1] = value
    grads, info = _of(name, rows, method=method)
    assert not np.isfinite(grads).all()
    assert int(info.num_nonfinite) == 0
    grads, info = _of(name, rows, method=method, nonfinite="skip")
    want, without = _of(name, np.delete(rows, 2, 0), method=method)
    trees_close(grads, want)
    trees_close(jax.tree.map(lambda w: np.delete(w, 2), info.weights), without.weights)
    assert not any(w[2] for w in jax.tree.leaves(info.weights))
    assert int(info.num_nonfinite) == 1
    trees_close(info.moments, without.moments)


def test_a_non_finite_loss_is_skipped_too():
    grads, info = cg.weighted_grads(lambda w, x: w @ x + jnp.log(x[0]), cg.clip_norm(9.0), nonfinite="skip")(
        W, jnp.array([[1.0, 2.0, 0.0, 0.0], [-1.0, 5.0, 0.0, 0.0]])
    )
    np.testing.assert_allclose(grads, [1.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(info.weights, [1.0, 0.0])


@each
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_masked_rows_may_hold_anything_and_no_row_gives_zero(name, nonfinite):
    rows = _normal(6, 4)
    rows[3] = np.nan
    mask = np.arange(6) != 3
    grads, info = _of(name, rows, mask, nonfinite=nonfinite)
    want, without = _of(name, rows[mask])
    trees_close(grads, want)
    trees_close(info.moments, without.moments)
    assert int(info.num_nonfinite) == 0
    none, info = _of(name, rows, np.zeros(6, bool), nonfinite=nonfinite)
    assert not np.asarray(none).any()
    assert not any(w.any() for w in jax.tree.leaves(info.weights))
    if nonfinite == "skip":
        none, info = _of(name, np.full((3, 4), np.nan), nonfinite=nonfinite)
        assert not np.asarray(none).any()
        assert int(info.num_nonfinite) == 3


def _layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) * jnp.sqrt(x[0])


def test_a_row_whose_activations_are_not_finite_is_skipped():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=4)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    rows = np.abs(rng.normal(size=(5, 3))).astype(np.float32)
    want, _ = cg.weighted_grads(_layers, cg.geometric_median(2))(params, rows)
    worse = np.concatenate([[[-1.0, 1.0, 1.0]], rows, [[np.inf, 1.0, 1.0]]]).astype(np.float32)
    got, info = cg.weighted_grads(_layers, cg.geometric_median(2), nonfinite="skip")(params, worse)
    trees_close(got, want)
    assert int(info.num_nonfinite) == 2


@each
def test_permuted_and_repeated_examples(name):
    """The order does not matter, and every example twice gives the same average."""
    rows = _normal(10, 4)
    grads, info = _of(name, rows)
    order = np.random.default_rng(1).permutation(10)
    again, permuted = _of(name, rows[order])
    np.testing.assert_allclose(again, grads, rtol=2e-5, atol=1e-6)
    trees_close(permuted.weights, jax.tree.map(lambda w: w[order], info.weights))
    if name not in ("agreement", "compose", "clip_quantile"):  # the quantile and the sum of the others change
        twice, _ = _of(name, np.repeat(rows, 2, 0))
        np.testing.assert_allclose(twice, grads, rtol=2e-3 if name == "geometric_median" else 2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("clip_norm", "per_tensor")])
@hypothesis.given(exponent=st.integers(-30, 30))
@hypothesis.settings(max_examples=5, deadline=None)
def test_a_scale_of_the_loss_scales_the_result(name, exponent):
    rows = _normal(8, 4)
    grads, info = _of(name, rows)
    scaled, other = _of(name, rows * 2.0**exponent)
    np.testing.assert_allclose(np.asarray(scaled) / 2.0**exponent, grads, rtol=1e-5)
    if name not in ("clip_norm", "per_tensor"):
        trees_close(other.weights, info.weights)


def test_clipped_gradients_have_at_most_the_bound():
    rows = _normal(20, 4) * 10
    grads, info = cg.weighted_grads(linear, cg.clip_norm(3.0, normalize_by=1))(W, rows)
    clipped = np.asarray(info.weights)[:, None] * rows
    assert np.linalg.norm(clipped, axis=1).max() <= 3 * (1 + 1e-6)
    np.testing.assert_allclose(grads, clipped.sum(0), rtol=1e-5)
    mean = cg.weighted_grads(linear, cg.clip_norm(3.0))(W, rows)[0]
    np.testing.assert_allclose(mean, clipped.mean(0), rtol=1e-5)
    none = cg.weighted_grads(linear, cg.clip_norm(0.0))(W, rows)[0]
    assert not np.asarray(none).any()


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_the_quantile_is_that_of_jax(q, size):
    rows = _normal(size, 4)
    _, info = cg.weighted_grads(linear, cg.clip_quantile(q))(W, rows)
    norms = jnp.sqrt(info.sq_norms)
    want = jnp.minimum(1, jnp.quantile(norms, q) / norms) / size
    np.testing.assert_allclose(info.weights, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "size", "kept"), [(0.5, 7, 4), (0.55, 20, 11), (0.1, 3, 1), (1.0, 5, 5), (0.28, 25, 7)]
)
def test_shares_are_rounded_up_and_ties_go_by_order(share, size, kept):
    for weighting in (cg.trim_loss(share), cg.agreement(share)):
        _, info = cg.weighted_grads(linear, weighting)(W, np.ones((size, 4), np.float32))
        np.testing.assert_allclose(info.weights, np.where(np.arange(size) < kept, 1 / kept, 0), rtol=1e-6)


def _distances(z, rows):
    return np.linalg.norm(rows - z, axis=1).sum()


def test_the_geometric_median_is_optimal():
    """No small step from the result, and no other average, has a smaller sum of distances."""
    rows = _normal(30, 4).astype(np.float64)
    rows[:9] += 20
    got = np.asarray(cg.weighted_grads(linear, cg.geometric_median(25))(W, rows.astype(np.float32))[0], np.float64)
    least = _distances(got, rows)
    # ε smooths the distances by a tenth of their median, so the result is optimal up to a percent of the sum.
    smooth = 0.01 * least
    for direction in np.concatenate([np.eye(4), -np.eye(4), _normal(20, 4)]):
        assert _distances(got + 0.3 * direction, rows) > least - smooth
    assert least < _distances(rows.mean(0), rows)
    with jax.enable_x64(True):
        exact = cg.weighted_grads(linear, cg.geometric_median(25))(jnp.ones(4), jnp.asarray(rows))[1].weights
    np.testing.assert_allclose(exact, weights.geometric_median(None, rows, 25), rtol=1e-6)


@pytest.mark.parametrize("iterations", [0, 1, 4, 20])
def test_the_geometric_median_does_not_break_with_45_percent_moved(iterations):
    rows = _normal(100, 4)
    before = np.asarray(cg.weighted_grads(linear, cg.geometric_median(iterations))(W, rows)[0])
    moved = rows.copy()
    moved[:45] += 1e6
    after = np.asarray(cg.weighted_grads(linear, cg.geometric_median(iterations))(W, moved)[0])
    assert np.linalg.norm(after - before) < 3 * np.linalg.norm(rows, axis=1).max()
    assert np.linalg.norm(moved.mean(0)) > 1e5


def _rank_one(w, x):
    return x[0] @ w @ x[1]


@pytest.mark.parametrize("method", ["ghost", "vmap"])
@pytest.mark.parametrize("name", ["geometric_median", "trimmed", "clipped"])
def test_a_squared_norm_outside_the_range_moves_no_median(name, method):
    weighting = {
        "geometric_median": cg.geometric_median(2),
        "trimmed": cg.compose(cg.trim_loss(0.5), cg.geometric_median(2)),
        "clipped": cg.compose(cg.clip_quantile(0.5), cg.geometric_median(2)),
    }[name]
    x = (jnp.ones((4, 8)).at[0].set(1e10),) * 2
    grads, info = cg.weighted_grads(_rank_one, weighting, method=method)(jnp.zeros((8, 8)), x)
    assert info.weights[0] == 0
    np.testing.assert_allclose(grads, np.ones((8, 8)), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-38, 1.5e-38, 2.1e-38, 4e-38, 1e-30, 1e30, 1.6e38, 3e38])
def test_norms_of_cotangents_at_the_limits_of_the_range(size):
    """The other factor brings the norm back into the range, or the square is out of it: zero or infinite, never NaN."""
    other = np.float32(1 / size if size < 1 else 1e-30)
    for scale in (other, np.float32(1)):
        x = (jnp.full((1, 4), scale), jnp.full((1, 3), size, jnp.float32))
        (got,) = cg.per_example_sq_norms(_rank_one)(jnp.ones((4, 3)), x)
        with np.errstate(over="ignore", under="ignore"):
            want = np.float32(12 * np.float64(scale) ** 2 * np.float64(np.float32(size)) ** 2)
        if want == 0 or want < 1e-37:
            assert 0 <= got < 1e-36
        elif size > 2e-38 or scale != other:  # numbers below are flushed to zero on some processors
            np.testing.assert_allclose(got, want, rtol=1e-4)
        assert not np.isnan(got)


def test_a_norm_that_is_not_a_number_is_no_quantile():
    from cg_jax.weighting.base import quantile
    from cg_jax.weighting.clipping import _clipped

    norms, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.ones(3, bool)
    assert np.isnan(quantile(norms, mask, 0.5))
    assert np.isnan(_clipped(norms, quantile(norms, mask, 0.5))).all()
    assert np.isfinite(quantile(norms, jnp.array([True, False, True]), 0.5))


@pytest.mark.parametrize("shape", [(32, 5), (7, 4, 5)])
@pytest.mark.parametrize("weighting", [cg.agreement(0.5), cg.geometric_median(2)])
def test_stacked_layers_in_bfloat16(shape, weighting):
    def loss_fn(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)

    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=each), jnp.bfloat16) for each in ((3, 5, 5), (8, *shape[1:])))
    x = jnp.concatenate([x] * 4)
    got, info = cg.weighted_grads(loss_fn, weighting)(w, x)
    want, reference = cg.weighted_grads(loss_fn, weighting, method="vmap")(w, x)
    np.testing.assert_allclose(info.sq_norms, reference.sq_norms, rtol=5e-2)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert got.dtype == want.dtype == jnp.bfloat16


def test_aux_of_a_skipped_row_is_zero():
    def loss_fn(w, x):
        return w @ x, jnp.log(x[0])

    rows = jnp.array([[1.0, 2.0, 3.0, 4.0], [jnp.nan, 0.0, 0.0, 0.0]])
    (_, info), aux = cg.weighted_grads(loss_fn, cg.clip_norm(1.0), nonfinite="skip", has_aux=True)(W, rows)
    assert int(info.num_nonfinite) == 1
    np.testing.assert_allclose(aux, [0.0, 0.0])


def test_a_traced_bound_leaves_no_program_behind():
    from cg_jax._compiled import programs_of

    def loss_fn(w, x):
        return w @ x

    def step(w, bound):
        return cg.weighted_grads(loss_fn, cg.compose(cg.clip_norm(bound), cg.normalize()))(w, jnp.ones((3, 4)))[0]

    with jax.checking_leaks():
        jax.jit(step)(W, 1.0)
    jax.jit(step)(W.astype(jnp.bfloat16), 1.0)
    assert not programs_of(loss_fn).compiled


def test_many_new_functions_warn():
    def call():
        return cg.weighted_grads(linear, lambda of: of.losses)(W, jnp.ones((3, 4)))

    for _ in range(7):
        call()
    with pytest.warns(UserWarning, match="got 8 of the same code, for each of which weighted_grads compiled anew"):
        call()


def test_wrong_arguments():
    batch = jnp.ones((3, 4))
    for make, message in {
        lambda: cg.clip_norm(-1.0): r"Expected max_norm >= 0, got max_norm=-1\.0",
        lambda: cg.clip_norm(1.0, normalize_by=0): r"Expected normalize_by > 0",
        lambda: cg.clip_norm({"a": 1.0}, per_tensor=True): r"Expected per_tensor=False with a pytree of bounds",
        lambda: cg.clip_quantile(1.5): r"Expected 0 <= q <= 1, got q=1\.5",
        lambda: cg.agreement(0): r"Expected 0 < share <= 1, got share=0\.0",
        lambda: cg.trim_loss(1.1): r"Expected 0 < share <= 1, got share=1\.1",
        lambda: cg.geometric_median(-1): r"Expected iterations >= 0, got iterations=-1",
        lambda: cg.compose(): r"Expected at least one weighting",
        lambda: cg.weighted_grads(linear, cg.normalize(), method="fast"): r"Expected method in \['ghost', 'vmap'\]",
        lambda: cg.weighted_grads(linear, cg.normalize(), nonfinite="raise"): r"Expected nonfinite in",
        lambda: cg.weighted_grads(linear, cg.normalize(), max_bytes=0): r"Expected max_bytes >= 1",
        lambda: cg.weighted_grads(linear, lambda of: jnp.ones(2))(W, batch): r"Expected weights of shape \(3,\) from",
        lambda: cg.weighted_grads(linear, lambda of: {"a": of.losses})(W, batch): r"or a pytree like params",
        lambda: cg.weighted_grads(linear, cg.clip_norm({"a": 1.0}))(
            W, batch
        ): r"max_norm to have the structure of params",
        lambda: cg.weighted_grads(linear, cg.normalize(), axis_name="data")(W, batch): r"Expected a shard_map, pmap or",
        lambda: cg.weighted_grads(lambda p, x: p["a"] @ x, cg.compose(cg.clip_norm({"a": 1.0})))(
            {"a": W}, batch
        ): r"in compose, got",
        lambda: cg.weighted_grads(linear, cg.normalize())(W, batch, jnp.ones(3)): r"Expected mask to be boolean",
        lambda: cg.weighted_grads(linear, lambda of: None)(W, batch): r"got None; return the weights",
        lambda: cg.weighted_grads(linear, lambda of: of.losses * 1j)(W, batch): r"Expected real weights from",
        lambda: cg.weighted_grads(linear, lambda of: of.alignments(2.0))(W, batch): r"in alignments\(weights\), got",
        lambda: cg.weighted_grads(lambda p, x: p["a"] @ x + p["b"], cg.clip_norm({"a": 1.0, "b": None}))(
            {"a": W, "b": 1.0}, batch
        ): r"Expected a bound for every tensor",
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    for make, message in {
        lambda: cg.clip_norm("big"): r"Expected max_norm to be a number, got max_norm='big'",
        lambda: cg.compose(cg.normalize(), 3): r"Expected weightings to be a function, got int",
        lambda: cg.weighted_grads(linear, 0.5): r"Expected weighting to be a function, got float",
        lambda: cg.weighted_grads(linear, cg.agreement): r"as cg_jax\.agreement\(…\) makes it, got",
        lambda: cg.weighted_grads(linear, cg.median()): r"got the coordinate-wise rule cg_jax\.median\(\)",
        lambda: cg.weighted_grads(cg.normalize(), linear): r"loss_fn comes first",
        lambda: cg.coordinatewise_grads(linear, cg.normalize()): r"got the weighting cg_jax\.normalize\(\)",
        lambda: cg.weighted_grads(linear, cg.normalize(), dtype=int): r"Expected dtype to be a floating dtype",
    }.items():
        with pytest.raises(TypeError, match=message):
            make()
