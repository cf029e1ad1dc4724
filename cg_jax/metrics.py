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

# What alpha_stderr is until it is asked for.
_NOT_ASKED_FOR = np.float32(np.nan)


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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Coherence:
    """How much the gradients gᵢ of m examples help each other; made by `cg_jax.coherence`.

    With S = Σ gᵢ and Q = Σ ‖gᵢ‖². All fields are scalars; α and r are NaN when all gradients are zero. The bounds hold
    to rounding. Never compare r across different m. A pytree, whose leaves are the fields; not alpha_stderr unless it
    was asked for, since `jax.debug_nans` would stop at its NaN in the result of a jitted function.
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
    alpha_stderr: jax.Array | np.floating
    """Standard error of α; NaN unless it was asked for. What it is of, `measure_coherence` says for each estimator.
    That of r is m times it, that of alpha_unbiased m / (m − 1) times. There is none of single tensors."""
    per_tensor: dict[str, Ratios]
    """Path of each parameter tensor → its ratios, in the order of the parameters' leaves; α = Σ share · α over them.
    Keys are joined by "/"; one that holds a "/" itself is quoted, and no two tensors share a name."""

    def __str__(self) -> str:
        if _compat.is_tracer(self.alpha):  # has no digits yet
            return repr(self)
        shown = (self.alpha, self.m_coherence, self.loss, self.count, self.alpha_stderr)
        alpha, r, loss, count, error = jax.device_get(shown)
        error = "" if np.isnan(error) else f" ± {error:.2g}"
        return f"Coherence(α={alpha:.4g}{error}, r={r:.4g} of {count}, loss={loss:.4g})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """(every field under its name, nothing); None for a standard error that was not asked for."""
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
    """While it is open, `jax.debug_nans` and `jax.debug_infs` let results through: 0/0 and 1/0 are answers here."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def _ratios(
    sq_norm_sum: jax.Array, scale: jax.Array, sum_sq_norms: jax.Array, count: jax.Array, share: jax.Array
) -> Ratios:
    """The ratios from ‖scale · S‖², Q and m; the scale is a power of two."""
    m = count.astype(sum_sq_norms.dtype)
    r = sq_norm_sum / sum_sq_norms / scale**2
    alpha = r / m
    # r − 1 is not exactly 0 for one example, so that 0/0 alone would not say NaN.
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
    """The coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of the examples that `moments` sums over, and what follows from it.

    Pure and jit-able. Per tensor too: α = Σ_l f_l α_l, where f_l = Q_l / Q is the tensor's share of Q.

    Args:
        moments: S and Q of m examples.
        num_skipped: Examples that were left out, handed on into the record.

    Returns:
        A `Coherence`. All gradients zero: α and r are NaN. m = 1: α = r = 1, the unbiased α is NaN. m = 0: NaN. Under
        `jax.debug_nans` these raise nothing, but where a jitted function of yours returns one.

    Raises:
        TypeError: moments is no GradMoments.
        ValueError: There is no tensor in it.

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
    # Put there explicitly, as transfer guards want it.
    skipped = num_skipped if isinstance(num_skipped, jax.Array) else jax.device_put(np.int32(num_skipped))
    with undefined_ratios():
        return dataclasses.replace(_coherence(moments), num_skipped=skipped.astype(jnp.int32))


def _scale(count: jax.Array, sum_sq_norms: Any) -> jax.Array:
    """A power of two times which ‖S‖² ≤ m Q stays in range wherever Q does; 1 where nothing is near its end."""
    norms = jnp.stack([leaf.astype(jnp.float32) for leaf in jax.tree.leaves(sum_sq_norms)])
    is_large = norms.max() > 1e30 / count.astype(jnp.float32)
    # A branch is computed once, and not again with every tensor, as a value would be.
    return jax.lax.cond(is_large, lambda: jnp.float32(2.0**-50), lambda: jnp.float32(1))


@jax.jit
def _coherence(moments: GradMoments) -> Coherence:
    count = jnp.asarray(moments.count)
    names = trees.paths(moments.sum_grads)
    scale = _scale(count, moments.sum_sq_norms)
    squares = jax.tree.leaves(trees.sq_norms(jax.tree.map(lambda s: s * scale.astype(s.dtype), moments.sum_grads)))
    norms = jax.tree.leaves(moments.sum_sq_norms)
    # The whole and the tensors in one vector: as scalars of their own, those of a deep network take minutes to compile.
    widest = jnp.result_type(*(leaf.dtype for leaf in (*squares, *norms)), jnp.float32)
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
