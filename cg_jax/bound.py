"""Theorem 1 of the Coherent Gradients theory: coherence during training bounds the generalisation gap."""

import numpy as np
from numpy.typing import ArrayLike

from cg_jax import _validate


def _finite(name: str, value: float, bound: float) -> float:
    """`value` as a float, or ValueError unless it is finite and ≥ bound."""
    number = float(value)
    if not (np.isfinite(number) and number >= bound):
        raise ValueError(f"Expected {name} to be finite and >= {bound}, got {name}={value}.")
    return number


def generalization_bound(
    alphas: ArrayLike, learning_rates: ArrayLike, *, lipschitz: float, smoothness: float, num_examples: int
) -> float:
    """(L²/m) Σ_t [Π_{k>t} (1 + η_k β)] η_t √(2 (1 − α_t)), a bound on |expected test loss − expected training loss|.

    The bound holds after T steps of full-batch gradient descent with step sizes η_t on m examples, for losses that are
    L-Lipschitz and β-smooth in the parameters. α_t is the population's coherence at the weights before step t. It is
    computed in log space and in float64. The bound is far from tight for networks. Use its shape (early steps weigh
    most, coherent steps cost nothing), not its value.

    Args:
        alphas: α_t, [T], each in [0, 1] up to rounding. `Coherence.alpha_unbiased`, clipped to [0, 1], estimates it.
        learning_rates: η_t ≥ 0, [T] or one number for all steps.
        lipschitz: L ≥ 0, in units of loss per unit of parameter.
        smoothness: β ≥ 0.
        num_examples: m ≥ 1.

    Returns:
        The bound, in units of the loss. It is inf if it exceeds the range of float64.

    Raises:
        ValueError: An argument is outside its range, or learning_rates and alphas differ in length.

    References:
        Theorem 1 of Chatterjee & Zielinski, On the Generalization Mystery in Deep Learning, 2022,
        https://arxiv.org/abs/2203.10036.

    Examples:
        >>> import cg_jax as cg
        >>> round(cg.generalization_bound([0.5, 0.5], 0.1, lipschitz=1.0, smoothness=1.0, num_examples=10), 6)
        0.021
    """
    alpha = np.asarray(alphas, np.float64)
    if alpha.ndim != 1 or alpha.size < 1:
        raise ValueError(f"Expected alphas of shape [T] with T >= 1, got shape {list(alpha.shape)}.")
    if not ((alpha >= -1e-6) & (alpha <= 1 + 1e-6)).all():
        raise ValueError(f"Expected every value of alphas in [0, 1], got alphas from {alpha.min()} to {alpha.max()}.")
    eta = np.asarray(learning_rates, np.float64)
    if eta.shape not in ((), alpha.shape):
        raise ValueError(f"Expected learning_rates of shape [] or [{alpha.size}], got shape {list(eta.shape)}.")
    eta = np.broadcast_to(eta, alpha.shape)
    if not (np.isfinite(eta) & (eta >= 0)).all():
        raise ValueError(f"Expected learning_rates to be finite and >= 0, got values from {eta.min()} to {eta.max()}.")
    lipschitz, beta = _finite("lipschitz", lipschitz, 0), _finite("smoothness", smoothness, 0)
    m = _validate.at_least("num_examples", num_examples, 1)

    growth = np.log1p(eta * beta)
    later = growth[::-1].cumsum()[::-1] - growth  # Σ_{k>t} log(1 + η_k β)
    with np.errstate(divide="ignore", over="ignore"):
        terms = later + np.log(eta) + 0.5 * np.log(2 * np.clip(1 - alpha, 0, 1))
        return float(np.exp(np.logaddexp.reduce(terms) + 2 * np.log(lipschitz) - np.log(m)))
