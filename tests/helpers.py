"""Helpers of several test files: meshes, closeness, a small model, and the memory and number of compiled programs."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

# JAX records it once for each program, also for those that it reads from the persistent cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations(function=None):
    """The names of the programs that are compiled inside the block; with `function`, only those of that function."""
    names = []

    def listen(event, duration, *, fun_name="", **_):
        if event == _COMPILED and function in (None, fun_name.removeprefix("jit(").removesuffix(")")):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def memory(function, *arguments, donate=()):
    """What a function compiled for these arguments, or their shapes, uses in memory."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile().memory_analysis()


def temporary_bytes(function, *arguments, donate=()):
    return memory(function, *arguments, donate=donate).temp_size_in_bytes


def mesh_of(size, *sizes, names=("data", "model"), kind=AxisType.Auto):
    """A mesh of the first devices."""
    shape = (size, *sizes)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(kind,) * len(shape), devices=devices)


trees_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def close_to_scale(got, want, tolerance, scales=None, least=0.0):
    """Assert that each array is within tolerance · its scale.

    A scale is the largest entry of the array unless given, and at least `least` of the largest scale.
    """
    scales = np.array(scales or [np.abs(b).max(initial=0) for b in want], np.float64)
    for a, b, scale in zip(got, want, np.maximum(scales, least * scales.max(initial=0)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * scale)


def same_coherence(got, want, rtol=1e-5):
    """Assert that two records of a measurement agree, as a whole and by tensor."""
    for field in ("loss", "mean_grad_norm", "m_coherence", "count", "num_skipped", "alpha_stderr"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), rtol=rtol, err_msg=field)
    assert got.per_tensor.keys() == want.per_tensor.keys()
    for name, ratios in got.per_tensor.items():
        np.testing.assert_allclose(ratios.alpha, want.per_tensor[name].alpha, rtol=rtol, err_msg=name)
        np.testing.assert_allclose(ratios.share, want.per_tensor[name].share, rtol=rtol, err_msg=name)


def mlp_params(inputs, hidden, outputs, seed=0):
    """The parameters of `mlp_loss`."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (inputs, hidden), "b1": (hidden,), "w2": (hidden, outputs), "b2": (outputs,)}
    return {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def mlp_loss(params, example):
    """The cross-entropy of one example, by a network with one hidden layer."""
    x, label = example
    return -jax.nn.log_softmax(jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])[label]
