"""Coordinate-wise rules, which reduce k values of every coordinate to one.

A rule is a function [k, *shape] → [*shape]. Up to `_NETWORK_LIMIT` values, the median and its relatives are a network
of minima and maxima (Batcher's merge exchange, reduced to the needed outputs). This is elementwise work, which
compilers fuse and accelerators run at memory speed; a sort is not. Sums are unrolled too: a reduction over the leading
axis of a large array is several times slower on a CPU.

Every rule is finite if its values are. Sums that would leave the range of the dtype use scaled values.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _validate, trees

Rule = Callable[[jax.Array], jax.Array]

_NETWORK_LIMIT = 16
_UNROLL_LIMIT = 64


class _NotATransformationError(TypeError, AttributeError):
    """A TypeError for the user that is also an AttributeError, for `hasattr`."""


@dataclass(frozen=True)
class _NamedRule:
    """A rule with the name and the number of its factory. Rules with equal name and number are equal."""

    name: str
    number: int | None
    function: Rule = field(compare=False)

    def __call__(self, values: jax.Array) -> jax.Array:
        """function(values)."""
        return self.function(values)

    def __repr__(self) -> str:
        return f"cg_jax.{self.name}({'' if self.number is None else self.number})"

    def __getattr__(self, name: str) -> Any:
        """Raise for `init` and `update`, which optax.chain asks for."""
        if name in ("init", "update"):
            raise _NotATransformationError(
                f"Expected an optax transformation, got the rule {self!r}; wrap it: cg_jax.stacked({self!r})."
            )
        raise AttributeError(f"A rule has no attribute {name!r}.")


def require_rule(rule: Any) -> None:
    """TypeError unless `rule` is a function. cg_jax.median and its like are factories of rules, not rules."""
    if rule in (mean, median, trimmed_mean, winsorized_mean):
        raise TypeError(f"Expected a rule, as cg_jax.{rule.__name__}(…) makes it, got cg_jax.{rule.__name__} itself.")
    _validate.function("rule", rule)


def applied(rule: Rule, values: jax.Array) -> jax.Array:
    """rule(values). ValueError unless it turns [k, *shape] into [*shape]."""
    out = rule(values)
    if jnp.shape(out) != jnp.shape(values)[1:]:
        raise ValueError(
            "Expected a coordinate-wise rule, [k, *shape] → [*shape], got one that makes shape "
            f"{list(jnp.shape(out))} of {list(jnp.shape(values))}."
        )
    return out


@functools.cache
def _merge_exchange(n: int) -> tuple[tuple[int, int], ...]:
    """Comparators (i, j), i < j, that sort n wires in ascending order (Knuth, TAOCP vol. 3, 5.2.2 M, mirrored)."""
    comparators = []
    top = 1 << max(n - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            comparators += [(n - 1 - i - d, n - 1 - i) for i in range(n - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return tuple(comparators)


@functools.cache
def _network(n: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """(i, j, minimum needed, maximum needed) of the comparators that the wanted wires of the sorted order need."""
    needed, kept = set(wanted), []
    for i, j in reversed(_merge_exchange(n)):
        if i in needed or j in needed:
            kept.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return tuple(reversed(kept))


def _order_statistics(values: jax.Array, wanted: Sequence[int]) -> list[jax.Array]:
    """The wanted order statistics of the k values of each coordinate. NaN if any of the k values is."""
    k = values.shape[0]
    if k > _NETWORK_LIMIT:
        ordered = jnp.sort(values, axis=0)  # NaN last
        spoilt = jnp.isnan(ordered[-1])
        return [jnp.where(spoilt, jnp.nan, ordered[i]) for i in wanted]
    wires = [values[i] for i in range(k)]
    for i, j, low, high in _network(k, tuple(wanted)):
        a, b = wires[i], wires[j]
        wires[i], wires[j] = jnp.minimum(a, b) if low else a, jnp.maximum(a, b) if high else b
    return [wires[i] for i in wanted]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """(low + high)/2, or low/2 + high/2 if the sum could overflow. The bits are the same except for the overflow."""
    large = jnp.maximum(jnp.abs(low), jnp.abs(high)) > jnp.finfo(low.dtype).max / 2
    low, high = (jnp.where(large, each / 2, each) for each in (low, high))
    return jnp.where(large, low + high, (low + high) / 2)


def _in_range(mean: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], peak: jax.Array, k: int) -> jax.Array:
    """mean(fit), a mean of k values fit(x) of absolute value <= `peak` in the accumulator dtype, as peak's dtype.

    `fit` widens a value. If a sum of k values could leave the range of the accumulator, it also scales by a power of
    two, which is undone here. The mean is then clipped to ±peak, since rounding could carry it past the largest number.
    """
    dtype, wide = peak.dtype, trees.accumulator_dtype(peak.dtype)
    if float(jnp.finfo(dtype).max) * k < float(jnp.finfo(wide).max):
        return mean(lambda value: value.astype(wide)).astype(dtype)
    peak, scale = peak.astype(wide), 0.5 ** (k - 1).bit_length()
    large = peak > jnp.finfo(wide).max * scale
    plain = mean(lambda value: jnp.where(large, value.astype(wide) * scale, value.astype(wide)))
    restored = jnp.clip(plain, -peak * scale, peak * scale) / scale
    return jnp.where(large, restored, plain).astype(dtype)


def _sum(values: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, values)


def _ordered_mean(ordered: Sequence[jax.Array], clip: int = 0) -> jax.Array:
    """The mean of values in ascending order. The first and the last count `clip` more times."""
    k = len(ordered) + 2 * clip

    def mean(fit: Callable[[jax.Array], jax.Array]) -> jax.Array:
        values = [fit(value) for value in ordered]
        ends = [clip * (values[0] + values[-1])] if clip else []
        return _sum([*values, *ends]) / k

    return _in_range(mean, jnp.maximum(jnp.abs(ordered[0]), jnp.abs(ordered[-1])), k)


def _checked(values: jax.Array, name: str = "", number: int = 0) -> jax.Array:
    """`values` as an array of k ≥ 1 rows. ValueError unless `number` < k/2."""
    values = jnp.asarray(values)
    if values.ndim == 0 or values.shape[0] < 1:
        raise ValueError(f"Expected values of shape [k, *shape] with k >= 1, got shape {list(values.shape)}.")
    if not trees.is_differentiable(values):
        raise ValueError(f"Expected values of a floating dtype, got dtype {values.dtype}.")
    if 2 * number >= values.shape[0]:
        raise ValueError(f"Expected {name} < k/2, got {name}={number} and k={values.shape[0]}.")
    return values


def mean() -> Rule:
    """The rule (1/k) Σⱼ xⱼ, coordinate by coordinate. Narrower dtypes are summed in float32.

    Returns:
        A function [k, *shape] → [*shape] of the same dtype.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.mean()(jax.numpy.array([[1.0, -5.0], [4.0, 2.0], [7.0, 0.0]]))
        Array([ 4., -1.], dtype=float32)
    """

    def rule(values: jax.Array) -> jax.Array:
        values = _checked(values)
        k = values.shape[0]
        if k > _UNROLL_LIMIT:
            peak = jnp.abs(values).max(0)
        else:
            peak = functools.reduce(jnp.maximum, [jnp.abs(value) for value in values])
        if k > _NETWORK_LIMIT:
            return _in_range(lambda fit: jax.vmap(fit)(values).mean(0), peak, k)
        return _in_range(lambda fit: _sum([fit(value) for value in values]) / k, peak, k)

    return _NamedRule("mean", None, rule)


def median() -> Rule:
    """The rule that takes the middle of the k values of each coordinate, or (a + b)/2 of the middle two for even k.

    For k = 3 it is max(min(a, b), min(max(a, b), c)), without a sort. Up to 16 values it is a similar network of minima
    and maxima. The result is NaN if any of the k values is, as in `jax.numpy.median`.

    Returns:
        A function [k, *shape] → [*shape] of the same dtype.

    References:
        As a robust average of mini-batch gradients: Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient
        Directions, 2020, https://arxiv.org/abs/2003.07422.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.median()(jax.numpy.array([[1.0, -5.0], [4.0, 2.0], [7.0, 0.0]]))
        Array([4., 0.], dtype=float32)
    """

    def rule(values: jax.Array) -> jax.Array:
        values = _checked(values)
        k = values.shape[0]
        if k % 2:
            return _order_statistics(values, [k // 2])[0]
        low, high = _order_statistics(values, [k // 2 - 1, k // 2])
        return _middle(low, high)

    return _NamedRule("median", None, rule)


def trimmed_mean(trim: int) -> Rule:
    """The rule that drops the `trim` smallest and largest values of each coordinate and averages the remainder.

    With x₍₁₎ ≤ … ≤ x₍ₖ₎: Σ x₍ⱼ₎ over trim < j ≤ k − trim, divided by k − 2 trim. NaN if any of the k values is.

    Args:
        trim: Number of values dropped on each side, 0 ≤ trim < k/2.

    Returns:
        A function [k, *shape] → [*shape] of the same dtype.

    Raises:
        ValueError: trim < 0. When called: trim ≥ k/2.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.trimmed_mean(1)(jax.numpy.array([1.0, 2.0, 4.0, 90.0]))
        Array(3., dtype=float32)
    """
    trim = _validate.at_least("trim", trim, 0)

    def rule(values: jax.Array) -> jax.Array:
        values = _checked(values, "trim", trim)
        k = values.shape[0]
        return _ordered_mean(_order_statistics(values, range(trim, k - trim)))

    return _NamedRule("trimmed_mean", trim, rule)


def winsorized_mean(clip: int) -> Rule:
    """The rule that moves the `clip` smallest and largest values of each coordinate to their neighbours, and averages.

    With x₍₁₎ ≤ … ≤ x₍ₖ₎: (clip · x₍clip+1₎ + Σ x₍ⱼ₎ over clip < j ≤ k − clip + clip · x₍k−clip₎) / k. NaN if any of
    the k values is.

    Args:
        clip: Number of values moved on each side, 0 ≤ clip < k/2.

    Returns:
        A function [k, *shape] → [*shape] of the same dtype.

    Raises:
        ValueError: clip < 0. When called: clip ≥ k/2.

    References:
        Chatterjee, Coherent Gradients, 2020, https://arxiv.org/abs/2002.10657.

    Examples:
        >>> import jax, cg_jax as cg
        >>> cg.winsorized_mean(1)(jax.numpy.array([1.0, 2.0, 4.0, 90.0]))
        Array(3., dtype=float32)
    """
    clip = _validate.at_least("clip", clip, 0)

    def rule(values: jax.Array) -> jax.Array:
        values = _checked(values, "clip", clip)
        k = values.shape[0]
        return _ordered_mean(_order_statistics(values, range(clip, k - clip)), clip)

    return _NamedRule("winsorized_mean", clip, rule)
