"""Where gradients pass: exactly as in jax.grad, and nowhere else is anything paid for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import cg_jax as cg

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
W = np.full(4, 0.4, np.float32)


@jax.custom_jvp
def _link(w, y):
    """y, whose tangent is zero unless w is differentiated."""
    return y


def _link_rule(primals, tangents):
    return primals[1], jnp.zeros(4) if type(tangents[0]) is SymbolicZero else tangents[1]


_link.defjvp(_link_rule, symbolic_zeros=True)


@jax.custom_vjp
def _weighed(a, b):
    """a b, whose derivative by one is doubled where the other is differentiated."""
    return a * b


def _weighed_forward(a, b):
    factors = (2.0 if b.perturbed else 1.0, 2.0 if a.perturbed else 1.0)
    return a.value * b.value, (a.value, b.value, jnp.array(factors))


_weighed.defvjp(
    _weighed_forward, lambda kept, g: (g * kept[1] * kept[2][0], g * kept[0] * kept[2][1]), symbolic_zeros=True
)


@jax.custom_vjp
def _clipped(w):
    return w


_clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -1, 1),))


def _half(h):
    return lax.while_loop(lambda h: abs(h).sum() > 0.1, lambda h: 0.5 * h, h)


LOSSES = {
    "a parameter and a value made of it": lambda w, x: (_link(w, jnp.tanh(w * x)) ** 2).sum(),
    "an example, not differentiated": lambda w, x: (_link(x, jnp.tanh(w * x)) ** 2).sum() + w.sum(),
    "a step function": lambda w, x: (_link(jnp.sign(w * x), jnp.tanh(w * x)) ** 2).sum() + (w * x).sum(),
    "stopped": lambda w, x: (_link(lax.stop_gradient(w), jnp.tanh(w * x)) ** 2).sum() + (w * x).sum(),
    "in a scan": lambda w, x: lax.scan(lambda h, _: (_link(w, jnp.tanh(w * h)), None), x, None, length=3)[0].sum(),
    "in a checkpoint": lambda w, x: jax.checkpoint(lambda x: _link(w, jnp.tanh(w * x)).sum())(x),
    "in a branch": lambda w, x: lax.cond(x[0] > 0, lambda: _link(w, jnp.tanh(w * x)).sum(), lambda: (w * x).sum()),
    "custom_vjp that asks": lambda w, x: (_weighed(w, jnp.tanh(w * x)) + _weighed(w, x) + _weighed(x, w)).sum(),
    "a loop without a reverse mode": lambda w, x: (_half(x * lax.stop_gradient(w)) * w).sum(),
    "a penalty beside a custom_vjp": lambda w, x: jnp.tanh(x * _clipped(w)).sum() + 1e-4 * (w**2).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_jax_grad(name):
    got = cg.grad_moments(LOSSES[name])(W, X)
    grads = np.stack([jax.grad(LOSSES[name])(W, x) for x in X])
    np.testing.assert_allclose(got.sum_grads, grads.sum(0), rtol=1e-5)
    np.testing.assert_allclose(got.sum_sq_norms, (grads**2).sum(), rtol=1e-5)


def test_the_link_of_a_parameter_and_a_value_made_of_it():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    got = cg.grad_moments(LOSSES["a parameter and a value made of it"])(W, x).sum_sq_norms
    np.testing.assert_allclose(got, 9.2858, rtol=1e-4)


def test_a_stopped_target_is_no_use():
    def network(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])

    def loss_fn(p, x):
        return ((network(p, x) - lax.stop_gradient(network(p, 2 * x)) * lax.stop_gradient(p["c"])) ** 2).sum()

    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 3)), "c": jnp.ones(3)}
    rows = {row.path: (row.rule, len(row.uses)) for row in cg.explain(loss_fn, params, X[0])}
    assert rows == {"a": ("closed", 1), "b": ("closed", 1), "c": ("none", 0)}


def test_a_gradient_that_is_zero_everywhere_is_zero():
    moments = cg.grad_moments(lambda w, x: jnp.sign((w * x).sum()))(W, X)
    assert not np.any(moments.sum_grads)
    assert moments.sum_sq_norms == 0


EYE = np.eye(32, dtype=np.float32)[0]


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_penalty_near_its_optimum(apart):
    def ridge(w, x):
        return 0.5 * (w @ x - 10) ** 2 + 0.05 * (w @ w)

    w = jnp.asarray(10 / 1.1 * EYE + apart / 32**0.5, jnp.float32)
    result = cg.measure_coherence(ridge, w, np.stack([EYE] * 8), batch_size=8)
    np.testing.assert_allclose(result.alpha, 1, rtol=1e-5)  # eight equal examples


@pytest.mark.parametrize("width", [1, 4])
def test_a_penalty_that_cancels_the_rest_of_one_example(width):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(5, 32)), rng.normal(size=(32, width)) / 10

    def loss_fn(p, x):
        return 0.5 * ((x @ p["w"]) ** 2).sum() + (p["w"] * jax.lax.stop_gradient(p["at"])).sum()

    # The gradient of the first example all but vanishes.
    at = -np.outer(x[0], x[0] @ w) + 1e-4 * rng.normal(size=w.shape)
    params = jax.tree.map(np.float32, {"w": w, "at": at})
    x = np.float32(x)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (params, x))
        want = cg.per_example_sq_norms(lambda p, x: loss_fn(p, x), method="vmap")(*wide)["w"]
        want = np.asarray(want)
    got, plain = (np.asarray(cg.per_example_sq_norms(loss_fn, method=m)(params, x)["w"]) for m in ("ghost", "vmap"))
    assert want[0] < 1e-4 * want[1]
    np.testing.assert_allclose(got, want, rtol=1e-4 + 2 * np.abs(plain / want - 1).max())


def test_penalties_that_cancel_among_themselves():
    rng = np.random.default_rng(0)
    at = np.float32(rng.normal(size=4))
    w, x = at + np.float32(1e-4) * np.float32(rng.normal(size=4)), np.float32(rng.normal(size=(8, 4)))

    def loss_fn(w, x):  # 10 ‖w − w₀‖², written out
        return (1e-3 * jnp.tanh(x @ w) + 10 * (w @ w)) - 20 * (w @ at)

    with jax.enable_x64(True):
        want = float(cg.grad_moments(lambda w, x: loss_fn(w, x), method="vmap")(*map(np.float64, (w, x))).sum_sq_norms)
    got, plain = (float(cg.grad_moments(loss_fn, method=m)(w, x).sum_sq_norms) for m in ("ghost", "vmap"))
    assert abs(got - want) <= 10 * max(abs(plain - want), 1e-5 * want)  # vmap's own rounding
