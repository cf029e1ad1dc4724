"""The four-example toy of the theory (arXiv 2203.10036): every number is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cg_jax as cg

REAL = np.array([(1, 0, 0, 0, 0, 1), (0, -1, 0, 0, 0, -1), (0, 0, -1, 0, 0, -1), (0, 0, 0, 1, 0, 1)], float)
TEST = np.array((0, 0, 0, 0, -1, -1), float)
LABELS, TEST_LABEL = np.array([1.0, -1.0, -1.0, 1.0]), -1.0
SHARED = 5  # the sixth input, 0 in the "random" rows


def _without_shared(rows):
    rows = rows.copy()
    rows[..., SHARED] = 0
    return rows


DATA = {"real": (REAL, TEST), "random": (_without_shared(REAL), _without_shared(TEST))}
WANTED = {  # α, r; end point and test loss of gradient descent; the same of descent along the median
    "real": (0.625, 2.5, (0.2, 0.2, 0.2, 0.2, 0, 0.8), 0.02, (0, 0, 0, 0, 0, 1), 0.0),
    "random": (0.25, 1.0, (1, 1, 1, 1, 0, 0), 0.5, (0, 0, 0, 0, 0, 0), 0.5),
}


def loss_fn(w, example):
    x, y = example
    return 0.5 * (y - w @ x) ** 2


def _descend(rule, rows, steps=800):
    """(end point, the record of every step) of descent along rule(the 4 gradients) at rate 0.1, from w = 0."""
    optimizer = optax.chain(cg.stacked(rule), optax.sgd(0.1))
    batch = (jnp.asarray(rows), jnp.asarray(LABELS))
    w = jnp.zeros(6)
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
        record = cg.coherence(cg.grad_moments(loss_fn)(w, batch))
        updates, state = optimizer.update(cg.micro_batch_grads(loss_fn, 4)(w, batch), state)
        return optax.apply_updates(w, updates), state, record

    records = []
    for _ in range(steps):
        w, state, record = step(w, state)
        records.append(record)
    return w, records


@pytest.mark.parametrize("labels", DATA)
def test_descent_on_the_mean(labels):
    alpha, r, end, test_loss, *_ = WANTED[labels]
    rows, test = DATA[labels]
    with jax.enable_x64(True):
        w, records = _descend(cg.mean(), rows)
        moving = [record for record in records if record.loss > 1e-12]
        assert len(moving) > 100
        np.testing.assert_allclose([record.alpha for record in moving], alpha, atol=1e-6)
        np.testing.assert_allclose([record.m_coherence for record in moving], r, atol=1e-6)
        np.testing.assert_allclose(w, end, atol=1e-6)
        np.testing.assert_allclose(loss_fn(w, (test, TEST_LABEL)), test_loss, atol=1e-6)


@pytest.mark.parametrize("labels", DATA)
def test_descent_on_the_median(labels):
    *_, end, test_loss = WANTED[labels]
    rows, test = DATA[labels]
    with jax.enable_x64(True):
        w, _ = _descend(cg.median(), rows)
        np.testing.assert_allclose(w, end, atol=1e-6)
        np.testing.assert_allclose(loss_fn(w, (test, TEST_LABEL)), test_loss, atol=1e-6)
