"""Robust averages of single gradients: every weighting on every model, against materialised float64 gradients."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_weights as weights
import pytest
from helpers import close_to_scale, compilations, mlp_loss, mlp_params, trees_close

import cg_jax as cg

MASK = np.arange(cases.B) != 1
SHARE = 0.6
# Weighting → the oracle's function of (losses, gradients [B, P]).
WEIGHTINGS = {
    "clip_quantile": (cg.clip_quantile(0.4), functools.partial(weights.clip_quantile, q=0.4)),
    "normalize": (cg.normalize(), weights.normalize),
    "agreement": (cg.agreement(SHARE), functools.partial(weights.agreement, share=SHARE)),
    "geometric_median": (cg.geometric_median(3), functools.partial(weights.geometric_median, iterations=3)),
    "trim_loss": (cg.trim_loss(SHARE), functools.partial(weights.trim_loss, share=SHARE)),
    "compose": (
        cg.compose(cg.clip_quantile(0.25), cg.agreement(0.7)),
        lambda losses, g: weights.compose(
            losses,
            g,
            functools.partial(weights.clip_quantile, q=0.25),
            functools.partial(weights.agreement, share=0.7),
        ),
    ),
}


def _numbers(name):
    case = cases.CASES[name]
    return case._replace(**dict(zip(("params", "batch"), case.cast(jnp.float32), strict=True))).cast(jnp.float64)


def _close(got, grads, w, tolerance=1e-9):
    """Assert that the leaves of `got` are Σ wᵢ gᵢ, relative to Σ |wᵢ gᵢ|. w is [B], or a list of [B] by tensor."""
    by_tensor = w if isinstance(w, list) else [w] * len(grads)
    for a, g, own in zip(jax.tree.leaves(got), grads, by_tensor, strict=True):
        terms = np.einsum("b...,b->b...", g, own)
        close_to_scale([a], [terms.sum(0)], tolerance, [np.abs(terms).sum(0).max(initial=0)])


def _all_weightings(loss_fn, bound, method="ghost"):
    whole = {name: weighting for name, (weighting, _) in WEIGHTINGS.items()}
    whole["clip_norm"] = cg.clip_norm(bound)
    whole["per_tensor"] = cg.clip_norm(bound, per_tensor=True)
    functions = {name: cg.weighted_grads(loss_fn, each, method=method) for name, each in whole.items()}

    @jax.jit
    def measured(params, batch, mask):
        return {name: function(params, batch, mask) for name, function in functions.items()}

    return measured


def _wanted(losses, grads, bound):
    """Name → weights [B], or a list of those of each tensor, of all examples given."""
    flat = weights.flat(grads)
    out = {name: own(losses, flat) for name, (_, own) in WEIGHTINGS.items()}
    out["clip_norm"] = weights.clip_norm(losses, flat, bound)
    per_tensor = bound / len(grads) ** 0.5
    out["per_tensor"] = [weights.clip_norm(losses, weights.flat([g]), per_tensor) for g in grads]
    return out


def _up_to_ties(which, losses, g, want, got):
    """The weights of a choice `got` that the oracle makes too, where scores are equal but for rounding."""
    before = np.ones(len(g)) if which == "agreement" else weights.clip_quantile(losses, g, 0.25)
    scores = np.array(weights.agreement_scores(before[:, None] * g))
    tolerance = 1e-11 * np.abs(scores).max() + 1e-300
    np.testing.assert_allclose(np.sort(scores[got > 0]), np.sort(scores[want > 0]), rtol=0, atol=tolerance)
    return np.where(got > 0, before, 0) / before[got > 0].sum()


# The others run in `make test-all`.
SOME = ("mlp", "cnn", "tied embedding", "custom_vjp", "loss that ignores the example")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in cases.CASES]
)
def test_every_weighting_of_every_model_is_that_of_the_oracle(name):
    with jax.enable_x64(True):
        loss_fn, (params, batch) = cases.CASES[name].loss_fn, _numbers(name)
        whole = oracle.per_example(loss_fn, params, batch)
        bound = float(np.median([weights.norm(g) for g in weights.flat(whole[1])])) * 0.9
        measured = _all_weightings(loss_fn, bound)
        for mask in (np.ones(cases.B, bool), MASK):
            losses, grads = whole[0][mask], [g[mask] for g in whole[1]]
            got = measured(params, batch, jnp.asarray(mask))
            for which, w in _wanted(losses, grads, bound).items():
                sums, info = got[which]
                if which in ("agreement", "compose"):
                    w = _up_to_ties(which, losses, weights.flat(grads), w, np.asarray(info.weights)[mask])
                _close(sums, grads, w)
                close_to_scale([info.losses[mask]], [losses], 1e-11)
                close_to_scale([info.sq_norms[mask]], [np.square(weights.flat(grads)).sum(1)], 1e-9)
                assert int(info.moments.count) == mask.sum()
                _close(info.moments.sum_grads, grads, np.ones(mask.sum()))


@pytest.mark.parametrize("name", ["mlp", "tied embedding"])
def test_method_vmap_and_no_mask_give_the_same(name):
    with jax.enable_x64(True):
        loss_fn, (params, batch) = cases.CASES[name].loss_fn, _numbers(name)
        want = _all_weightings(loss_fn, 0.5, "vmap")(params, batch, jnp.ones(cases.B, bool))
        got = _all_weightings(loss_fn, 0.5, "ghost")(params, batch, None)
        trees_close(got, want, rtol=1e-8, atol=1e-9)


def _rows(size=12, inputs=6, seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(size, inputs)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 3, size), jnp.int32)


PARAMS = mlp_params(6, 8, 3)


def test_a_tree_of_bounds_clips_each_tensor_by_its_own():
    batch = _rows()
    bounds = {"w1": 0.1, "b1": 0.05, "w2": 0.2, "b2": float("inf")}
    grads, info = cg.weighted_grads(mlp_loss, cg.clip_norm(bounds))(PARAMS, batch)
    rows = cg.per_example_grads(mlp_loss)(PARAMS, batch)
    for name, bound in bounds.items():
        g = np.asarray(rows[name], np.float64)
        w = weights.clip_norm(None, weights.flat([g]), bound)
        np.testing.assert_allclose(info.weights[name], w, rtol=1e-5)
        np.testing.assert_allclose(grads[name], np.einsum("b...,b->...", g, w), rtol=1e-4, atol=1e-7)


def test_weights_of_your_own_see_losses_norms_and_alignments():
    batch = _rows()
    rows = cg.per_example_grads(mlp_loss)(PARAMS, batch)
    flat = weights.flat([np.asarray(g, np.float64) for g in jax.tree.leaves(rows)])

    def own(of):
        assert of.tensor_sq_norms.keys() == PARAMS.keys()
        u = jnp.arange(12.0) - 3
        return of.alignments(u) * of.losses / of.sq_norms - of.alignments() * of.mask

    grads, info = cg.weighted_grads(mlp_loss, own)(PARAMS, batch)
    u = np.arange(12.0) - 3
    losses = np.asarray(info.losses, np.float64)
    want = flat @ (u @ flat) * losses / np.square(flat).sum(1) - flat @ flat.sum(0)
    np.testing.assert_allclose(info.weights, want, rtol=1e-4, atol=1e-5)
    got = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
    np.testing.assert_allclose(got, want @ flat, rtol=1e-3, atol=1e-3 * np.abs(want @ flat).max())


def test_weights_of_your_own_by_tensor():
    batch = _rows()
    only = cg.weighted_grads(mlp_loss, lambda of: jax.tree.map(lambda sq: sq * 0 + 1, of.tensor_sq_norms))
    trees_close(only(PARAMS, batch)[0], cg.grad_moments(mlp_loss)(PARAMS, batch).sum_grads)


def test_an_equal_weighting_does_not_compile_again():
    batch = _rows()
    jax.block_until_ready(cg.weighted_grads(mlp_loss, cg.agreement(0.25))(PARAMS, batch))
    with compilations("weighted_grads") as names:
        jax.block_until_ready(cg.weighted_grads(mlp_loss, cg.agreement(0.25))(PARAMS, batch))
    assert not names
    assert cg.agreement(0.25) == cg.agreement(0.25) != cg.agreement(0.5)
    assert cg.compose(cg.normalize(), cg.agreement(0.5)) == cg.compose(cg.normalize(), cg.agreement(0.5))
    assert cg.clip_norm({"a": 1.0}) == cg.clip_norm({"a": 1.0}) != cg.clip_norm({"a": 2.0})
    assert repr(cg.clip_norm(2, per_tensor=True)) == "cg_jax.clip_norm(max_norm=2.0, per_tensor=True)"


def test_a_bound_may_change_in_a_jitted_step():
    batch = _rows()

    @jax.jit
    def step(params, bound):
        return cg.weighted_grads(mlp_loss, cg.clip_norm(bound))(params, batch)[0]

    for bound in (0.1, 0.7):
        trees_close(step(PARAMS, bound), cg.weighted_grads(mlp_loss, cg.clip_norm(bound))(PARAMS, batch)[0])


def test_aux_state_dtype_and_integer_leaves():
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.asarray(2)}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.bfloat16)

    def loss_fn(p, x, state):
        return ((p["w"] * x).sum() * state) ** 2, x * p["n"]

    f = cg.weighted_grads(loss_fn, cg.clip_norm(1.0), has_aux=True)
    (grads, info), aux = f(params, batch, None, jnp.asarray(2.0))
    assert grads["w"].dtype == jnp.bfloat16
    assert grads["n"] is None
    assert info.sq_norms.dtype == info.weights.dtype == jnp.float32
    assert aux.shape == (4, 3)
    wide = cg.weighted_grads(loss_fn, cg.clip_norm(1.0), has_aux=True, dtype=jnp.float32)
    (grads32, _), masked = wide(params, batch, jnp.array([True, False, True, True]), jnp.asarray(2.0))
    assert grads32["w"].dtype == jnp.float32
    assert not masked[1].any()


def test_results_that_a_step_does_not_use_are_not_computed():
    """Clipping without the moments takes no second weight gradient: as many products as a plain gradient."""
    x = jnp.ones((16, 32))
    w = {"a": jnp.ones((32, 64)), "b": jnp.ones((64, 8))}

    def loss_fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]).sum()

    def products(f):
        return jax.jit(f).lower(w, x).compile().as_text().count(" dot(")

    plain = products(jax.grad(lambda p, x: jax.vmap(loss_fn, (None, 0))(p, x).mean()))
    clipped = products(lambda p, x: cg.weighted_grads(loss_fn, cg.clip_norm(1.0))(p, x)[0])
    assert clipped == plain


def test_explicit_weights_of_the_moments():
    batch = _rows()
    w = np.linspace(-1, 2, 12)
    mask = jnp.arange(12) != 3
    rows = cg.per_example_grads(mlp_loss)(PARAMS, batch)
    losses = cg.weighted_grads(mlp_loss, cg.normalize())(PARAMS, batch)[1].losses
    for method in ("ghost", "vmap"):
        moments = cg.grad_moments(mlp_loss, method)(PARAMS, batch, mask, weights=w)
        used = w * np.asarray(mask)
        want = jax.tree.map(lambda g, used=used: np.einsum("b...,b->...", g, used), rows)
        trees_close(moments.sum_grads, want, rtol=1e-4, atol=1e-5)
        sq = jax.tree.map(lambda g, used=used: np.sum(np.square(np.einsum("b...,b->b...", g, used))), rows)
        trees_close(moments.sum_sq_norms, sq, rtol=1e-4)
        assert int(moments.count) == 11
        np.testing.assert_allclose(moments.sum_losses, used @ np.asarray(losses), rtol=1e-5)
    with pytest.raises(ValueError, match=r"Expected weights to be real numbers of shape \[12\], got weights of dtype"):
        cg.grad_moments(mlp_loss)(PARAMS, batch, weights=w[:3])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_narrow_parameters(name, dtype):
    """The average has the parameters' dtype and is as near to the oracle as narrow cotangents allow."""
    case = cases.CASES[name]
    params, batch = case.cast(dtype)
    grads, info = jax.jit(cg.weighted_grads(case.loss_fn, cg.geometric_median(2)))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    assert info.weights.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64) if oracle.is_float(x) else x, (params, batch))
        losses, rows = oracle.per_example(case.loss_fn, *wide)
    want = weights.geometric_median(losses, weights.flat(rows), 2)
    np.testing.assert_allclose(info.weights, want, atol=2e-2)
    for got, g in zip(jax.tree.leaves(grads), rows, strict=True):
        close_to_scale([np.asarray(got, np.float64)], [np.einsum("b...,b->...", g, want)], 3e-2)
