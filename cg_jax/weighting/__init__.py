"""Weights of examples from the statistics of their gradients. A new weighting is one function in one file."""

from cg_jax.weighting.base import ExampleStatistics, NamedWeighting, Weighting, require_weighting
from cg_jax.weighting.clipping import clip_norm, clip_quantile, normalize
from cg_jax.weighting.composition import compose
from cg_jax.weighting.geometric import geometric_median
from cg_jax.weighting.selection import agreement, trim_loss

__all__ = [
    "ExampleStatistics",
    "NamedWeighting",
    "Weighting",
    "agreement",
    "clip_norm",
    "clip_quantile",
    "compose",
    "geometric_median",
    "normalize",
    "require_weighting",
    "trim_loss",
]
