"""What a loss takes beside parameters and example, and what is not differentiated."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compilations, mesh_of, trees_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from takers import TAKERS, W, X, loss_fn, suited

import cg_jax as cg


def with_state(w, x, state):
    return jnp.tanh(w @ ((x - state["mean"]) / state["scale"])) ** 2


def _state(seed):
    rng = np.random.default_rng(seed)
    return {"mean": jnp.asarray(rng.normal(size=4), jnp.float32), "scale": 1.0 + seed}


def _closed_over(seed):
    return lambda w, x: with_state(w, x, _state(seed))


@pytest.mark.parametrize("name", TAKERS)
def test_state_is_the_third_argument_and_new_values_compile_nothing(name):
    take, f, closed = TAKERS[name], suited(with_state, name), suited(_closed_over(1), name)
    take(f, state=_state(0))
    state = _state(1)
    with compilations() as names:
        got = take(f, state=state)
    assert not names
    want = take(closed)
    if name == "explain":
        assert got[0].rule == want[0].rule
    else:
        trees_close(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_lies_on_the_mesh_as_it_did(kind):
    where = mesh_of(4, 2, kind=kind)
    state = _state(1)
    placed = state | {"mean": jax.device_put(state["mean"], NamedSharding(where, P("model")))}
    want = cg.measure_coherence(with_state, W, X, batch_size=8, state=state, confidence=True)
    for given in (state, placed):
        for estimator in ("exact", "signs"):
            got = cg.measure_coherence(with_state, W, X, batch_size=8, state=given, mesh=where, estimator=estimator)
            trees_close((got.loss, got.mean_grad_norm), (want.loss, want.mean_grad_norm))
        got = cg.measure_coherence(with_state, W, X, batch_size=8, state=given, mesh=where, confidence=True)
        trees_close((got.alpha, got.alpha_stderr), (want.alpha, want.alpha_stderr))


def test_a_state_of_each_device_makes_gradients_its_own():
    """With parameters and batch the same on all devices, a gradient would be summed over them."""

    def each(closed, w, x, scale):
        f, state = (lambda w, x, s: s * loss_fn(w, x)), scale[0]
        if closed:
            f, state = (lambda w, x: scale[0] * loss_fn(w, x)), None
        grads = [
            cg.grad_moments(f)(w, x, state=state).sum_grads,
            cg.grad_moments(f, method="vmap")(w, x, state=state).sum_grads,
            cg.per_example_grads(f)(w, x, state=state).sum(0),
        ]
        return [g[None] for g in grads]

    scales = jnp.arange(8.0)
    want = np.outer(scales, cg.grad_moments(loss_fn)(W, X).sum_grads)
    for closed in (False, True):
        f = functools.partial(each, closed)
        over = jax.shard_map(f, mesh=mesh_of(8), in_specs=(P(), P(), P("data")), out_specs=P("data"))
        for got in jax.jit(over)(W, X, scales):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_running_averages_of_batch_normalisation_are_state():
    model = nn.Sequential([nn.Dense(5), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(3)])
    labels = np.arange(8) % 3
    variables = model.init(jax.random.key(0), X)

    def loss(params, example, batch_stats):
        x, y = example
        logits = model.apply({"params": params, "batch_stats": batch_stats}, x[None])[0]
        return -jax.nn.log_softmax(logits)[y]

    for shift in (0.0, 0.5, 1.0):
        stats = jax.tree.map(lambda leaf, s=shift: leaf + s, variables["batch_stats"])
        with compilations() as names:
            got = cg.measure_coherence(loss, variables["params"], (X, labels), batch_size=8, state=stats)
        assert bool(names) == (shift == 0.0)
        closed = lambda p, e, s=stats: loss(p, e, s)  # noqa: E731
        grads = jax.vmap(jax.grad(closed), (None, 0))(variables["params"], (X, labels))
        flat = np.concatenate([np.reshape(g, (8, -1)) for g in jax.tree.leaves(grads)], 1).astype(np.float64)
        np.testing.assert_allclose(got.alpha, np.square(flat.sum(0)).sum() / np.square(flat).sum() / 8, rtol=1e-4)


def test_other_nnx_variables_are_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x)[None])[0]

    graphdef, params, others = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x, others):
        return jnp.tanh(nnx.merge(graphdef, params, others)(x)).sum()

    got = cg.measure_coherence(loss, params, X, batch_size=4, state=others)
    grads = jax.vmap(jax.grad(loss), (None, 0, None))(params, X, others)
    flat = np.concatenate([np.reshape(g, (8, -1)) for g in jax.tree.leaves(grads)], 1).astype(np.float64)
    np.testing.assert_allclose(got.alpha, np.square(flat.sum(0)).sum() / np.square(flat).sum() / 8, rtol=1e-4)
    assert len(got.per_tensor) == len(jax.tree.leaves(params))
