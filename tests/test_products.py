"""Rules for products, convolutions and look-ups, against float64 gradients."""

import cases_products as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cg_jax as cg
from cg_jax.ghost import norm, products
from cg_jax.ghost.rules import rule_for

TABLES = {"empty": cases.EMPTY, "conv": cases.CONVOLUTIONS, "lookup": cases.LOOKUPS, "placed": cases.PLACED}
RULES = {"conv": {"instantiate", "gram", "closed"}, "lookup": {"norm"}, "placed": {"elementwise"}}


@pytest.mark.parametrize("table", TABLES)
def test_norms_and_sums_are_those_of_per_example_gradients(table):
    with jax.enable_x64(True):
        loss_fn, params, batch = cases.together(TABLES[table])
        want = cg.per_example_grads(loss_fn)(params, batch)
        for max_bytes in (None, 1):
            got = cg.grad_moments(loss_fn, max_bytes=max_bytes)(params, batch)
            for name, g in want.items():
                scale = 1e-11 * (1 + np.abs(g).max(initial=0))
                np.testing.assert_allclose(got.sum_grads[name], g.sum(0), rtol=1e-9, atol=scale, err_msg=name)
                np.testing.assert_allclose(got.sum_sq_norms[name], np.square(g).sum(), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("table", RULES)
def test_tables_are_done_by_rules(table):
    loss_fn, params, batch = cases.together(TABLES[table])
    rows = cg.explain(loss_fn, params, jax.tree.map(lambda leaf: leaf[0], batch))
    assert {row.path: row.rule for row in rows if row.rule not in RULES[table]} == {}


def test_of_no_positions_the_norm_is_zero():
    norms = cg.per_example_sq_norms(lambda w, x: ((x @ w).sum(0) + 1).sum())
    assert norms(jnp.ones((5, 3)), np.zeros((2, 0, 5), np.float32)).tolist() == [0, 0]


def _equations(jaxpr):
    inner = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(leaf)]
    return len(jaxpr.eqns) + sum(_equations(getattr(each, "jaxpr", each)) for each in inner)


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize(
    ("few", "many"),
    [
        (cases.convolution((3, 3, 2, 4), (9, 9, 2)), cases.convolution((9, 9, 2, 4), (40, 40, 2))),
        (cases.convolution((2, 2, 2, 4), (8, 8, 2), (2, 2)), cases.convolution((16, 16, 2, 4), (64, 64, 2), (16, 16))),
        (cases.convolution((3, 1, 4), (40, 1)), cases.convolution((400, 1, 4), (900, 1))),
        (cases.convolution((2, 2, 2, 1, 4), (9, 9, 9, 1)), cases.convolution((3, 7, 7, 1, 4), (9, 20, 20, 1))),
    ],
)
def test_the_program_does_not_grow_with_the_window(few, many):
    def equations(use):
        jaxpr = jax.make_jaxpr(lambda w, x: cg.grad_moments(use.loss_fn)(w, x))(use.param, use.batch)
        return _equations(jaxpr.jaxpr)

    assert equations(many) == equations(few) < 150


def _equation(function, *avals):
    (eqn,) = [eqn for eqn in jax.make_jaxpr(function)(*avals).jaxpr.eqns if eqn.primitive.name in _LINEAR]
    return eqn


_LINEAR = ("dot_general", "conv_general_dilated", "gather", "dynamic_slice")


def _convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("chunk", "function", "image", "kernel"),
    [
        (1, _convolve, (1, 4, 4, 2), (2, 2, 2, 3)),
        (2, _convolve, (1, 4, 4, 20), (2, 2, 20, 70)),
        (3, jnp.dot, (7, 80), (80, 70)),
        (7, jnp.dot, (7, 80), (80, 70)),
    ],
)
def test_results_do_not_depend_on_the_chunk(chunk, function, image, kernel):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(5, *image)), rng.normal(size=kernel)
        eqn = _equation(function, x[0], w)
        rule = rule_for(eqn, 1)
        cotangent = rng.normal(size=(5, *eqn.outvars[0].aval.shape))
        want = np.stack([jax.vjp(lambda w, x=x: function(x, w), w)[1](c)[0] for x, c in zip(x, cotangent, strict=True)])
        assert products.is_faster_flipped(rule) == (function is jnp.dot)
        norms, total = products.instantiated(rule, x, cotangent, jnp.float64, chunk)
        np.testing.assert_allclose(norms, np.square(want).reshape(5, -1).sum(1), rtol=1e-10)
        np.testing.assert_allclose(total, want.sum(0), rtol=1e-10, atol=1e-12)
        gram = products.without_gradients(rule, "gram", x, cotangent, jnp.float64, chunk)
        np.testing.assert_allclose(gram, norms, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 100, 700])
def test_equal_rows_add_up_before_they_are_squared(count):
    rng = np.random.default_rng(count)
    ids, values = rng.integers(0, 50, count), rng.normal(size=(count, 3)).astype(np.float32)
    want = np.zeros((50, 3))
    np.add.at(want, ids, values)
    np.testing.assert_allclose(norm.sq_norm_of_rows(jnp.asarray(ids), values), np.square(want).sum(), rtol=1e-5)
    twice = norm.sq_norm_of_rows(jnp.tile(ids, 2), np.concatenate([values, -values]))
    assert float(twice) < 1e-9


def test_a_look_up_in_a_scan_adds_up_over_the_steps():
    eqn = _equation(lambda w, i: lax.dynamic_slice_in_dim(w, i, 1), jnp.ones((6, 2)), jnp.int32(0))
    assert norm.lift_norm(rule_for(eqn, 0), is_slice=False) is None
    rng = np.random.default_rng(0)
    places, cotangent = jnp.asarray(rng.integers(0, 6, (4, 3, 1))), rng.normal(size=(4, 3, 2))
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    eqn = _equation(lambda w, i: lax.gather(w, i, numbers, (1, 2)), jnp.ones((6, 2)), places[0])
    each = np.stack([np.asarray(jnp.zeros((6, 2)).at[i[:, 0]].add(c)) for i, c in zip(places, cotangent, strict=True)])
    rule = rule_for(eqn, 0)
    together = norm.lift_norm(rule, is_slice=False).sq_norm([places], jnp.asarray(cotangent))
    np.testing.assert_allclose(together, np.square(each.sum(0)).sum(), rtol=1e-5)
    apart = norm.lift_norm(rule, is_slice=True).sq_norm([places], jnp.asarray(cotangent))
    np.testing.assert_allclose(apart, np.square(each).sum(), rtol=1e-5)
