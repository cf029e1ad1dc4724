"""Gradients that were built for their norms are kept for the sums, within a bound of memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import cg_jax as cg
from cg_jax import ghost
from cg_jax.ghost.kept import KeptGradients, KeptProduct


def _kept(loss_fn, params, batch, max_bytes=None, norms_inside=False):
    of = ghost.one_pass(loss_fn, params, batch, None, max_bytes, norms_inside=norms_inside)
    return [tensors for tensors in of.tensors if isinstance(tensors, KeptGradients | KeptProduct)]


def _convolution(size=9, channels=4):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, 6)), jnp.float32)
    images = jnp.asarray(rng.normal(size=(5, size, size, channels)), jnp.float32)

    def loss_fn(w, x):
        y = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y).sum() ** 2

    return loss_fn, kernel, images


def test_a_small_kernel_is_kept_where_a_pass_is_weighted():
    assert len(_kept(*_convolution())) == 1
    assert not _kept(*_convolution(), norms_inside=True)


def test_what_is_kept_is_bounded_by_the_pass_and_by_max_bytes():
    gradients = 5 * 3 * 3 * 4 * 6 * 4
    assert not _kept(*_convolution(), max_bytes=gradients - 1)
    assert _kept(*_convolution(), max_bytes=gradients)
    assert not _kept(*_convolution(size=3, channels=64))  # 8 times what went in and came back


@pytest.mark.parametrize("name", ["cnn", "resnet", "weight norm of a product", "conv groups"])
@pytest.mark.parametrize("weighting", [cg.clip_norm(0.5), cg.agreement(0.5), cg.geometric_median(2)], ids=str)
def test_it_changes_no_result(name, weighting):
    params, batch = CASES[name].cast(jnp.float32)
    assert _kept(CASES[name].loss_fn, params, batch, 10**6)
    assert not _kept(CASES[name].loss_fn, params, batch, 1)
    kept, apart = (cg.weighted_grads(CASES[name].loss_fn, weighting, max_bytes=n)(params, batch) for n in (10**6, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), kept, apart)
