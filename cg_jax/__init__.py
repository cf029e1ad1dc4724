"""Gradient coherence for JAX: exact per-example gradient statistics, and robust aggregation of gradients."""

from cg_jax.aggregate import consecutive, m3, median_of_k, ra3, rm3, rolling, stacked
from cg_jax.bound import generalization_bound
from cg_jax.checked import checked
from cg_jax.collective import across_devices
from cg_jax.estimators import Batch, Estimator, Exact, Signs, register_estimator
from cg_jax.ghost import Norm, Product, explain, register_rule
from cg_jax.measure import measure_coherence
from cg_jax.metrics import Coherence, Ratios, coherence
from cg_jax.micro_batch import micro_batch_grads
from cg_jax.moments import GradMoments, merge
from cg_jax.per_example import alignments, per_example_grads
from cg_jax.rules import mean, median, trimmed_mean, winsorized_mean
from cg_jax.statistics import grad_moments, per_example_sq_norms

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Coherence",
    "Estimator",
    "Exact",
    "GradMoments",
    "Norm",
    "Product",
    "Ratios",
    "Signs",
    "across_devices",
    "alignments",
    "checked",
    "coherence",
    "consecutive",
    "explain",
    "generalization_bound",
    "grad_moments",
    "m3",
    "mean",
    "measure_coherence",
    "median",
    "median_of_k",
    "merge",
    "micro_batch_grads",
    "per_example_grads",
    "per_example_sq_norms",
    "ra3",
    "register_estimator",
    "register_rule",
    "rm3",
    "rolling",
    "stacked",
    "trimmed_mean",
    "winsorized_mean",
]
