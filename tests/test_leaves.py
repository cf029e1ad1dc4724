"""What counts as parameters: those of Flax and Equinox models, without their state; numbers; what does not count."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import cg_jax as cg

W, X, Y = np.ones(4, np.float32), np.arange(32, dtype=np.float32).reshape(8, 4) / 32, np.arange(8, dtype=np.float32)


def loss_fn(w, example):
    x, y = example
    return 0.5 * (w @ x - y) ** 2


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.norm.mean[...] = jnp.full(3, 0.1)
        self.adapter = nnx.LoRA(3, 1, 1, rngs=rngs)
        self.scale = nnx.Variable(jnp.ones(()))  # of a kind that its owner may train

    def __call__(self, x):
        return self.scale[...] * self.adapter(self.norm(self.dense(x)))


def test_statistics_of_an_nnx_model_are_no_parameters():
    model = Net(nnx.Rngs(0))
    recipe = (
        r"split them off, graphdef, params, rest = nnx\.split\(model, nnx\.Param, \.\.\.\), and put both back inside"
    )
    for params in (nnx.split(model)[1], {"nested": nnx.split(model)[1]}, model):
        with pytest.raises(TypeError, match=rf"got params\S*mean\W* of BatchStat and 1 more; {recipe}"):
            cg.grad_moments(lambda p, x: 0.0)(params, X)
        with pytest.raises(TypeError, match=r"of BatchStat"):
            cg.measure_coherence(lambda p, x: 0.0, params, X, batch_size=4)
        with pytest.raises(TypeError, match=r"of BatchStat"):
            cg.explain(lambda p, x: 0.0, params, X[0])
    for other, kind in (
        (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "RngState"),
        (nnx.Optimizer(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1, 0.9), wrt=nnx.Param), "Opt"),
    ):
        with pytest.raises(TypeError, match=rf"got params\S+ of {kind}.*; {recipe}"):
            cg.grad_moments(lambda p, x: 0.0)(nnx.state(other), X)


@pytest.mark.parametrize("wanted", [nnx.Param, nnx.LoRAParam, (nnx.Param, lambda path, _: path == ("scale",))])
def test_what_an_nnx_model_trains_is_measured(wanted):
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Any(*wanted) if isinstance(wanted, tuple) else wanted, ...)
    loss = lambda p, x: nnx.merge(graph, p, rest)(x).sum() ** 2  # noqa: E731
    grads = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, X))
    norms = [np.square(g).sum() for g in grads]
    got = cg.grad_moments(loss)(params, X)
    np.testing.assert_allclose(jax.tree.leaves(got.sum_sq_norms), norms, rtol=1e-5)
    assert cg.coherence(got).per_tensor.keys() == {
        "/".join(map(str, (*path, "value"))) for path, _ in nnx.to_flat_state(params)
    }


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(1)(x))


@pytest.mark.parametrize("wrapped", [dict, FrozenDict])
def test_statistics_of_a_linen_model_are_no_parameters(wrapped):
    variables = wrapped(Linen().init(jax.random.key(0), X))
    with pytest.raises(
        TypeError, match=r"got a dict of variables with 'batch_stats'; take variables\['params'\], and put"
    ):
        cg.grad_moments(lambda p, x: Linen().apply(p, x).sum())(variables, X)
    fixed = {"batch_stats": variables["batch_stats"]}
    loss = lambda p, x: Linen().apply({"params": p, **fixed}, x).sum()  # noqa: E731
    assert len(cg.coherence(cg.grad_moments(loss)(variables["params"], X)).per_tensor) == 4
    loss = lambda p, x: Linen().apply({**p, **fixed}, x).sum()  # noqa: E731
    assert len(cg.coherence(cg.grad_moments(loss)({"params": variables["params"]}, X)).per_tensor) == 4


def test_a_model_or_a_train_state_in_the_place_of_params():
    with pytest.raises(
        TypeError, match=r"got params of Linen; take the parameters of a model: variables\['params'\], nnx"
    ):
        cg.grad_moments(loss_fn)(Linen(), X)
    with pytest.raises(
        TypeError, match=r"got params\.activation of custom_jvp; keep such leaves apart \(nnx\.split, equ"
    ):
        cg.grad_moments(loss_fn)(eqx.nn.MLP(4, 1, 3, 1, key=jax.random.key(0)), X)
    with pytest.raises(TypeError, match=r"got params of function; take the parameters of a model"):
        cg.grad_moments(loss_fn)(loss_fn, X)
    state = TrainState.create(apply_fn=print, params={"w": W}, tx=optax.adam(0.1))
    with pytest.raises(TypeError, match=r"^Expected params, got a TrainState; take its \.params\.$"):
        cg.grad_moments(loss_fn)(state, X)
    with pytest.raises(TypeError, match=r"got params\['w'\] of dtype <U1; encode strings"):
        cg.grad_moments(loss_fn)({"w": np.array(["a"])}, X)
    with pytest.raises(
        TypeError, match=r"got params of ShapeDtypeStruct; it has no values, and only explain takes shapes"
    ):
        cg.grad_moments(loss_fn)(jax.ShapeDtypeStruct((4,), np.float32), (X, Y))


def test_numbers_and_nothing_among_the_parameters():
    loss = lambda p, x: p["a"] * x.sum() * p["k"]  # noqa: E731
    got = cg.grad_moments(loss)({"a": 2.0, "none": None, "k": 3, "flag": np.bool_(True)}, X)
    assert float(got.sum_grads["a"]) == pytest.approx(3 * X.sum())
    assert list(cg.coherence(got).per_tensor) == ["a"]
    for nothing in (None, {}, 3):
        with pytest.raises(ValueError, match=r"Expected params to hold at least one floating-point array, got none"):
            cg.grad_moments(lambda p, x: x.sum())(nothing, X)
    for nothing in (None, (), {}):
        with pytest.raises(ValueError, match=r"Expected batch to hold at least one array, got"):
            cg.grad_moments(loss_fn)(W, nothing)
        with pytest.raises(ValueError, match=r"Expected data to hold at least one array, got"):
            cg.measure_coherence(loss_fn, W, nothing, batch_size=4)
