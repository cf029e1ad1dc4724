"""The geometric median of the gradients of a batch, by Weiszfeld's iteration on inner products."""

import jax
import jax.numpy as jnp

from cg_jax import _validate
from cg_jax.weighting.base import ExampleStatistics, NamedWeighting, named, quantile


def geometric_median(iterations: int = 4) -> NamedWeighting:
    """The weights of the geometric median z = argmin Σ ‖gᵢ − z‖, after some iterations of Weiszfeld's method.

    The iteration begins at z = 0, whose distances are the norms, so that no example moves it without bound. Then, so
    many times as asked for,

        wᵢ ∝ 1/(ε + ‖gᵢ − z‖),  Σ wᵢ = 1,  z = Σ wᵢ gᵢ,  ‖gᵢ − z‖² = ‖gᵢ‖² − 2 gᵢ·z + ‖z‖²,

    where ε is a tenth of the median distance. No gradient is built: z is known by its weights, and an iteration costs
    two thirds of a plain gradient. Up to half of the examples cannot move the result without bound. If most gradients
    are equal, the result is that gradient. Masked examples do not count.

    Args:
        iterations: Iterations after the start, ≥ 0. With 0 the weights are ∝ 1/(ε + ‖gᵢ‖), from norms alone.

    Raises:
        ValueError: iterations < 0.

    References:
        Weiszfeld, 1937. As a robust aggregation: Pillutla, Kakade & Harchaoui, Robust Aggregation for Federated
        Learning, 2022, https://arxiv.org/abs/1912.13445.

    Examples:
        >>> import jax, cg_jax as cg
        >>> median = cg.weighted_grads(lambda w, x: -w * x, cg.geometric_median(20))
        >>> round(float(median(0.0, jax.numpy.array([1.0, 2.0, 3.0, 4.0, 1e6]))[0]), 1)
        -3.0
    """
    iterations = _validate.at_least("iterations", iterations, 0)

    def weights(of: ExampleStatistics) -> jax.Array:
        w = _weights(of, of.norms)
        for _ in range(iterations):
            along = of.alignments(w)
            inside = jnp.where(w == 0, 0, w * along).sum()  # ‖z‖²
            sq_distances = jnp.maximum(of.sq_norms - 2 * along + inside, 0)
            w = _weights(of, jnp.sqrt(jnp.where(jnp.isinf(of.sq_norms), jnp.inf, sq_distances)))
        return w

    return named("geometric_median", weights, {"iterations": iterations})


def _weights(of: ExampleStatistics, distances: jax.Array) -> jax.Array:
    """∝ 1/(ε + distance). If ε is zero, most examples are at distance zero, and share all of the weight."""
    epsilon = quantile(distances, of.mask, 0.5) / 10
    far = jnp.where(epsilon == 0, 1, epsilon + distances)
    return of.mean_over(jnp.where(epsilon == 0, (distances == 0).astype(distances.dtype), 1 / far))
