"""Numeric modes and the compilation cache of the whole suite."""

import os
from pathlib import Path

import jax
import pytest

# Programs that several tests, workers or child processes compile are compiled once.
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _estimators_registered_by_a_test_go_with_it(monkeypatch):
    from cg_jax import estimators  # after the modes are set

    monkeypatch.setattr(estimators, "_BY_NAME", dict(estimators._BY_NAME))


@pytest.fixture(autouse=True, scope="module")
def _programs_of_many_files_are_freed():
    """Compiled programs hold memory maps, of which Linux gives a process 65,530. Beyond that it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()
