"""Estimators are objects: options inside, a fourth one beside the library's."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import mesh_of

import cg_jax as cg
from cg_jax.estimators import OfRows

X = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32) + np.float32(0.3)
W = jnp.zeros(5)


def loss_fn(w, x):
    return jnp.tanh(w @ x + x[0])


def batch_loss(w, xs):
    return jax.vmap(loss_fn, (None, 0))(w, xs).mean()


@pytest.mark.parametrize(
    ("name", "loss", "options", "estimator"),
    [
        ("exact", loss_fn, {}, cg.Exact()),
        ("exact", loss_fn, {"method": "vmap", "confidence": True}, cg.Exact(method="vmap", confidence=True)),
        ("signs", loss_fn, {"seed": 3}, cg.Signs(seed=3)),
        ("batch", batch_loss, {}, cg.Batch()),
    ],
)
def test_a_name_and_its_options_are_an_object(name, loss, options, estimator):
    by_name = cg.measure_coherence(loss, W, X, batch_size=10, estimator=name, **options)
    chex.assert_trees_all_equal(cg.measure_coherence(loss, W, X, batch_size=10, estimator=estimator), by_name)


def test_options_beside_an_object_are_refused():
    for options in ({"seed": 1}, {"confidence": True}, {"method": "vmap"}):
        with pytest.raises(ValueError, match=r"Expected options inside estimator=Exact\(.*\), got \w+=\S+ beside it"):
            cg.measure_coherence(loss_fn, W, X, batch_size=10, estimator=cg.Exact(), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cg.Signs(seed=-1), "Expected seed >= 0, got seed=-1"),
        (lambda: cg.Exact(method="fast"), r"Expected method in \['ghost', 'vmap'\], got method='fast'"),
        (
            lambda: cg.measure_coherence(loss_fn, W, X, batch_size=4, estimator=cg.Exact),
            r"Expected estimator in \[.*'exact'.*\], got .*; make an object of it",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_estimator_is_not_registered():
    for other in (lambda: None, cg.Estimator, "exact"):
        with pytest.raises(TypeError, match="Expected estimator to be a subclass of Estimator"):
            cg.register_estimator("mine", other)
    with pytest.raises(TypeError, match="Expected name to be a string"):
        cg.register_estimator(3, cg.Exact)
    with pytest.raises(TypeError, match=r"Expected a default of every field of Required, got none of \['k'\]"):
        cg.register_estimator("mine", Required)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Required(cg.Exact):
    k: int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bogus"}, r"Expected method in .*, got method='bogus'"),
        ({"seed": -1}, r"Expected seed >= 0, got seed=-1"),
        ({"seed": 1.5}, r"Expected seed to be a whole number >= 0"),
    ],
)
@pytest.mark.parametrize("name", ["exact", "signs", "batch"])
def test_options_are_checked_whatever_the_estimator(name, options, message):
    with pytest.raises(ValueError, match=message):
        cg.measure_coherence(loss_fn, W, X, batch_size=4, estimator=name, **options)


@dataclasses.dataclass(frozen=True)
class Subsample(cg.Estimator):
    """The exact coherence of every `step`-th example: one file, and one line that registers it."""

    step: int = 3

    flags_examples: ClassVar[bool] = True

    def of_batch(self, problem, rows, ids):
        mask = (ids >= 0) & (ids % self.step == 0)
        moments = cg.grad_moments(problem.loss_fn)(problem.params, rows, mask)
        return moments, OfRows(jnp.zeros(ids.shape, bool), jnp.zeros(ids.shape))

    def moments(self, state):
        return state


@pytest.mark.parametrize("devices", [None, 8])
@pytest.mark.parametrize("estimator", ["subsample", Subsample(step=2)])
def test_a_fourth_estimator_is_one_class_and_one_line(estimator, devices):
    cg.register_estimator("subsample", Subsample)
    mesh = devices and mesh_of(devices)
    got = cg.measure_coherence(loss_fn, W, X, batch_size=16, estimator=estimator, mesh=mesh)
    step = 3 if estimator == "subsample" else estimator.step
    with jax.enable_x64(True):
        _, (grads,) = oracle.per_example(loss_fn, np.zeros(5), X[::step].astype(np.float64))
    want = oracle.ratios(grads)
    assert int(got.count) == len(X[::step])
    np.testing.assert_allclose([got.alpha, got.m_coherence], [want["alpha"], want["alpha"] * len(grads)], rtol=1e-5)
