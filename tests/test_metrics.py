"""Coherence and its relatives: numbers by hand, and properties of any gradients."""

import collections
import dataclasses

import chex
import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cg_jax as cg

TOLERANCE = 1e-9
NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
GRADS = npst.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=NUMBERS)

properties = settings(deadline=None, max_examples=60)


def _moments(grads):
    """The moments of gradients [m, P], or of a tree of them, as one producer would make them."""
    tree = grads if isinstance(grads, dict) else np.asarray(grads)
    m = jax.tree.leaves(tree)[0].shape[0]
    return cg.GradMoments(
        jnp.asarray(m, jnp.int32),
        jnp.asarray(0.0),
        jax.tree.map(lambda g: jnp.asarray(g.sum(0)), tree),
        jax.tree.map(lambda g: jnp.asarray(np.square(g).sum()), tree),
    )


def _coherence(grads):
    return cg.coherence(_moments(grads))


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def test_numbers_by_hand():
    # Quadratic loss (w − x)²/2 at w = 0, x = 1, 4, 7: gᵢ = −x, ‖S‖² = 144, Q = 66.
    result = cg.coherence(cg.grad_moments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jnp.array([1.0, 4.0, 7.0])))
    wanted = {
        "alpha": 144 / (3 * 66),
        "m_coherence": 144 / 66,
        "alpha_unbiased": (144 / 66 - 1) / 2,
        "noise_scale": (3 * 66 - 144) / 144,
        "noise_scale_unbiased": (1 - 39 / 66) / (39 / 66),
        "diversity": 66 / 144,
        "mean_grad_norm": 4.0,
        "loss": 11.0,
        "count": 3,
        "num_skipped": 0,
    }
    for field, value in wanted.items():
        assert float(getattr(result, field)) == pytest.approx(value, rel=1e-6), field
    assert np.isnan(result.alpha_stderr)


def test_one_example_has_coherence_one_and_no_unbiased_estimate():
    for grads in ([[0.3, 0.7]], [[1e-3, 2.0]], [[1 / 3, 1 / 7]]):
        result = _coherence(grads)
        assert float(result.alpha) == pytest.approx(1) == float(result.m_coherence)
        assert np.isnan(result.alpha_unbiased)
        assert np.isnan(result.noise_scale_unbiased)


def test_all_zero_gradients_are_nan_and_raise_nothing():
    with jax.debug_nans(False):
        result = _coherence(np.zeros((4, 3)))
    assert np.isnan(result.alpha)
    assert np.isnan(result.m_coherence)
    assert float(result.mean_grad_norm) == 0


def test_no_examples_are_nan():
    result = cg.coherence(cg.GradMoments.zeros(jnp.zeros(3)))
    assert np.isnan(result.alpha)
    assert np.isnan(result.loss)
    assert int(result.count) == 0


def test_opposed_gradients_are_below_the_orthogonal_limit():
    result = _coherence([[1.0, 0.0], [-1.0, 0.5]])
    assert 0 < float(result.m_coherence) < 1
    assert float(result.alpha_unbiased) < 0


@properties
@given(GRADS)
def test_every_ratio_is_the_plain_definition(grads):
    if not np.square(grads.sum(0)).sum() > 1e-6 * np.square(grads).sum():
        return  # ratios of what cancels are rounding
    result = _coherence(grads)
    with np.errstate(all="ignore"):
        for field, value in oracle.ratios(grads).items():
            if field.endswith("unbiased") and (len(grads) == 1 or abs(value) > 1e6 or value == 0):
                continue
            np.testing.assert_allclose(getattr(result, field), value, rtol=1e-6, atol=1e-9, err_msg=field)


@properties
@given(GRADS)
def test_alpha_and_r_are_bounded(grads):
    result, m = _coherence(grads), len(grads)
    if grads.any():
        assert -TOLERANCE <= float(result.alpha) <= 1 + TOLERANCE
        assert -TOLERANCE <= float(result.m_coherence) <= m * (1 + TOLERANCE)
    else:
        assert np.isnan(result.alpha)


@properties
@given(GRADS, st.floats(1e-3, 1e3), st.booleans())
def test_scaling_every_gradient_changes_nothing(grads, scale, negative):
    scaled = _coherence(grads * (-scale if negative else scale))
    np.testing.assert_allclose(scaled.alpha, _coherence(grads).alpha, rtol=1e-9, atol=1e-12)


@properties
@given(GRADS, st.integers(2, 4))
def test_duplicates_keep_alpha_and_multiply_r(grads, times):
    one, many = _coherence(grads), _coherence(np.tile(grads, (times, 1)))
    np.testing.assert_allclose(many.alpha, one.alpha, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(many.m_coherence, times * np.asarray(one.m_coherence), rtol=1e-9, atol=1e-12)


@properties
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6), st.integers(1, 5))
def test_orthogonal_gradients_of_one_length_are_at_the_limit(lengths, copies):
    # Families of equal gradients, the families orthogonal: r is the size of a family.
    families = np.repeat(np.eye(len(lengths)) * lengths[0], copies, axis=0)
    result = _coherence(families)
    assert float(result.m_coherence) == pytest.approx(copies)
    assert float(result.alpha) == pytest.approx(1 / len(lengths))
    # Orthogonal gradients of any lengths have r = 1.
    assert float(_coherence(np.diag(lengths)).m_coherence) == pytest.approx(1)


@properties
@given(GRADS, st.integers(1, 4))
def test_zero_gradients_dilute_alpha_and_leave_r(grads, number):
    if not grads.any():
        return
    one, diluted = _coherence(grads), _coherence(np.concatenate([grads, np.zeros((number, grads.shape[1]))]))
    m = len(grads)
    np.testing.assert_allclose(diluted.m_coherence, one.m_coherence, rtol=1e-9)
    np.testing.assert_allclose(diluted.alpha, np.asarray(one.alpha) * m / (m + number), rtol=1e-9)


@properties
@given(GRADS, st.data())
def test_alpha_is_the_mean_of_the_tensors_weighted_by_their_shares(grads, data):
    cut = data.draw(st.integers(0, grads.shape[1]))
    if not grads[:, :cut].any() or not grads[:, cut:].any():
        return  # a tensor whose gradients are all zero has no α
    result = _coherence({"a": grads[:, :cut], "b": {"c": grads[:, cut:]}})
    assert set(result.per_tensor) == {"a", "b/c"}
    shares = np.array([tensor.share for tensor in result.per_tensor.values()])
    alphas = np.array([tensor.alpha for tensor in result.per_tensor.values()])
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(shares @ alphas, result.alpha, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.alpha, _coherence(grads).alpha, rtol=1e-9, atol=1e-12)


@properties
@given(GRADS)
def test_noise_scale_is_the_trace_of_the_covariance_over_the_squared_mean(grads):
    mean = grads.mean(0)
    if not np.square(mean).sum() > 1e-6 * np.square(grads).sum():
        return
    trace = np.square(grads - mean).sum() / len(grads)
    np.testing.assert_allclose(_coherence(grads).noise_scale, trace / np.square(mean).sum(), rtol=1e-6, atol=1e-9)


def test_the_unbiased_estimate_is_unbiased():
    # Over many samples of m from a population: E[‖S‖²] and E[Q] give (E[‖S‖²]/E[Q] − 1)/(m − 1) = ‖E g‖²/E‖g‖².
    rng = np.random.default_rng(0)
    population = rng.normal(size=(50, 4)) + 0.5
    truth = np.square(population.mean(0)).sum() / np.square(population).sum(1).mean()
    samples = population[rng.integers(0, 50, (20_000, 8))]
    sums, squares = np.square(samples.sum(1)).sum(1), np.square(samples).sum((1, 2))
    moments = cg.GradMoments(jnp.asarray(8), jnp.asarray(0.0), jnp.sqrt(sums.mean()), jnp.asarray(squares.mean()))
    assert float(cg.coherence(moments).alpha_unbiased) == pytest.approx(truth, rel=0.02)
    assert float(cg.coherence(moments).alpha) > 1.1 * truth


@properties
@given(GRADS, GRADS, GRADS)
def test_merge_is_associative_commutative_and_zeros_are_neutral(a, b, c):
    width = min(g.shape[1] for g in (a, b, c))
    parts = [g[:, :width] for g in (a, b, c)]
    x, y, z = (_moments({"w": g}) for g in parts)
    left, right = cg.merge(cg.merge(x, y), z), cg.merge(x, cg.merge(z, y))
    whole = _moments({"w": np.concatenate(parts)})
    neutral = cg.merge(cg.GradMoments.zeros({"w": jnp.zeros(width)}), whole)
    for one in (left, right, neutral):
        chex.assert_trees_all_close(one, whole, rtol=1e-12, atol=1e-8)


def test_merge_refuses_moments_of_other_parameters():
    with pytest.raises(ValueError, match=r"Expected moments of the same parameters, got structures .*'a'.* and .*'b'"):
        cg.merge(_moments({"a": np.ones((2, 2))}), _moments({"b": np.ones((2, 2))}))


def test_records_are_frozen_pytrees_that_survive_jit():
    moments = _moments({"w": np.ones((2, 3))})
    result = jax.jit(cg.coherence)(moments)
    assert isinstance(result, cg.Coherence)
    with pytest.raises(AttributeError):
        result.alpha = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert float(jax.tree.map(lambda x: 2 * x, result).alpha) == 2 * float(result.alpha)
    assert "α=1" in str(result)


@pytest.mark.slow
def test_the_program_grows_in_proportion_to_the_tensors():
    """As scalars of their own the ratios of each held the sums of all: a deep network took minutes to compile."""

    def instructions(tensors):
        moments = cg.GradMoments.zeros({str(i): jnp.zeros(3) for i in range(tensors)})
        return jax.jit(cg.coherence).lower(moments).compile().as_text().count(" = ")

    assert instructions(120) < 5 * instructions(30)


def test_the_record_keeps_the_order_of_the_parameters():
    tree = collections.OrderedDict({"b": jnp.ones((2, 2)), "a": jnp.ones((2, 3)), "n": None})
    sums, squares = jax.tree.map(lambda g: g.sum(0), tree), jax.tree.map(lambda g: (g**2).sum(), tree)
    moments = cg.GradMoments(jnp.asarray(2), jnp.asarray(0.0), sums, squares)
    for call in (cg.coherence, jax.jit(cg.coherence)):
        assert list(call(moments).per_tensor) == ["b", "a"]


def test_a_standard_error_that_was_not_asked_for_is_no_leaf():
    result = _coherence([[1.0, 2.0], [0.5, 1.0]])
    named = lambda result: {str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(result)}  # noqa: E731
    assert named(result) == {f".{field.name}" for field in dataclasses.fields(result)} - {".alpha_stderr"}
    again = jax.jit(lambda result: jax.tree.map(lambda leaf: 2 * leaf, result))(result)
    assert np.isnan(again.alpha_stderr)
    assert float(again.alpha) == 2 * float(result.alpha)
    given = dataclasses.replace(result, alpha_stderr=jnp.asarray(0.25))
    assert ".alpha_stderr" in named(given)
    assert float(jax.jit(lambda result: result)(given).alpha_stderr) == 0.25
    assert "± 0.25" in str(given)
    assert "±" not in str(result)
    many = jax.vmap(cg.coherence)(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), _moments(np.eye(2))))
    assert many.alpha.shape == (2,)
