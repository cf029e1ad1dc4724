"""The helpers themselves: compilations are counted exactly, whatever the caches hold; closeness is to a scale."""

import jax
import jax.numpy as jnp
import pytest
from helpers import close_to_scale, compilations


@pytest.fixture(params=[0, 10**9], ids=["cached", "not cached"])
def seconds(request):
    """How long a program must take to compile for the persistent cache to keep it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, request.param)
    yield request.param
    jax.config.update(name, before)


def test_a_program_is_counted_once_wherever_it_comes_from(seconds):
    x, y = jnp.arange(3.0), jnp.arange(4.0)
    for _ in range(2):

        @jax.jit
        def squared(x):
            return x * x + seconds  # another program for each fixture

        with compilations() as names:
            squared(x)
            squared(x)
        assert names == ["jit(squared)"]
        with compilations() as names:
            squared(x)
        assert not names
        with compilations("squared") as names, compilations("other") as others:
            squared(y)
        assert (names, others) == (["jit(squared)"], [])


def test_closeness_is_to_the_scale_of_each_array():
    want = [jnp.array([1e3, 1.0]), jnp.zeros(1)]
    close_to_scale([[1e3, 1.005], [0.0]], want, 1e-5)
    close_to_scale([[1e3, 1.0], [5e-4]], want, 1e-5, least=0.1)
    for got in ([[1e3, 1.1], [0.0]], [[1e3, float("nan")], [0.0]], [[1e3, 1.0], [1e-9]]):
        with pytest.raises(AssertionError):
            close_to_scale(got, want, 1e-5)
