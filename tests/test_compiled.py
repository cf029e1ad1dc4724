"""How long a loss lives, and when it is compiled."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations, trees_close
from takers import TAKERS, W, X, explicit, in_shard_map, loss_fn, of_batch, suited

import cg_jax as cg
from cg_jax import _compiled

MORE = TAKERS | {
    "micro_batch_grads": lambda f: cg.micro_batch_grads(f, 2)(W, X),
    "jit": lambda f: jax.jit(lambda w, x: cg.grad_moments(f)(w, x))(W, X),
    "shard_map": lambda f: in_shard_map(cg.per_example_sq_norms(f)),
    "Explicit": lambda f: explicit(cg.grad_moments(f)),
}


@pytest.fixture(autouse=True)
def _counted_anew(monkeypatch):
    """Losses of one code, which these tests make on purpose, are counted anew in every test."""
    monkeypatch.setattr(_compiled, "_COUNTS", weakref.WeakKeyDictionary())


def _plain(t):
    return lambda w, x: loss_fn(w, x) + t[0, 0]


def _nested(t):
    """What keeps functions inside a jaxpr: a jit, a checkpoint, a scan, and custom derivatives that capture."""

    @jax.custom_jvp
    def scaled(h):
        return h * t[0, 0]

    scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * t[0, 0]))
    inner = jax.jit(lambda w, x: scaled(jnp.tanh(w @ x)))

    def loss(w, x):
        step = jax.checkpoint(lambda h, _: (h * t[0, 0] + inner(w, x), None))
        return jax.lax.scan(step, 0.0, None, 3)[0]

    return loss


def _custom_vjp(t):
    clip = jax.custom_vjp(lambda w: w * t[0, 0])
    clip.defvjp(lambda w: (clip(w), None), lambda _, g: (g * t[0, 0],))
    return lambda w, x: jnp.tanh(clip(w) @ x)


def _as_object(t):
    @dataclasses.dataclass(eq=False)
    class Loss:
        table: jax.Array

        def __call__(self, w, x):
            return loss_fn(w, x) + self.table[0, 0]

    return Loss(t)


def _live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def _outlives(take, make, clear=False):
    """What is still alive after the last reference to a loss: its bytes, itself, and its place among the losses."""
    take(make(jnp.ones((1, 1))))  # whatever a first call leaves for all losses
    before, table = _live_bytes(), set(_compiled._TABLE)
    loss = make(jnp.full((500, 500), 0.5))
    ref = weakref.ref(loss)
    take(loss)
    del loss
    if clear:
        jax.clear_caches()
    return _live_bytes() - before > 10_000, ref(), set(_compiled._TABLE) - table


@pytest.mark.parametrize("name", MORE)
def test_nothing_that_a_loss_captured_outlives_it(name):
    assert _outlives(lambda f: MORE[name](suited(f, name)), _plain) == (False, None, set())


@pytest.mark.parametrize("name", ["grad_moments", "confidence"])
def test_nor_does_it_after_caches_are_cleared(name):
    assert _outlives(TAKERS[name], _plain, clear=True) == (False, None, set())


@pytest.mark.parametrize("make", [_nested, _custom_vjp, _as_object])
@pytest.mark.parametrize("name", ["alignments", "confidence", "signs"])
def test_nor_does_what_stands_inside_it(name, make):
    assert _outlives(TAKERS[name], make) == (False, None, set())


def test_the_function_that_was_built_keeps_its_loss():
    moments = cg.grad_moments(_plain(jnp.ones((1, 1))))
    gc.collect()
    trees_close(moments(W, X).sum_grads, cg.grad_moments(loss_fn)(W, X).sum_grads)
    moments(W, X[:5])  # another shape is traced anew


@pytest.mark.parametrize("name", TAKERS)
def test_the_same_loss_is_compiled_once_however_often_it_is_passed(name):
    f = suited(loss_fn, name)
    TAKERS[name](f)
    with compilations() as names:
        for _ in range(2):
            TAKERS[name](f)
    assert not names


class Model:
    """A model whose loss is a bound method: another object at every access."""

    def __init__(self, scale):
        self.scale = scale

    def loss(self, w, x):
        return self.scale * loss_fn(w, x)


def test_a_bound_method_is_known_by_its_owner():
    model, other = Model(1.0), Model(2.0)
    assert model.loss is not model.loss
    want = cg.grad_moments(model.loss)(W, X)
    with compilations() as names:
        for _ in range(3):
            trees_close(cg.grad_moments(model.loss)(W, X), want)
    assert not names
    np.testing.assert_allclose(cg.grad_moments(other.loss)(W, X).sum_grads, 2 * want.sum_grads, rtol=1e-6)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize(
    ("name", "taker"),
    [(name, name) for name in ("grad_moments", "per_example_sq_norms", "per_example_grads", "alignments")]
    + [("confidence", "measure_coherence")],
)
def test_a_fresh_loss_again_and_again_is_warned_of_once(name, taker, recwarn, monkeypatch):
    many = 3
    if name == "per_example_grads":
        many = _compiled._MANY
    monkeypatch.setattr(_compiled, "_MANY", many)
    for number in range(1, many + 2):
        TAKERS[name](lambda w, x: loss_fn(w, x) + w[0])
        assert len(recwarn.list) == (number >= many)
    (warned,) = recwarn.list
    message = rf"got {many} of the same code and shapes, each of which {taker} compiled anew: .*<lambda>, .*\.py:\d+; "
    assert re.search(message + "define loss_fn once, and pass what changes", str(warned.message))


def test_a_partial_and_a_method_are_known_by_what_they_call(recwarn, monkeypatch):
    monkeypatch.setattr(_compiled, "_MANY", 2)
    for i in range(2):
        cg.per_example_grads(functools.partial(lambda i, w, x: i + loss_fn(w, x), i))(W, X)
    for i in range(2):
        cg.per_example_grads(Model(float(i)).loss)(W, X)
    first, second = recwarn.list
    assert "<lambda>" in str(first.message)
    assert "Model.loss" in str(second.message)


def _named(names):
    return lambda w, x: getattr(jnp, names[-1])(w @ x)


def test_losses_that_captured_other_functions_are_others(recwarn, monkeypatch):
    monkeypatch.setattr(_compiled, "_MANY", 2)
    for i in range(3):
        inner = eval(f"lambda w, x: loss_fn(w, x) + {i} * w[0]", {"loss_fn": loss_fn})
        cg.measure_coherence(of_batch(inner), W, X, batch_size=2, estimator="batch")
        cg.per_example_grads(functools.partial(lambda f, w, x: f(w, x), inner))(W, X)
        cg.per_example_sq_norms(_named([("scaled", i), ("tanh", "sin", "cos")[i]]))(W, X)
    assert not recwarn.list


def test_other_losses_shapes_and_options_and_losses_inside_a_jit_are_no_reason_to_warn(recwarn, monkeypatch):
    monkeypatch.setattr(_compiled, "_MANY", 2)
    for i in range(3):
        cg.grad_moments(eval(f"lambda w, x: loss_fn(w, x) + {i} * w[0]", {"loss_fn": loss_fn}))(W, X)
    for n in range(1, 4):
        cg.per_example_grads(lambda w, x: loss_fn(w, x))(W, X[:n])

    @jax.jit
    def several(w, x):
        return sum(cg.per_example_sq_norms(lambda w, x, i=i: i * w @ x)(w, x) for i in range(3))

    several(W, X)
    for size in (2, 3, 4):
        cg.measure_coherence(loss_fn, W, X, batch_size=size, estimator="signs")
    for size in (2**20, 2**21, 2**22):
        cg.per_example_sq_norms(loss_fn, max_bytes=size)(W, X)
    assert not recwarn.list
