"""The shapes of batches: of one size where that is no waste, and of few sizes where it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations, mesh_of

import cg_jax as cg
from cg_jax.batches import batches_of
from cg_jax.sharding import OnMesh, SingleDevice

X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
MANY = 10**9

ONE = SingleDevice()


def _cuts(sizes):
    ends = np.cumsum(sizes)
    return [X[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _shapes(data, batch_size, layout=ONE, whole=False):
    """(rows, examples) of each batch."""
    return [(b.rows.shape[0], *b.sizes) for b in batches_of(data, batch_size, layout, whole).batches]


@pytest.fixture(scope="module")
def layout():
    return OnMesh.of(mesh_of(8), None, jnp.zeros(3))


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray])
def test_a_batch_of_arrays_is_no_larger_than_they_are(put, layout):
    data = put(X)
    assert _shapes(data, 16) == [(16, 16)] * 3 + [(16, 2)]
    assert _shapes(data, 50) == _shapes(data, 51) == _shapes(data, MANY) == [(50, 50)]
    assert batches_of(data, MANY, ONE, False).number == 1
    assert _shapes(data, MANY, layout) == [(56, 50)]  # each of 8 devices has as many


def test_batches_of_an_iterable_are_padded_to_the_largest_so_far(layout):
    assert _shapes(iter(_cuts([16, 16, 16, 2])), MANY) == [(16, 16)] * 3 + [(16, 2)]
    assert _shapes(_cuts([16, 16, 16, 2]), 16) == [(16, 16)] * 3 + [(16, 2)]
    assert _shapes(iter(_cuts([16, 30, 4])), 30) == [(16, 16), (30, 30), (30, 4)]
    assert _shapes(iter(_cuts([5, 6, 11, 9])), MANY) == [(5, 5), (10, 6), (20, 11), (20, 9)]  # at least twice as large
    assert _shapes(iter(_cuts([5, 6, 11, 9])), 14) == [(5, 5), (10, 6), (14, 11), (14, 9)]
    assert _shapes(iter(_cuts([5, 6, 11])), MANY, layout) == [(8, 5), (8, 6), (16, 11)]


def test_padding_repeats_the_last_row_and_has_no_number():
    *_, last = batches_of(X[:5], 4, ONE, False).batches
    np.testing.assert_array_equal(last.rows, np.tile(X[4], (4, 1)))
    assert last.ids.tolist() == [4, -1, -1, -1]


def loss_fn(w, x):
    return (w @ x) ** 2


@pytest.mark.parametrize("sharded", [False, True])
def test_batch_sizes_above_the_number_of_examples_are_one_program(sharded, layout):
    mesh = layout.mesh if sharded else None
    w, sizes = jnp.ones(3), (50, 56, 500_000, MANY, 10**30)
    with compilations("step") as names:
        found = [cg.measure_coherence(loss_fn, w, X, batch_size=size, mesh=mesh) for size in sizes]
    assert len(names) == 1
    assert len({float(result.alpha) for result in found}) == 1
    assert [int(result.count) for result in found] == [50] * 5
    want = cg.coherence(cg.grad_moments(loss_fn)(w, X))
    np.testing.assert_allclose(found[0].alpha, want.alpha, rtol=1e-5)


def test_an_iterable_compiles_few_sizes():
    loss = lambda w, x: (w @ x) ** 2  # noqa: E731
    w = jnp.ones(3)
    with compilations("step") as names:
        found = cg.measure_coherence(loss, w, iter(_cuts(range(1, 10))), batch_size=MANY)
    assert len(names) == 5  # for 1, 2, 4, 8 and 16 rows
    with compilations("step") as names:
        again = cg.measure_coherence(loss, w, iter(_cuts([4] * 8)), batch_size=MANY)
    assert not names
    for got, m in ((found, 45), (again, 32)):
        want = cg.coherence(cg.grad_moments(loss)(w, X[:m]))
        np.testing.assert_allclose(got.alpha, want.alpha, rtol=1e-5)


def test_estimator_batch_wants_whole_batches_and_builds_no_others():
    mean_loss = lambda w, rows: ((rows @ w) ** 2).mean()  # noqa: E731
    for data in (X, jnp.asarray(X), [X], iter([X])):
        with pytest.raises(ValueError, match=r"at least one whole batch of batch_size=1000000000, got 50 examples"):
            cg.measure_coherence(mean_loss, jnp.ones(3), data, batch_size=MANY, estimator="batch")
    got = cg.measure_coherence(mean_loss, jnp.ones(3), X, batch_size=20, estimator="batch")
    assert (int(got.count), int(got.num_skipped)) == (40, 10)


def test_a_standard_error_is_of_the_same_batches():
    want = cg.measure_coherence(loss_fn, jnp.ones(3), X, batch_size=50, confidence=True)
    for data in (X, _cuts([5, 6, 11, 28])):
        got = cg.measure_coherence(loss_fn, jnp.ones(3), data, batch_size=MANY, confidence=True)
        np.testing.assert_allclose([got.alpha, got.alpha_stderr], [want.alpha, want.alpha_stderr], rtol=1e-5)
