"""Coherence and its relatives: ratios of the sums in GradMoments."""

import collections
import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat, trees
from cg_jax.moments import GradMoments, require_moments

# The value of alpha_stderr unless it is requested.
_NOT_ASKED_FOR = np.float32(np.nan)


class Ratios(NamedTuple):
    """The ratios of S = Σ gᵢ and Q = Σ ‖gᵢ‖² over m examples. `Coherence.per_tensor` has one record per tensor."""

    alpha: jax.Array  # ‖S‖² / (m Q), in [0, 1]
    m_coherence: jax.Array  # r = ‖S‖² / Q, in [0, m]
    alpha_unbiased: jax.Array  # (r − 1) / (m − 1), may be negative
    noise_scale: jax.Array  # (1 − α) / α
    noise_scale_unbiased: jax.Array  # (1 − u) / u with u = alpha_unbiased
    diversity: jax.Array  # Q / ‖S‖² = 1 / r
    mean_grad_norm: jax.Array  # ‖S‖ / m
    share: jax.Array  # f, the tensor's part of Q, so that α = Σ f α over the tensors


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Coherence:
    """How much the gradients gᵢ of m examples help each other. Returned by `cg_jax.coherence`.

    S = Σ gᵢ and Q = Σ ‖gᵢ‖². All fields are scalars. α and r are NaN if all gradients are zero. The bounds hold up to
    rounding. Never compare r across different m. The class is a pytree whose leaves are the fields. alpha_stderr is a
    leaf only if requested, since `jax.debug_nans` would stop at its NaN in the result of a jitted function.
    """

    alpha: jax.Array
    """Coherence α = ‖S‖² / (m Q), in [0, 1]: 1/m for orthogonal gradients, 1 for equal ones."""
    m_coherence: jax.Array
    """r = m α, in [0, m]: the number of sampled examples that one gradient helps; 1 for orthogonal gradients."""
    alpha_unbiased: jax.Array
    """(r − 1) / (m − 1), an estimate of the population's α. It may be negative, and is NaN for m = 1."""
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
    """m, the number of examples measured."""
    num_skipped: jax.Array
    """Examples skipped: their gradient is non-finite, or (estimator "batch") they do not fill a whole batch."""
    alpha_stderr: jax.Array | np.floating
    """Standard error of α, NaN unless requested. `measure_coherence` defines it for each estimator. That of r is
    m times it, that of alpha_unbiased m / (m − 1) times. There is none for single tensors."""
    per_tensor: dict[str, Ratios]
    """Path of each parameter tensor → its ratios, in the order of the parameters' leaves. α = Σ share · α over them.
    Keys are joined by "/". A key that contains a "/" is quoted. No two tensors share a name."""

    def __str__(self) -> str:
        if _compat.is_tracer(self.alpha):  # it has no value yet
            return repr(self)
        shown = (self.alpha, self.m_coherence, self.loss, self.count, self.alpha_stderr)
        alpha, r, loss, count, error = jax.device_get(shown)
        error = "" if np.isnan(error) else f" ± {error:.2g}"
        return f"Coherence(α={alpha:.4g}{error}, r={r:.4g} of {count}, loss={loss:.4g})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """(every field under its name, None). A standard error that was not requested is None."""
        values = {name: getattr(self, name) for name in _FIELDS}
        if isinstance(self.per_tensor, dict):  # JAX sorts the keys of a dict
            values["per_tensor"] = collections.OrderedDict(self.per_tensor)
        if self.alpha_stderr is _NOT_ASKED_FOR:
            values["alpha_stderr"] = None
        return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in values.items()), None

    @classmethod
    def tree_unflatten(cls, _: None, values: Any) -> "Coherence":
        """Inverse of `tree_flatten_with_keys`."""
        fields = dict(zip(_FIELDS, values, strict=True))
        if isinstance(fields["per_tensor"], dict):
            fields["per_tensor"] = dict(fields["per_tensor"])
        if fields["alpha_stderr"] is None:
            fields["alpha_stderr"] = _NOT_ASKED_FOR
        return cls(**fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(Coherence))


@contextlib.contextmanager
def undefined_ratios() -> Generator[None]:
    """A context in which `jax.debug_nans` and `jax.debug_infs` are off, since 0/0 and 1/0 are valid results here."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def _ratios(
    sq_norm_sum: jax.Array, scale: jax.Array, sum_sq_norms: jax.Array, count: jax.Array, share: jax.Array
) -> Ratios:
    """The ratios from ‖scale · S‖², Q and m. The scale is a power of two."""
    m = count.astype(sum_sq_norms.dtype)
    r = sq_norm_sum / sum_sq_norms / scale**2
    alpha = r / m
    # r − 1 is not exactly 0 for one example, so 0/0 alone would not give NaN.
    unbiased = jnp.where(count > 1, (r - 1) / jnp.where(count > 1, m - 1, 1), jnp.nan)
    return Ratios(
        alpha=alpha,
        m_coherence=r,
        alpha_unbiased=unbiased,
        noise_scale=(1 - alpha) / alpha,
        noise_scale_unbiased=(1 - unbiased) / unbiased,
        diversity=sum_sq_norms / sq_norm_sum * scale**2,
        mean_grad_norm=jnp.sqrt(sq_norm_sum) / scale / m,
        share=share,
    )


def coherence(moments: GradMoments, *, num_skipped: Any = 0) -> Coherence:
    """The coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of the examples that `moments` sums over, and the ratios derived from it.

    The function is pure and jit-able. It also gives the ratios of each tensor: α = Σ_l f_l α_l, where f_l = Q_l / Q is
    the tensor's share of Q.

    Args:
        moments: S and Q of m examples.
        num_skipped: The number of skipped examples, copied into the result.

    Returns:
        A `Coherence`. If all gradients are zero, α and r are NaN. For m = 1, α = r = 1 and the unbiased α is NaN. For
        m = 0 all are NaN. Under `jax.debug_nans` these raise only if your own jitted function returns one.

    Raises:
        TypeError: moments is not a GradMoments.
        ValueError: moments holds no tensor.

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
    require_moments("moments", moments)
    if not jax.tree.leaves(moments.sum_grads):
        raise ValueError("Expected moments of at least one tensor, got none.")
    # An explicit transfer, as transfer guards require.
    skipped = num_skipped if isinstance(num_skipped, jax.Array) else jax.device_put(np.int32(num_skipped))
    with undefined_ratios():
        return dataclasses.replace(_coherence(moments), num_skipped=skipped.astype(jnp.int32))


def _scale(count: jax.Array, sum_sq_norms: Any) -> jax.Array:
    """A power of two that keeps ‖scale · S‖² in range wherever Q is in range. 1 if nothing is near the limit."""
    norms = jnp.stack([leaf.astype(jnp.float32) for leaf in jax.tree.leaves(sum_sq_norms)])
    is_large = norms.max() > 1e30 / count.astype(jnp.float32)
    # A branch is computed once. A value would be recomputed with every tensor.
    return jax.lax.cond(is_large, lambda: jnp.float32(2.0**-50), lambda: jnp.float32(1))


@jax.jit
def _coherence(moments: GradMoments) -> Coherence:
    count = jnp.asarray(moments.count)
    names = trees.paths(moments.sum_grads)
    scale = _scale(count, moments.sum_sq_norms)
    squares = jax.tree.leaves(trees.sq_norms(jax.tree.map(lambda s: s * scale.astype(s.dtype), moments.sum_grads)))
    norms = jax.tree.leaves(moments.sum_sq_norms)
    # The whole and the tensors share one vector. Separate scalars of a deep network take minutes to compile.
    # Not by promotion, which JAX may be told to refuse.
    dtypes = [jnp.dtype(jnp.float32), *(leaf.dtype for leaf in (*squares, *norms))]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    squares, norms = (jnp.stack([leaf.astype(widest) for leaf in leaves]) for leaves in (squares, norms))
    squares, norms = (jnp.append(values.sum(), values) for values in (squares, norms))
    ratios = jax.lax.optimization_barrier(_ratios(squares, scale.astype(squares.dtype), norms, count, norms / norms[0]))
    whole, *parts = zip(*ratios, strict=True)
    whole, *parts = (Ratios(*values) for values in (whole, *parts))
    fields = whole._asdict()
    del fields["share"]
    return Coherence(
        **fields,
        loss=moments.sum_losses / count.astype(moments.sum_losses.dtype),
        count=count,
        num_skipped=jnp.zeros((), jnp.int32),
        alpha_stderr=_NOT_ASKED_FOR,
        per_tensor=dict(zip(names, parts, strict=True)),
    )
