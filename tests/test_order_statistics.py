"""Rules of many values against NumPy in float64, without a sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg
from cg_jax.order_statistics import order_statistics

COUNTS = [17, 100, 128, 161, 1000]


def _values(k):
    """Columns of many kinds: normal, of all sizes, ties, equal, both zeros, infinities."""
    rng = np.random.default_rng(k)
    kinds = [
        rng.normal(size=(k, 5)),
        rng.normal(size=(k, 5)) * 10.0 ** rng.integers(-6, 6, (k, 5)),
        rng.integers(-2, 3, (k, 5)),
        np.full((k, 1), -2.5),
        np.where(rng.random((k, 2)) < 0.5, 0.0, -0.0),
        np.where(rng.random((k, 2)) < 0.7, rng.normal(size=(k, 2)), rng.choice([-1, 1]) * np.inf),
    ]
    return np.concatenate(kinds, 1).astype(np.float32)


def _wanted(name, values, number):
    ordered = np.sort(np.asarray(values, np.float64), axis=0)
    k = len(ordered)
    if name == "trimmed":
        return ordered[number : k - number].mean(0)
    if name == "winsorized":
        return np.clip(ordered, ordered[number], ordered[k - 1 - number]).mean(0)
    return {"mean": np.mean, "median": np.median}[name](ordered, axis=0)


def _rule(name, number):
    if name in ("trimmed", "winsorized"):
        return {"trimmed": cg.trimmed_mean, "winsorized": cg.winsorized_mean}[name](number)
    return {"mean": cg.mean, "median": cg.median}[name]()


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("name", ["mean", "median", "trimmed", "winsorized"])
def test_rules_of_many_values_are_numpys(name, k):
    for values in (_values(k), _values(k)[:-1]):
        for number in (1, k // 4, (k - 2) // 2):
            got = np.asarray(_rule(name, number)(values))
            size = np.where(np.isfinite(values), np.abs(values), 0).max(0)
            assert got.dtype == np.float32
            with np.errstate(invalid="ignore"):
                want = _wanted(name, values, number)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
            np.testing.assert_array_equal(got[~np.isfinite(want)], want[~np.isfinite(want)])
            finite = np.isfinite(want)
            assert (np.abs(got[finite] - want[finite]) <= 1e-6 * size[finite]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("k", [17, 100, 161])
def test_order_statistics_are_exact_in_every_dtype(k, dtype):
    with jax.enable_x64(True):
        values = _values(k)
        values = jnp.asarray(np.where(np.isfinite(values), np.clip(values, -6e4, 6e4), values), dtype)
        wanted = [0, k // 3, k - 1]
        got = jax.jit(lambda values: order_statistics(values, wanted))(values)
        ordered = np.sort(np.asarray(values, np.float64), axis=0)
        for one, rank in zip(got, wanted, strict=True):
            assert one.dtype == dtype
            np.testing.assert_array_equal(np.asarray(one, np.float64), ordered[rank])


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("name", ["mean", "median", "trimmed", "winsorized"])
def test_a_nan_spoils_its_coordinate_alone(name, k):
    values = np.random.default_rng(k).normal(size=(k, 9)).astype(np.float32)
    values[0, 0] = values[k // 2, 1] = values[-1, 2] = np.nan
    values[1, 3] = -np.float32(np.nan)
    values[: k // 2, 4] = np.nan
    values[:, 5] = np.nan
    for number in (0, 2):
        got = np.isnan(np.asarray(_rule(name, number)(values)))
        np.testing.assert_array_equal(got, np.arange(9) < 6)


@pytest.mark.parametrize(
    ("k", "clip", "dtype"),
    [
        *((k, clip, jnp.float32) for k, clip in ((17, 7), (17, 8), (18, 8), (100, 1), (100, 4), (100, 5), (161, 1))),
        *((17, 0, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float64)),
    ],
)
def test_winsorized_means_are_those_of_a_sort_on_either_side_of_each_limit(k, clip, dtype):
    with jax.enable_x64(True):
        values = jnp.asarray(_values(k), dtype)
        signs = np.random.default_rng(k).choice([-1, 1], (k, 3))
        spoilt = jnp.where(jnp.arange(k)[:, None] == k // 2, jnp.nan, values)
        large = float(jnp.finfo(dtype).max) * jnp.asarray(signs, dtype)
        rule = jax.jit(lambda values: cg.winsorized_mean(clip)(jnp.concatenate([values, spoilt, large], 1)))
        got, of_nan, of_large = np.split(np.asarray(rule(values), np.float64), [values.shape[1], 2 * values.shape[1]])
        with np.errstate(invalid="ignore"):
            want = _wanted("winsorized", values, clip)
        finite, size = np.isfinite(want), np.abs(np.where(np.isfinite(values), values, 0).astype(np.float64)).max(0)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        assert (np.abs(got[finite] - want[finite]) <= 4 * float(jnp.finfo(dtype).eps) * size[finite]).all()
        assert np.isnan(of_nan).all()
        share = _wanted("winsorized", signs, clip)
        np.testing.assert_allclose(of_large / float(jnp.finfo(dtype).max), share, atol=0.01)


@pytest.mark.parametrize("k", [17, 100])
def test_the_trimmed_mean_of_equal_values_is_that_value(k):
    for value in (3.1, 3e38, np.inf, -np.inf):
        values = np.full((k, 2), value, np.float32)
        for rule in (cg.trimmed_mean(5), cg.median()):
            np.testing.assert_array_equal(rule(values), values[0])
        np.testing.assert_allclose(cg.winsorized_mean(5)(values), values[0], rtol=1e-6)


@pytest.mark.parametrize("k", [17, 100, 161])
def test_no_sort_is_compiled(k):
    for rule in (cg.mean(), cg.median(), cg.trimmed_mean(3), cg.winsorized_mean(3)):
        assert "sort" not in jax.jit(rule).lower(jnp.zeros((k, 5))).as_text()


@pytest.mark.parametrize("k", [20, 100, 170])
def test_rules_of_many_values_have_a_derivative(k):
    values = np.random.default_rng(k).normal(size=(k, 3)).astype(np.float32)
    for rule, number in ((cg.median(), None), (cg.trimmed_mean(4), 4), (cg.winsorized_mean(4), 4)):
        got = np.asarray(jax.grad(lambda values, rule=rule: rule(values).sum())(jnp.asarray(values)))
        order = np.argsort(values, axis=0)
        weights = np.zeros(k)
        if number is None:
            weights[k // 2 - 1 : k // 2 + 1] = 0.5
        if rule == cg.trimmed_mean(4):
            weights[4:-4] = 1 / (k - 8)
        if rule == cg.winsorized_mean(4):
            weights[4:-4] = 1 / k
            weights[[4, -5]] = 5 / k
        if k % 2 == 0 or number is not None:
            want = np.zeros_like(values)
            np.put_along_axis(want, order, weights[:, None], axis=0)
            np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("k", [17, 100])
def test_rules_of_many_values_work_under_transformations(k):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(k, 8, 3)), jnp.float32)
    mesh = mesh_of(4)
    for rule in (cg.median(), cg.trimmed_mean(3), cg.winsorized_mean(3)):
        plain = rule(values)
        assert plain.shape == (8, 3)
        mapped = jax.vmap(rule, 1)(values)
        there = jax.shard_map(rule, mesh=mesh, in_specs=P(None, "data"), out_specs=P("data"))
        placed = jax.device_put(values, NamedSharding(mesh, P(None, "data")))
        for got in (mapped, jax.jit(there)(values), jax.jit(rule)(placed)):
            np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-7)


def test_large_values_do_not_overflow():
    for k in (17, 100, 200):
        values = np.full((k, 2), np.finfo(np.float32).max) * np.array([1, -1], np.float32)
        for rule in (cg.mean(), cg.median(), cg.trimmed_mean(3), cg.winsorized_mean(3)):
            np.testing.assert_allclose(functools.partial(rule)(values), values[0], rtol=1e-6)
