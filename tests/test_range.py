"""Numbers that leave the range of a dtype on the way, where the result fits; and arrays without an entry."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax import lax

import cg_jax as cg


def test_a_bias_in_float16_is_summed_over_positions_in_float32():
    def loss_fn(b, x):
        return ((x + b[None]) * 100).astype(jnp.float32).sum()

    b, x = jnp.ones(5, jnp.float16), np.ones((4, 1000, 5), np.float16)
    moments = cg.grad_moments(loss_fn)(b, x)  # each gradient is 1e5, above the largest number of float16
    np.testing.assert_allclose(moments.sum_grads, 4e5)
    np.testing.assert_allclose(moments.sum_sq_norms, 4 * 5 * 1e10)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(
    ("numbers", "kernel"), [(("NCHW", "OIHW", "NCHW"), (2, 1, 3, 3)), (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 2))]
)
def test_a_scaled_kernel_in_float16(scale, numbers, kernel):
    def loss_fn(k, x):
        image = x[None, None] if numbers[0] == "NCHW" else x[None, ..., None]
        y = lax.conv_general_dilated(image, scale * k, (1, 1), "SAME", dimension_numbers=numbers)
        return y.astype(jnp.float32).sum()

    k, x = np.ones(kernel, np.float16), np.full((2, 30, 30), 900.0, np.float16)
    got = cg.per_example_sq_norms(loss_fn)(k, x)
    # A kernel's entry sees 30 or 29 pixels along each axis.
    want = 2 * (900.0 * scale) ** 2 * sum((a * b) ** 2 for a in (29, 30, 29) for b in (29, 30, 29))
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_the_sum_of_gradients_may_be_too_large_to_square():
    moments = cg.grad_moments(lambda w, x: (w * x).sum())(jnp.ones(3), jnp.full((1000, 3), 1e17))
    found = cg.coherence(moments)
    np.testing.assert_allclose([found.alpha, found.m_coherence], [1, 1000], rtol=1e-4)
    np.testing.assert_allclose(found.mean_grad_norm, 1e17 * 3**0.5, rtol=1e-4)


@pytest.mark.parametrize(("table", "ids"), [((5, 3), (2, 0)), ((5, 0), (2, 3))])
def test_a_look_up_of_nothing_has_no_gradient(table, ids):
    norms = cg.per_example_sq_norms(lambda w, i: w[i].sum() + 1)(jnp.ones(table), np.zeros(ids, int))
    np.testing.assert_array_equal(norms, [0, 0])


def _square(w, x):
    return (w @ x) ** 2


def test_undefined_coherence_with_confidence_under_debug_nans():
    with jax.debug_nans(True), pytest.warns(UserWarning, match="Expected some gradient other than zero"):
        result = cg.measure_coherence(_square, jnp.zeros(4), np.ones((8, 4), np.float32), batch_size=8, confidence=True)
    assert np.isnan(result.alpha)
    assert np.isnan(result.alpha_stderr)


def test_an_error_of_examples_in_a_list_says_what_a_list_means():
    with pytest.raises(ValueError, match="matmul") as error:
        cg.measure_coherence(_square, jnp.ones(4), list(np.ones((8, 4), np.float32)), batch_size=8)
    assert "a list, so that each of its items was taken as a batch" in error.value.__notes__[-1]


def test_moments_are_added_by_merging():
    moments = cg.grad_moments(_square)(jnp.ones(4), np.ones((8, 4), np.float32))
    assert (moments + moments).count == 16


def test_a_sharded_batch_is_not_gathered_under_jit():
    mesh = mesh_of(4)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def loss_fn(p, x):
        y = lax.conv_general_dilated(x[None], p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (jnp.tanh(y).mean((0, 1, 2)) @ p["w"]).sum() ** 2

    params = {"k": jnp.ones((3, 3, 2, 4)) / 9, "w": jnp.ones((4, 3))}
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 2)).astype(np.float32)
    program = jax.jit(lambda p, x: cg.grad_moments(loss_fn, max_bytes=20_000)(p, x))
    compiled = program.lower(params, jax.device_put(x, spread)).compile()
    text = compiled.as_text()
    assert " while(" in text  # the examples of a device are taken in chunks
    assert not any(each in text for each in ("all-gather(", "all-to-all(", "collective-permute("))
    got, want = compiled(params, jax.device_put(x, spread)), cg.grad_moments(loss_fn)(params, x)
    chex.assert_trees_all_close(got, want, rtol=2e-5)
