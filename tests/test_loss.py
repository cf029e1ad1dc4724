"""What a loss_fn may be, and what it may return beside the loss."""

import dataclasses
import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compilations, mesh_of, trees_close
from takers import MASK, TAKERS, W, X, explicit, in_shard_map, loss_fn, of_batch, suited

import cg_jax as cg


@dataclasses.dataclass
class Callable:
    """Equal by value, so without a hash; and `table` cannot be compared."""

    table: jax.Array

    def __call__(self, w, x):
        return self.table * loss_fn(w, x)


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float

    def __call__(self, w, x):
        return self.scale * loss_fn(w, x)


@dataclasses.dataclass(frozen=True)
class FrozenOfArrays:
    """Its hash is that of an array, which has none."""

    scale: jax.Array

    def __call__(self, w, x):
        return self.scale * loss_fn(w, x)


class Slots:
    """Takes no weak reference; jax.jit refuses it."""

    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 2.0

    def __call__(self, w, x):
        return self.scale * loss_fn(w, x)


class Equal:
    """Equal to anything, without a hash."""

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return True

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, w, x):
        return self.scale * loss_fn(w, x)


class Module(eqx.Module):
    scale: jax.Array

    def __call__(self, w, x):
        return self.scale * loss_fn(w, x)

    def method(self, w, x):
        return self(w, x)


class NNXModule(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.asarray(2.0))

    def loss(self, w, x):
        return self.scale[...] * loss_fn(w, x)


class Static:
    @classmethod
    def of_class(cls, w, x):
        return 2 * loss_fn(w, x)

    @staticmethod
    def of_none(w, x):
        return 2 * loss_fn(w, x)


def scaled(scale, w, x):
    return scale * loss_fn(w, x)


@functools.lru_cache
def make(scale):
    return functools.partial(scaled, scale)


class Model:
    """A model whose loss is a bound method: another object at every access."""

    def loss(self, w, x):
        return 2 * loss_fn(w, x)


# Each is 2 · loss_fn.
KINDS = {
    "partial": functools.partial(scaled, 2.0),
    "partial of an array": functools.partial(scaled, jnp.asarray(2.0)),
    "jax.tree_util.Partial": jax.tree_util.Partial(scaled, jnp.asarray(2.0)),
    "dataclass": Callable(jnp.asarray(2.0)),
    "frozen dataclass": Frozen(2.0),
    "frozen dataclass of arrays": FrozenOfArrays(jnp.asarray(2.0)),
    "slots": Slots(),
    "method of slots": Slots().__call__,
    "equality without hash": Equal(2.0),
    "eqx.Module": Module(jnp.asarray(2.0)),
    "method of an eqx.Module": Module(jnp.asarray(2.0)).method,
    "filter_jit": eqx.filter_jit(functools.partial(scaled, jnp.asarray(2.0))),
    "method of an nnx.Module": NNXModule().loss,
    "bound method": Model().loss,
    "class method": Static.of_class,
    "static method": Static().of_none,
    "jitted": jax.jit(functools.partial(scaled, 2.0)),
    "checkpointed": jax.checkpoint(functools.partial(scaled, 2.0)),
    "of an lru_cache": make(2.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_callable_is_a_loss(kind):
    f = KINDS[kind]
    trees_close(TAKERS["grad_moments"](f).sum_grads, 2 * TAKERS["grad_moments"](loss_fn).sum_grads)
    trees_close(TAKERS["alignments"](f), 2 * TAKERS["alignments"](loss_fn))
    got, want = TAKERS["confidence"](f), TAKERS["confidence"](loss_fn)
    trees_close((got.alpha, got.loss, got.alpha_stderr), (want.alpha, 2 * want.loss, want.alpha_stderr))
    trees_close(cg.micro_batch_grads(f, 2)(W, X), 2 * cg.micro_batch_grads(loss_fn, 2)(W, X))


@pytest.mark.parametrize("kind", ["slots", "frozen dataclass of arrays", "equality without hash", "eqx.Module"])
@pytest.mark.parametrize("name", ["per_example_grads", "per_example_sq_norms", "mesh", "batch", "explain", "signs"])
def test_one_that_jit_cannot_hash_or_refer_to_is_a_loss_everywhere(name, kind):
    f = KINDS[kind]
    got, want = TAKERS[name](suited(f, name)), TAKERS[name](suited(loss_fn, name))
    if name == "explain":
        assert got[0].rule == want[0].rule == "closed"
    elif name.startswith("per_example"):
        trees_close(got, (4 if "norms" in name else 2) * want)
    else:
        trees_close((got.alpha, got.loss), (want.alpha, 2 * want.loss))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "slots" not in kind])
def test_any_callable_is_compiled_once(kind):
    take, f = TAKERS["per_example_grads"], KINDS[kind]
    take(f)
    with compilations() as names:
        take(f)
    assert not names


def test_an_object_without_weak_references_is_compiled_for_each_function_built():
    moments = cg.grad_moments(Slots())
    moments(W, X)
    with compilations() as names:
        moments(W, X)
    assert not names
    with compilations() as names:
        cg.grad_moments(Slots())(W, X)
    assert len(names) == 1


def test_equal_objects_are_not_taken_for_each_other():
    for kind in (Equal, Frozen, lambda scale: Callable(jnp.asarray(scale))):
        one, two = (cg.grad_moments(kind(scale))(W, X).sum_grads for scale in (1.0, 2.0))
        np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_an_id_that_is_used_again_is_no_other_loss():
    for scale in (1.0, 2.0, 3.0, 4.0):
        got = cg.grad_moments(Frozen(scale))(W, X).sum_grads
        np.testing.assert_allclose(got, scale * cg.grad_moments(loss_fn)(W, X).sum_grads, rtol=1e-6)


def test_what_is_read_from_outside_is_read_once():
    loss = Callable(jnp.asarray(1.0))
    before = cg.grad_moments(loss)(W, X)
    loss.table = jnp.asarray(5.0)
    trees_close(cg.grad_moments(loss)(W, X), before)
    np.testing.assert_allclose(
        cg.grad_moments(Callable(jnp.asarray(5.0)))(W, X).sum_grads, 5 * before.sum_grads, rtol=1e-6
    )


def with_aux(w, x):
    h = w @ x
    aux = {"h": h, "x": x, "place": jnp.argmax(x), "one": 1, "none": None, "positive": h > 0}
    return jnp.tanh(h) ** 2, aux


def _aux(rows=slice(None)):
    h = X @ np.asarray(W)
    keep = np.zeros(8, bool)
    keep[rows] = True
    aux = {"h": h, "x": X, "place": X.argmax(1), "one": np.ones(8), "none": None, "positive": h > 0}
    return jax.tree.map(lambda leaf: np.where(keep.reshape(8, *(1,) * (leaf.ndim - 1)), leaf, 0), aux)


AUX_TAKERS = {
    "grad_moments": lambda f, **k: cg.grad_moments(f, **k)(W, X),
    "grad_moments, vmap": lambda f, **k: cg.grad_moments(f, method="vmap", **k)(W, X),
    "per_example_sq_norms": lambda f, **k: cg.per_example_sq_norms(f, **k)(W, X),
    "per_example_sq_norms, vmap": lambda f, **k: cg.per_example_sq_norms(f, method="vmap", **k)(W, X),
    "per_example_grads": lambda f, **k: cg.per_example_grads(f, **k)(W, X),
    "alignments": lambda f, **k: cg.alignments(f, **k)(W, X, W),
    "alignments, reverse": lambda f, **k: cg.alignments(f, **k)(W.astype(jnp.bfloat16), X, W),
    "jit": lambda f, **k: jax.jit(cg.grad_moments(f, **k))(W, X),
    "Explicit": lambda f, **k: explicit(cg.grad_moments(f, **k)),
    "Explicit, grads": lambda f, **k: explicit(cg.per_example_grads(f, **k)),
    "Explicit, norms": lambda f, **k: explicit(cg.per_example_sq_norms(f, **k)),
    "Explicit, alignments": lambda f, **k: explicit(lambda w, x: cg.alignments(f, **k)(w, x, w)),
    "shard_map": lambda f, **k: in_shard_map(cg.per_example_sq_norms(f, **k)),
}


@pytest.mark.parametrize("name", AUX_TAKERS)
def test_auxiliary_values_come_back_by_example(name):
    take = AUX_TAKERS[name]
    got, aux = take(with_aux, has_aux=True)
    trees_close(got, take(loss_fn))
    assert jax.tree.structure(aux) == jax.tree.structure(_aux())
    close = {"rtol": 2e-2} if "reverse" in name else {"rtol": 1e-5}
    chex.assert_trees_all_close(aux, _aux(), **close)
    if "Explicit" in name:
        assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(aux)} == {"data"}


@pytest.mark.parametrize("method", ["ghost", "vmap"])
def test_auxiliary_values_of_masked_rows_are_zero(method):
    f = lambda w, x: (lambda loss, aux: (loss, aux | {"key": jax.random.key(0)}))(*with_aux(w, x))  # noqa: E731
    moments, aux = cg.grad_moments(f, method=method, has_aux=True)(W, X, MASK)
    trees_close(moments, cg.grad_moments(loss_fn, method=method)(W, X, MASK))
    assert aux.pop("key").shape == (8,)
    trees_close(aux, _aux(MASK))


@pytest.mark.parametrize("more", [{"confidence": True}, {"estimator": "signs"}])
def test_a_measurement_drops_auxiliary_values(more):
    for where in (None, mesh_of(8)):
        got, want = (
            cg.measure_coherence(f, W, X, batch_size=8, mesh=where, has_aux=has_aux, **more)
            for f, has_aux in ((with_aux, True), (loss_fn, False))
        )
        trees_close((got.alpha, got.alpha_stderr, got.loss), (want.alpha, want.alpha_stderr, want.loss))


def test_a_batch_loss_may_have_auxiliary_values():
    mean = of_batch(loss_fn)
    got = cg.measure_coherence(
        lambda w, x: (mean(w, x), x.shape[0]), W, X, batch_size=2, estimator="batch", has_aux=True
    )
    trees_close(got.alpha, cg.measure_coherence(mean, W, X, batch_size=2, estimator="batch").alpha)


def test_explain_takes_auxiliary_values():
    assert cg.explain(with_aux, W, X[0], has_aux=True)[0].rule == "closed"


@pytest.mark.parametrize("name", ["grad_moments", "grad_moments, vmap", "per_example_grads", "alignments"])
def test_a_pair_and_has_aux_go_together(name):
    take = AUX_TAKERS[name]
    with pytest.raises(TypeError, match=r"one scalar, .*, got shape .*; to return \(loss, aux\), pass has_aux=True"):
        take(with_aux)
    for single, got in ((loss_fn, r"\(\)"), (lambda w, x: (loss_fn(w, x), 1, 2), r"\(\(\), 'int', 'int'\)")):
        with pytest.raises(TypeError, match=rf"to return \(loss, aux\) with has_aux=True, got {got}\."):
            take(single, has_aux=True)
