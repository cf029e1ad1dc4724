"""Gradient coherence for JAX: exact per-example gradient statistics, and robust aggregation of gradients."""

from cg_jax.metrics import Coherence, Ratios, coherence
from cg_jax.measure import measure_coherence
from cg_jax.moments import GradMoments, merge
from cg_jax.per_example import alignments, per_example_grads
from cg_jax.statistics import grad_moments, per_example_sq_norms

__version__ = "0.1.0"

__all__ = [
    "Coherence",
    "GradMoments",
    "Ratios",
    "alignments",
    "coherence",
    "grad_moments",
    "measure_coherence",
    "merge",
    "per_example_grads",
    "per_example_sq_norms",
]
