"""Weighted sums and alignments of one pass, against a float64 loop, case by case."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import close_to_scale

from cg_jax import ghost, trees

WEIGHTS = np.linspace(-1.0, 2.0, cases.B)
KEEP = np.arange(cases.B) % 3 != 1


def _numbers(name):
    case = cases.CASES[name]
    return case._replace(**dict(zip(("params", "batch"), case.cast(jnp.float32), strict=True))).cast(jnp.float64)


def _direction(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), trees.partition(params)[0])


@pytest.mark.parametrize("name", cases.CASES)
def test_weighted_sums_and_alignments_are_those_of_the_oracle(name):
    with jax.enable_x64(True):
        loss_fn, (params, batch) = cases.CASES[name].loss_fn, _numbers(name)
        direction = _direction(params)
        _, grads = oracle.per_example(loss_fn, params, batch)

        @jax.jit
        def measured(params, batch, keep, weights, direction):
            of = ghost.one_pass(loss_fn, params, batch, keep, norms_inside=False)
            return ghost.weighted_sums(of, weights), ghost.alignments(of, direction)

        for keep in (None, jnp.asarray(KEEP, jnp.float32)):
            kept = np.ones(cases.B) if keep is None else KEEP
            sums, along = measured(params, batch, keep, jnp.asarray(WEIGHTS), direction)
            for got, grad in zip(jax.tree.leaves(sums), grads, strict=True):
                terms = np.einsum("b...,b->b...", grad, WEIGHTS * kept)
                close_to_scale([got], [terms.sum(0)], 1e-11, [np.abs(terms).sum(0).max(initial=0)])
            terms = [
                grad.reshape(cases.B, -1) @ np.asarray(v).ravel()
                for grad, v in zip(grads, jax.tree.leaves(direction), strict=True)
            ]
            size = np.sqrt(
                sum(np.square(g).sum() for g in grads) * sum(np.square(v).sum() for v in jax.tree.leaves(direction))
            )
            close_to_scale([along], [sum(terms) * kept], 1e-11, [size])


def test_one_pass_is_one_forward_and_one_backward_pass():
    """Norms, sums, weighted sums and alignments share it: the loss is traced as often as for norms alone."""
    traces = []

    def loss_fn(w, x):
        traces.append(1)
        return jnp.tanh(x @ w).sum()

    w, x = jnp.ones((4, 3)), jnp.ones((5, 4))
    of = ghost.one_pass(loss_fn, w, x)
    before = len(traces)
    every = (ghost.sq_norms(of), ghost.sums(of), ghost.weighted_sums(of, jnp.ones(5)), ghost.alignments(of, w))
    assert len(every) == 4
    assert len(traces) == before


@pytest.mark.parametrize("name", cases.CASES)
def test_mutual_alignments_are_those_of_the_oracle(name):
    with jax.enable_x64(True):
        loss_fn, (params, batch) = cases.CASES[name].loss_fn, _numbers(name)
        _, grads = oracle.per_example(loss_fn, params, batch)
        flat = np.concatenate([grad.reshape(cases.B, -1) for grad in grads], 1)

        @jax.jit
        def measured(params, batch, weights):
            of = ghost.one_pass(loss_fn, params, batch, norms_inside=False)
            return ghost.mutual_alignments(of, weights), ghost.mutual_alignments(of, None)

        for got, w in zip(measured(params, batch, jnp.asarray(WEIGHTS)), (WEIGHTS, np.ones(cases.B)), strict=True):
            close_to_scale([got], [flat @ (w @ flat)], 1e-11, [(np.abs(flat) @ (np.abs(w) @ np.abs(flat))).max()])


def test_pairs_of_a_wide_layer_take_no_weighted_sum():
    """With B (D + P) ≤ 2 D P no weighted sum is formed, however many inner products are asked for."""
    w, x = jnp.ones((64, 96)), jnp.ones((8, 64))

    def loss_fn(w, x):
        return jnp.tanh(x @ w).sum()

    def asked(w, x):
        of = ghost.one_pass(loss_fn, w, x, norms_inside=False)
        u = ghost.mutual_alignments(of, None)
        return ghost.mutual_alignments(of, ghost.mutual_alignments(of, u))

    def built(f):
        return re.findall(r"= f32\[(?:64,96|96,64)\]\S* (?!parameter)\w+", jax.jit(f).lower(w, x).compile().as_text())

    assert not built(asked)
    assert built(lambda w, x: jax.grad(lambda w: jax.vmap(loss_fn, (None, 0))(w, x).sum())(w))


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1.0, 1e15])
def test_pairs_keep_to_the_range(size):
    """Inputs and cotangents near the limits of the range, whose inner products are in it."""
    w, x = jnp.ones((32, 48)), jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)) * size, jnp.float32)
    of = ghost.one_pass(lambda w, x: (x @ w).sum() / size, w, x, norms_inside=False)
    exact = np.asarray(x, np.float64) / size
    np.testing.assert_allclose(ghost.mutual_alignments(of, None), 48 * exact @ exact.sum(0), rtol=1e-4)
