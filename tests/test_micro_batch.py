"""Mean gradients of groups: of single examples' losses, of a batch's loss, with auxiliary values."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import mesh_of, trees_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg

B, K = 12, 3
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(B, 4)).astype(np.float32), RNG.integers(0, 3, B)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(jnp.tanh(x))


def _groups(tree):
    return [jax.tree.map(lambda leaf, j=j: leaf[j * B // K : (j + 1) * B // K], tree) for j in range(K)]


def test_batch_norm_in_training_mode_normalises_over_a_group():
    model = _Net()
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), X)

    def loss_fn(params, batch):
        images, labels = batch
        logits, changed = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed["batch_stats"]

    made = cg.micro_batch_grads(loss_fn, K, batch_loss=True, has_aux=True)
    grads, statistics = jax.jit(made)(variables["params"], (X, Y))
    plain = jax.jit(jax.grad(loss_fn, has_aux=True))
    for j, group in enumerate(_groups((X, Y))):
        want, changed = plain(variables["params"], group)
        trees_close(jax.tree.map(lambda leaf, j=j: leaf[j], grads), want)
        trees_close(jax.tree.map(lambda leaf, j=j: leaf[j], statistics), changed)
    means = np.asarray(statistics["BatchNorm_0"]["mean"])
    assert (np.ptp(means, axis=0) > 0).all()  # each group has its own


def test_batch_norm_of_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.out = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.inner(x))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch):
        images, labels = batch
        model = nnx.merge(graph, params, rest, copy=True)  # BatchNorm writes into its own
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return loss, nnx.state(model, nnx.BatchStat)

    grads, statistics = jax.jit(cg.micro_batch_grads(loss_fn, K, batch_loss=True, has_aux=True))(params, (X, Y))
    plain = jax.jit(jax.grad(loss_fn, has_aux=True))
    for j, group in enumerate(_groups((X, Y))):
        want, changed = plain(params, group)
        trees_close(jax.tree.leaves(jax.tree.map(lambda leaf, j=j: leaf[j], grads)), jax.tree.leaves(want))
        trees_close(jax.tree.leaves(jax.tree.map(lambda leaf, j=j: leaf[j], statistics)), jax.tree.leaves(changed))


def _square(w, example):
    x, y = example
    return (x @ w["w"] - y) ** 2


def _pair(w, example):
    loss = _square(w, example)
    return loss, {"loss": loss, "half": example[0] / 2, "one": 1, "none": example[0][:0]}


W = {"w": jnp.asarray(RNG.normal(size=4), jnp.float32), "n": jnp.asarray(2)}


@pytest.mark.parametrize("jit", [False, True])
def test_auxiliary_values_of_examples_have_the_batchs_axis(jit):
    made = cg.micro_batch_grads(_pair, K, has_aux=True)
    grads, aux = (jax.jit(made) if jit else made)(W, (X, Y))
    trees_close(grads, cg.micro_batch_grads(_square, K)(W, (X, Y)))
    assert grads["n"] is None
    trees_close(aux, {"loss": (X @ np.asarray(W["w"]) - Y) ** 2, "half": X / 2, "one": np.ones(B), "none": X[:, :0]})


def test_the_loss_of_a_batch_and_that_of_its_examples_agree():
    def mean_loss(w, batch):
        return jax.vmap(_square, (None, 0))(w, batch).mean()

    want = cg.micro_batch_grads(_square, K)(W, (X, Y))
    trees_close(cg.micro_batch_grads(mean_loss, K, batch_loss=True)(W, (X, Y)), want)


@pytest.mark.parametrize("batch_loss", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_auxiliary_values_on_a_mesh(kind, batch_loss):
    mesh = mesh_of(3, 2, names=("x", "y"), kind=kind)

    def pair(w, example):
        loss = (example @ w) ** 2
        return loss, {"loss": loss, "half": example / 2}

    def mean(w, batch):
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(pair, (None, 0))(w, batch))

    made = cg.micro_batch_grads(mean if batch_loss else pair, K, has_aux=True, batch_loss=batch_loss)
    w, x = W["w"], jnp.asarray(X)
    given = jax.device_put(w, NamedSharding(mesh, P("y"))), jax.device_put(x, NamedSharding(mesh, P("x")))
    for f in (made, jax.jit(made)):
        trees_close(f(*given), made(w, x))


@pytest.mark.parametrize("check_vma", [False, True])
def test_the_loss_of_a_batch_inside_shard_map(check_vma):
    def mean_loss(w, batch):
        losses = jax.vmap(_square, (None, 0))(w, batch)
        return losses.mean(), losses.max()

    mesh = mesh_of(3)
    made = cg.micro_batch_grads(mean_loss, 1, batch_loss=True, has_aux=True)
    w = {"w": W["w"]}
    mapped = jax.shard_map(made, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    want = cg.micro_batch_grads(mean_loss, 3, batch_loss=True, has_aux=True)(w, (X, Y))
    trees_close(jax.jit(mapped)(w, (X, Y)), want)


@pytest.mark.parametrize(
    ("loss_fn", "arguments", "message"),
    [
        (
            lambda w, x: (x * w, 1),
            {},
            r"one scalar, the loss of ONE example \(else pass batch_loss=True\),.*has_aux=True",
        ),
        (lambda w, x: x * w, {}, r"the loss of ONE example \(else pass batch_loss=True\), got shape \(4,\)"),
        (lambda w, x: x @ w, {"batch_loss": True}, r"one scalar, the mean loss of a batch, got shape \(4,\)"),
        (
            lambda w, x: (x * w).sum(),
            {"has_aux": True},
            r"to return \(loss, aux\) with has_aux=True, got",
        ),
        (lambda w, x: (x * w, 1), {"has_aux": True}, r"one scalar, the loss of ONE example .*, got shape \(4,\)"),
        (3.0, {}, "Expected loss_fn to be a function, got float"),
    ],
)
def test_what_is_no_such_loss(loss_fn, arguments, message):
    with pytest.raises(TypeError, match=message):
        cg.micro_batch_grads(loss_fn, K, **arguments)(jnp.ones(4), X)


@pytest.mark.parametrize("batch_loss", [False, True])
def test_a_loss_that_depends_on_no_parameter(batch_loss):
    made = cg.micro_batch_grads(lambda w, x: (x.sum(), w), K, batch_loss=batch_loss, has_aux=True)
    with pytest.raises(ValueError, match="Expected loss_fn to depend on params"):
        made(jnp.ones(4), X)
