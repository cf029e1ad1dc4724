"""One weighting after another."""

import dataclasses

import jax
import jax.numpy as jnp

from cg_jax.weighting.base import ExampleStatistics, NamedWeighting, Weighting, require_weighting


def compose(*weightings: Weighting) -> NamedWeighting:
    """The weighting wᵢ ∝ uᵢ vᵢ, Σ wᵢ = 1, where v sees the statistics of the gradients that u has weighted.

    The second weighting sees the gradients ûᵢ gᵢ with û = u / max u, so that a gradient that u does not shorten keeps
    its length, and so on for more. The losses are the same for all. The base is computed once.

    Args:
        weightings: One or more, the first first. Each gives weights [B]; a weighting by tensor can only be the whole.

    Raises:
        TypeError: One is not a function.
        ValueError: No weighting. When called: one gives weights that are not [B].

    Examples:
        >>> import jax, cg_jax as cg
        >>> robust = cg.compose(cg.clip_quantile(0.5), cg.agreement(0.5))
        >>> robust
        cg_jax.compose(cg_jax.clip_quantile(q=0.5), cg_jax.agreement(share=0.5))
        >>> grads, info = cg.weighted_grads(lambda w, x: -w * x, robust)(0.0, jax.numpy.array([1.0, -4.0, 7.0, 9.0]))
        >>> info.weights
        Array([0.56, 0.  , 0.44, 0.  ], dtype=float32)
    """
    if not weightings:
        raise ValueError("Expected at least one weighting, got none.")
    for weighting in weightings:
        require_weighting("weightings", weighting)

    def weights(of: ExampleStatistics) -> jax.Array:
        seen, total = of, jnp.ones_like(of.losses)
        for weighting in weightings:
            own = jnp.where(of.mask, _rows(weighting, seen), 0)
            largest = jnp.abs(own).max()
            own = own / jnp.where(largest == 0, 1, largest)
            total = total * own
            seen = _scaled(of, total)
        return of.mean_over(total)

    return NamedWeighting("compose", weightings, ", ".join(map(repr, weightings)), weights)


def _rows(weighting: Weighting, of: ExampleStatistics) -> jax.Array:
    weights = weighting(of)
    shapes = jax.tree.map(jnp.shape, weights)
    if shapes != of.losses.shape:
        raise ValueError(f"Expected weights of shape {of.losses.shape} from {weighting!r} in compose, got {shapes}.")
    return jnp.asarray(weights)


def _scaled(of: ExampleStatistics, factors: jax.Array) -> ExampleStatistics:
    """The statistics of the gradients factorᵢ gᵢ."""

    def alignments(weights: jax.Array | None = None) -> jax.Array:
        along = of.alignments(factors if weights is None else factors * weights)
        return jnp.where(factors == 0, 0, factors * along)

    square = jnp.square(factors)

    def scaled(sq_norms: jax.Array) -> jax.Array:
        return jnp.where(factors == 0, 0, square * sq_norms)

    return dataclasses.replace(
        of,
        sq_norms=scaled(of.sq_norms),
        tensor_sq_norms=jax.tree.map(scaled, of.tensor_sq_norms),
        alignments=alignments,
    )
