"""The coordinate-wise rules against NumPy, and their properties."""

import functools
import operator
from fractions import Fraction

import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cg_jax as cg

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
COUNTS = [*range(1, 17), 17, 40]
RULES = {"mean": cg.mean(), "median": cg.median(), "trimmed": cg.trimmed_mean(1), "winsorized": cg.winsorized_mean(1)}
STACKS = npst.arrays(
    np.float64,
    st.tuples(st.integers(3, 18), st.integers(1, 4)),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x),
)
properties = settings(deadline=None, max_examples=50)


def _plain_median(values):
    """NumPy's median in the values' own dtype, of even k too: (a + b)/2 rounded there as NumPy does for floats."""
    ordered = np.sort(values, axis=0)
    k = len(ordered)
    if k % 2:
        return ordered[k // 2]
    return ((ordered[k // 2 - 1] + ordered[k // 2]) / values.dtype.type(2)).astype(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COUNTS)
def test_the_median_is_numpys_to_the_last_bit(k, dtype):
    rng = np.random.default_rng(k)
    distinct = rng.normal(size=(k, 400)) * 10.0 ** rng.integers(-6, 6, (k, 400))
    ties = rng.integers(-2, 3, (k, 400))
    values = np.concatenate([distinct, ties], 1).astype(DTYPES[dtype])
    with jax.enable_x64(True):
        got = np.asarray(cg.median()(values))
    assert got.dtype == values.dtype
    assert np.array_equal(got, _plain_median(values))
    if dtype != "bfloat16":  # NumPy's own, which knows the two other dtypes
        assert np.array_equal(got, np.median(values, axis=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_median_of_extremes_is_numpys(dtype):
    big, tiny = np.finfo(dtype).max, np.finfo(dtype).tiny
    values = np.array([[big, -big, tiny, np.inf], [big / 2, big, -tiny, 1], [-big, big / 4, 2 * tiny, -np.inf]], dtype)
    with jax.enable_x64(True):
        assert np.array_equal(cg.median()(values), np.median(values, axis=0))


def test_the_median_of_three_is_two_minima_and_two_maxima():
    equations = str(jax.make_jaxpr(cg.median())(jnp.zeros((3, 5))))
    assert equations.count(" min ") == equations.count(" max ") == 2
    for name in ("sort", "jit", "select", "while"):
        assert name not in equations


@pytest.mark.parametrize("k", range(1, 17))
def test_few_values_take_no_sort(k):
    for rule in RULES.values():
        if rule in (RULES["trimmed"], RULES["winsorized"]) and k < 3:
            continue
        assert "sort" not in str(jax.make_jaxpr(rule)(jnp.zeros((k, 5))))


def test_a_mean_of_few_values_is_unrolled():
    assert "reduce_sum" not in str(jax.make_jaxpr(cg.mean())(jnp.zeros((3, 5))))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [3, 4, 16, 17])
def test_a_nan_among_the_values_makes_nan_of_its_coordinate_alone(k, name):
    values = np.random.default_rng(k).normal(size=(k, k + 1)).astype(np.float32)
    values[np.arange(k), np.arange(k)] = np.nan
    got = np.asarray(RULES[name](values))
    assert np.array_equal(np.isnan(got), np.isnan(np.asarray(jnp.median(values, axis=0))))
    assert np.isfinite(got[k])


def _plain(name, values):
    ordered = np.sort(values, axis=0)
    if name == "trimmed":
        return ordered[1:-1].mean(0)
    if name == "winsorized":
        return np.clip(values, ordered[1], ordered[-2]).mean(0)
    return {"mean": np.mean, "median": np.median}[name](values, axis=0)


@pytest.mark.parametrize("name", RULES)
@properties
@given(STACKS)
def test_rules_are_their_plain_definitions(name, values):
    with jax.enable_x64(True):
        got = RULES[name](values)
    np.testing.assert_allclose(got, _plain(name, values), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("trim", [0, 2, 3])
@pytest.mark.parametrize("k", [7, 8, 20])
def test_more_may_be_trimmed_or_clipped(k, trim):
    values = np.random.default_rng(k).normal(size=(k, 30))
    ordered = np.sort(values, axis=0)
    with jax.enable_x64(True):
        trimmed, winsorized = cg.trimmed_mean(trim)(values), cg.winsorized_mean(trim)(values)
    np.testing.assert_allclose(trimmed, ordered[trim : k - trim].mean(0), rtol=1e-12, atol=1e-14)
    clipped = np.clip(values, ordered[trim], ordered[k - trim - 1])
    np.testing.assert_allclose(winsorized, clipped.mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
@properties
@given(STACKS, st.randoms(use_true_random=False), st.floats(-100, 100), st.floats(0.01, 100), st.booleans())
def test_rules_commute_with_permutation_translation_and_scale(name, values, random, shift, scale, negative):
    scale = -scale if negative else scale
    order = list(range(len(values)))
    random.shuffle(order)
    with jax.enable_x64(True):
        rule = RULES[name]
        plain = np.asarray(rule(values))
        np.testing.assert_allclose(rule(values[order]), plain, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(rule(values + shift), plain + shift, rtol=1e-9, atol=1e-7)
        np.testing.assert_allclose(rule(values * scale), plain * scale, rtol=1e-9, atol=1e-9 * abs(scale))
        assert ((values.min(0) - 1e-9 <= plain) & (plain <= values.max(0) + 1e-9)).all()


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_dtype_and_any_shape(name):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for shape in ((), (2,), (2, 0), (1, 2, 3)):
            out = RULES[name](jnp.ones((5, *shape), dtype))
            assert out.dtype == dtype
            assert out.shape == shape


def test_narrow_means_are_summed_in_float32():
    values = jnp.asarray([256.0] + [1.0] * 7, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert float(cg.mean()(values)) == float(jnp.asarray(263 / 8, jnp.bfloat16))


def test_the_median_of_two_large_halves_is_themselves():
    np.testing.assert_array_equal(cg.median()(jnp.array([4e4, 4e4], jnp.float16)), np.float16(4e4))


def _exact(name, values):
    """The rule in rational numbers."""
    ordered = sorted(map(Fraction, np.asarray(values, np.float64).tolist()))
    k = len(ordered)
    if name == "median":
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2
    kept = {"mean": ordered, "trimmed": ordered[1:-1], "winsorized": [ordered[1], *ordered[1:-1], ordered[-2]]}[name]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_a_rule_of_finite_values_is_finite(dtype, name):
    dtype = DTYPES.get(dtype, np.float16)
    with jax.enable_x64(True):
        largest = jnp.finfo(dtype).max
        for k in (3, 4, 7, 16, 17, 21):
            rows = np.full(k, largest), np.full(k, -largest), np.where(np.arange(k) % 2, 1, 0.75 * float(largest))
            values = np.stack(rows, 1).astype(dtype)
            with jax.debug_infs(True):
                got = np.asarray(RULES[name](values))
            assert got.dtype == dtype
            want = [float(_exact(name, column)) for column in values.T]
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaling_changes_no_bit_where_nothing_overflows(dtype, k):
    tiny, rng = np.finfo(dtype).smallest_normal, np.random.default_rng(0)
    ends = [0, tiny, -tiny, np.finfo(dtype).max / 8]
    values = np.concatenate([rng.normal(size=(k, 300)), rng.choice(ends, (k, 300))], 1).astype(dtype)
    with jax.enable_x64(True):
        rows = [jnp.asarray(row) for row in values]
        plain = jax.jit(lambda rows: functools.reduce(operator.add, rows) / k)(rows)
        np.testing.assert_array_equal(jax.jit(cg.mean())(values), plain)
        half = jax.jit(lambda a, b: (a + b) / 2)(*rows[:2])
        np.testing.assert_array_equal(cg.median()(values[:2]), half)


@pytest.mark.parametrize("k", [4, 17])
@pytest.mark.parametrize("name", ["mean", "median", "winsorized"])
def test_infinities_stay_what_they_are(name, k):
    values = np.full((k, 3), 3e38, np.float32)
    values[: k // 2 + 1, 0], values[: k // 2 + 1, 1] = np.inf, -np.inf
    values[:2, 2], values[2:4, 2] = np.inf, -np.inf
    got = np.asarray(RULES[name](values))
    np.testing.assert_array_equal(got[:2], [np.inf, -np.inf])
    if name == "mean":
        assert np.isnan(got[2])


def test_rules_of_one_name_and_number_are_equal_and_say_their_name():
    assert cg.median() == cg.median() != cg.mean()
    assert cg.trimmed_mean(1) == cg.trimmed_mean(1) != cg.trimmed_mean(2)
    assert repr(cg.winsorized_mean(2)) == "cg_jax.winsorized_mean(2)"
    assert not hasattr(cg.median(), "init")
    assert not hasattr(cg.median(), "other")


@pytest.mark.parametrize("wrap", [optax.chain, cg.m3, lambda rule: optax.MultiSteps(rule, 2)])
def test_a_rule_is_no_transformation(wrap):
    with pytest.raises(TypeError, match=r"got the rule cg_jax\.median\(\); wrap it: cg_jax\.stacked\(cg_jax\.median"):
        wrap(cg.median())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cg.trimmed_mean(-1), r"Expected trim >= 0, got trim=-1"),
        (lambda: cg.winsorized_mean(0.2), r"Expected clip to be a whole number >= 0, got clip=0.2"),
        (lambda: cg.trimmed_mean(2)(jnp.ones(4)), r"Expected trim < k/2, got trim=2 and k=4"),
        (lambda: cg.winsorized_mean(1)(jnp.ones((2, 3))), r"Expected clip < k/2, got clip=1 and k=2"),
        (
            lambda: cg.median()(jnp.ones((0, 3))),
            r"Expected values of shape \[k, \*shape\] with k >= 1, got shape \[0, 3",
        ),
        (lambda: cg.mean()(1.0), r"Expected values of shape \[k, \*shape\] with k >= 1, got shape \[\]"),
        (lambda: cg.median()(jnp.ones((3, 2), int)), r"Expected values of a floating dtype, got dtype int32"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
