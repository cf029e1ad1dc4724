"""Gradient coherence for JAX: exact per-example gradient statistics, and robust aggregation of gradients."""

from cg_jax.aggregate import consecutive, m3, median_of_k, ra3, rm3, rolling, stacked
from cg_jax.bound import generalization_bound
from cg_jax.checked import checked
from cg_jax.collective import across_devices
from cg_jax.coordinatewise import coordinatewise_grads
from cg_jax.estimators import Batch, Estimator, Exact, Signs, register_estimator
from cg_jax.ghost import Norm, Product, explain, register_rule
from cg_jax.measure import measure_coherence
from cg_jax.metrics import Coherence, Ratios, coherence
from cg_jax.micro_batch import micro_batch_grads
from cg_jax.moments import GradMoments, merge
from cg_jax.per_example import per_example_grads
from cg_jax.rules import mean, median, trimmed_mean, winsorized_mean
from cg_jax.statistics import alignments, grad_moments, per_example_sq_norms
from cg_jax.weighted import WeightedInfo, weighted_grads
from cg_jax.weighting import (
    ExampleStatistics,
    agreement,
    clip_norm,
    clip_quantile,
    compose,
    geometric_median,
    normalize,
    trim_loss,
)

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Coherence",
    "Estimator",
    "Exact",
    "ExampleStatistics",
    "GradMoments",
    "Norm",
    "Product",
    "Ratios",
    "Signs",
    "WeightedInfo",
    "across_devices",
    "agreement",
    "alignments",
    "checked",
    "clip_norm",
    "clip_quantile",
    "coherence",
    "compose",
    "consecutive",
    "coordinatewise_grads",
    "explain",
    "generalization_bound",
    "geometric_median",
    "grad_moments",
    "m3",
    "mean",
    "measure_coherence",
    "median",
    "median_of_k",
    "merge",
    "micro_batch_grads",
    "normalize",
    "per_example_grads",
    "per_example_sq_norms",
    "ra3",
    "register_estimator",
    "register_rule",
    "rm3",
    "rolling",
    "stacked",
    "trim_loss",
    "trimmed_mean",
    "weighted_grads",
    "winsorized_mean",
]
