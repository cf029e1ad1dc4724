"""Weightings that keep a share of the examples: those that agree, or those of small loss."""

import jax
import jax.numpy as jnp

from cg_jax.weighting.base import ExampleStatistics, NamedWeighting, first_of, named, ratio, share_of

# In units of the last place: differences of two long sums below it are rounding.
_ROUNDING = 32


def agreement(share: float) -> NamedWeighting:
    """The weighting 1/n for the n = ⌈share · B⌉ examples that agree best with the others, else 0.

    An example agrees by the component of its own direction in the sum of the others' gradients, with S = Σ gᵢ,

        aᵢ = gᵢ · (S − gᵢ) / ‖gᵢ‖ = (gᵢ · S − ‖gᵢ‖²) / ‖gᵢ‖,

    and aᵢ = 0 for a zero gradient, and where the difference is only rounding, as for gradients that are orthogonal to
    all others. Ties are broken by the position in the batch. Masked examples do not count.

    Args:
        share: 0 < share ≤ 1. With share = 1 the result is the mean.

    Raises:
        ValueError: share outside (0, 1].

    References:
        The theory asks for what examples have in common: Chatterjee & Zielinski, On the Generalization Mystery in Deep
        Learning, 2022, https://arxiv.org/abs/2203.10036.

    Examples:
        >>> import jax, cg_jax as cg
        >>> agreed = cg.weighted_grads(lambda w, x: -w * x, cg.agreement(0.75))
        >>> grads, info = agreed(0.0, jax.numpy.array([1.0, 4.0, -7.0, 9.0]))
        >>> info.weights
        Array([0.33333334, 0.33333334, 0.        , 0.33333334], dtype=float32)
    """
    share = share_of("share", share)

    def weights(of: ExampleStatistics) -> jax.Array:
        with_all = of.alignments()
        inner = with_all - of.sq_norms
        rounding = _ROUNDING * jnp.finfo(inner.dtype).eps * (jnp.abs(with_all) + of.sq_norms)
        scores = jnp.where(jnp.abs(inner) <= rounding, 0, ratio(inner, of.norms))
        return first_of(-scores, of.mask, share)

    return named("agreement", weights, {"share": share})


def trim_loss(share: float) -> NamedWeighting:
    """The weighting 1/n for the n = ⌈share · B⌉ examples of smallest loss, else 0.

    Ties are broken by the position in the batch. Masked examples do not count.

    Args:
        share: 0 < share ≤ 1. With share = 1 the result is the mean.

    Raises:
        ValueError: share outside (0, 1].

    References:
        Shen & Sanghavi, Learning with Bad Training Data via Iterative Trimmed Loss Minimization, 2019,
        https://arxiv.org/abs/1810.11874.

    Examples:
        >>> import jax, cg_jax as cg
        >>> trimmed = cg.weighted_grads(lambda w, x: 0.5 * (w - x) ** 2, cg.trim_loss(0.5))
        >>> float(trimmed(0.0, jax.numpy.array([1.0, 4.0, 7.0]))[0])
        -2.5
    """
    share = share_of("share", share)

    def weights(of: ExampleStatistics) -> jax.Array:
        return first_of(of.losses, of.mask, share)

    return named("trim_loss", weights, {"share": share})
