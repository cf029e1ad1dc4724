"""Coherence and its relatives: ratios of the sums in GradMoments."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax.moments import GradMoments


class Ratios(NamedTuple):
    """The ratios of S = Σ gᵢ and Q = Σ ‖gᵢ‖² over m examples; one record for each tensor in `Coherence.per_tensor`."""

    alpha: jax.Array  # ‖S‖² / (m Q), in [0, 1]
    m_coherence: jax.Array  # r = ‖S‖² / Q, in [0, m]
    alpha_unbiased: jax.Array  # (r − 1) / (m − 1), may be negative
    noise_scale: jax.Array  # (1 − α) / α
    noise_scale_unbiased: jax.Array  # (1 − u) / u with u = alpha_unbiased
    diversity: jax.Array  # Q / ‖S‖² = 1 / r
    mean_grad_norm: jax.Array  # ‖S‖ / m
    share: jax.Array  # f, the tensor's part of Q, so that α = Σ f α over the tensors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coherence:
    """How much the gradients gᵢ of m examples help each other; made by `cg_jax.coherence`.

    With S = Σ gᵢ and Q = Σ ‖gᵢ‖². All fields are scalars; α and r are NaN when all gradients are zero. The bounds hold
    to rounding. Never compare r across different m.
    """

    alpha: jax.Array
    """Coherence α = ‖S‖² / (m Q), in [0, 1]; 1/m for orthogonal gradients, 1 for equal ones."""
    m_coherence: jax.Array
    """r = m α, in [0, m]: how many examples of the sample one example's gradient helps; 1 for orthogonal gradients."""
    alpha_unbiased: jax.Array
    """(r − 1) / (m − 1), an estimate of the population's α; may be negative; NaN for m = 1."""
    noise_scale: jax.Array
    """Gradient noise scale tr(Σ) / ‖G‖² = (1 − α) / α, in examples (McCandlish et al. 2018, B_simple)."""
    noise_scale_unbiased: jax.Array
    """The noise scale of the unbiased α, in examples."""
    diversity: jax.Array
    """Gradient diversity Q / ‖S‖² = 1 / r (Yin et al. 2018)."""
    loss: jax.Array
    """Mean loss."""
    mean_grad_norm: jax.Array
    """‖S‖ / m, the norm of the mean gradient."""
    count: jax.Array
    """m, the number of examples that were measured."""
    num_skipped: jax.Array
    """Examples left out: their gradient was not finite, or (estimator "batch") they filled no whole batch."""
    alpha_stderr: jax.Array
    """Standard error of α; NaN unless it was asked for. What it is of, `measure_coherence` says for each estimator.
    That of r is m times it, that of alpha_unbiased m / (m − 1) times. There is none of single tensors."""
    per_tensor: dict[str, Ratios]
    """Path of each parameter tensor → its ratios; α = Σ share · α over the tensors."""

    def __str__(self) -> str:
        if _compat.is_tracer(self.alpha):  # has no digits yet
            return repr(self)
        error = "" if jnp.isnan(self.alpha_stderr) else f" ± {self.alpha_stderr:.2g}"
        return f"Coherence(α={self.alpha:.4g}{error}, r={self.m_coherence:.4g} of {self.count}, loss={self.loss:.4g})"


def _ratios(sq_norm_sum: jax.Array, sum_sq_norms: jax.Array, count: jax.Array, share: jax.Array) -> Ratios:
    """The ratios from ‖S‖², Q and m."""
    m = count.astype(sum_sq_norms.dtype)
    r = sq_norm_sum / sum_sq_norms
    alpha = r / m
    # r − 1 is not exactly 0 for one example, so that 0/0 alone would not say NaN.
    unbiased = jnp.where(count > 1, (r - 1) / jnp.where(count > 1, m - 1, 1), jnp.nan)
    return Ratios(
        alpha=alpha,
        m_coherence=r,
        alpha_unbiased=unbiased,
        noise_scale=(1 - alpha) / alpha,
        noise_scale_unbiased=(1 - unbiased) / unbiased,
        diversity=sum_sq_norms / sq_norm_sum,
        mean_grad_norm=jnp.sqrt(sq_norm_sum) / m,
        share=share,
    )


def coherence(moments: GradMoments, *, num_skipped: Any = 0) -> Coherence:
    """The coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of the examples that `moments` sums over, and what follows from it.

    Pure and jit-able. Per tensor too: α = Σ_l f_l α_l, where f_l = Q_l / Q is the tensor's share of Q.

    Args:
        moments: S and Q of m examples.
        num_skipped: Examples that were left out, handed on into the record.

    Returns:
        A `Coherence`. All gradients zero: α and r are NaN. m = 1: α = r = 1, the unbiased α is NaN. m = 0: NaN.

    References:
        Chatterjee & Zielinski, On the Generalization Mystery in Deep Learning, 2022, https://arxiv.org/abs/2203.10036.
        Chatterjee & Zielinski, Making Coherence Out of Nothing At All, 2020, https://arxiv.org/abs/2008.01217.

    Examples:
        >>> import jax, cg_jax as cg
        >>> moments = cg.grad_moments(lambda w, x: 0.5 * (w - x) ** 2)(0.0, jax.numpy.array([1.0, 4.0, 7.0]))
        >>> result = cg.coherence(moments)  # gᵢ = −1, −4, −7: ‖S‖² = 144, Q = 66
        >>> print(f"α = {result.alpha:.4f}, r = {result.m_coherence:.4f}")
        α = 0.7273, r = 2.1818
    """
    count = jnp.asarray(moments.count)
    names = trees.paths(moments.sum_grads)
    squares = jax.tree.leaves(trees.sq_norms(moments.sum_grads))
    norms = jax.tree.leaves(moments.sum_sq_norms)
    # The whole and the tensors in one vector: as scalars of their own, those of a deep network take minutes to compile.
    squares, norms = (jnp.stack(leaves) for leaves in (squares, norms))
    squares, norms = (jnp.append(values.sum(), values) for values in (squares, norms))
    ratios = jax.lax.optimization_barrier(_ratios(squares, norms, count, norms / norms[0]))
    whole, *parts = zip(*ratios, strict=True)
    whole, *parts = (Ratios(*values) for values in (whole, *parts))
    per_tensor = dict(zip(names, parts, strict=True))
    fields = whole._asdict()
    del fields["share"]
    return Coherence(
        **fields,
        loss=moments.sum_losses / count,
        count=count,
        num_skipped=jnp.asarray(num_skipped, jnp.int32),
        alpha_stderr=jnp.full_like(whole.alpha, jnp.nan),
        per_tensor=per_tensor,
    )
