"""Gradient-agreement filtering of mini-batches, a rival of the medians (Chaubard, Eddy & Kochenderfer 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def gradient_agreement(threshold: float) -> optax.GradientTransformation:
    """The mean of the mini-batch gradients that agree, one after another, with those before them.

    Updates are stacked: [k, *param]. The first gradient begins the sum. Each of the others is added where its cosine
    distance to the sum, 1 − cos, is at most `threshold`, and left out where it is not. A step on which none was added
    is skipped: its updates are zero. A zero gradient agrees with nothing.

    Source: Chaubard et al. 2024, https://arxiv.org/abs/2412.18052, Algorithm 1; mini-batches come in random order here
    already.

    Raises:
        ValueError: The threshold is not in (0, 2].
    """
    if not 0 < threshold <= 2:
        raise ValueError(f"Expected 0 < threshold <= 2, got threshold={threshold}.")

    def update(updates: Any, params: Any = None) -> Any:
        del params
        number = jax.tree.leaves(updates)[0].shape[0]
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i], updates) for i in range(number)]
        total, count = parts[0], jnp.int32(1)
        for part in parts[1:]:
            agrees = 1 - _cosine(total, part) <= threshold
            total = jax.tree.map(lambda t, p, agrees=agrees: jnp.where(agrees, t + p, t), total, part)
            count += agrees
        scale = jnp.where(count > 1, 1 / count, 0)
        return jax.tree.map(lambda t: jnp.asarray(scale, t.dtype) * t, total)

    return optax.stateless(update)


def _cosine(a: Any, b: Any) -> jax.Array:
    """−1 where one of them is zero, so that it never agrees."""
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(norms > 0, optax.tree.vdot(a, b) / jnp.where(norms > 0, norms, 1), -1.0)
