"""Coordinate-wise rules, which reduce k values of every coordinate to one.

A rule is a function [k, *shape] → [*shape]. The median and its relatives are elementwise work, networks of minima and
maxima (`order_statistics`), which compilers fuse and accelerators run at memory speed; a sort is not. Sums are unrolled
too: a reduction over the leading axis of a large array is several times slower on a CPU.

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
from cg_jax.order_statistics import NETWORK_LIMIT, ends_by_insertion, inserts, order_statistics, row_sum, sum_between

Rule = Callable[[jax.Array], jax.Array]


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
    if type(rule).__module__.startswith("cg_jax.weighting"):
        raise TypeError(f"Expected a coordinate-wise rule, got the weighting {rule!r}; pass it to weighted_grads.")
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
    return _restored(mean(_fit(peak, k)), peak, k)


def _fit(peak: jax.Array, k: int) -> Callable[[jax.Array], jax.Array]:
    """The function `fit` of `_in_range`."""
    wide, factor = trees.accumulator_dtype(peak.dtype), _factor(peak, k)
    return lambda value: value.astype(wide) if factor is None else value.astype(wide) * factor


def _factor(peak: jax.Array, k: int) -> jax.Array | None:
    """A power of two by which k values up to `peak` are scaled, or 1. None if no sum can leave the range."""
    wide = trees.accumulator_dtype(peak.dtype)
    if float(jnp.finfo(peak.dtype).max) * k < float(jnp.finfo(wide).max):
        return None
    scale = 0.5 ** (k - 1).bit_length()
    return jnp.where(peak.astype(wide) > jnp.finfo(wide).max * scale, scale, 1).astype(wide)


def _restored(mean: jax.Array, peak: jax.Array, k: int) -> jax.Array:
    """A mean of fitted values as peak's dtype."""
    if (factor := _factor(peak, k)) is None:
        return mean.astype(peak.dtype)
    bound = peak.astype(mean.dtype) * factor
    return jnp.where(factor < 1, jnp.clip(mean, -bound, bound) / factor, mean).astype(peak.dtype)


def _ordered_mean(ordered: Sequence[jax.Array], clip: int = 0) -> jax.Array:
    """The mean of values in ascending order. The first and the last count `clip` more times."""
    k = len(ordered) + 2 * clip

    def mean(fit: Callable[[jax.Array], jax.Array]) -> jax.Array:
        values = [fit(value) for value in ordered]
        ends = [clip * (values[0] + values[-1])] if clip else []
        return functools.reduce(operator.add, [*values, *ends]) / k

    return _in_range(mean, _largest(ordered[0], ordered[-1]), k)


def _largest(low: jax.Array, high: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.abs(low), jnp.abs(high))


def _median(values: jax.Array) -> jax.Array:
    k = values.shape[0]
    if k % 2:
        return order_statistics(values, [k // 2])[0]
    return _middle(*order_statistics(values, [k // 2 - 1, k // 2]))


_median_of_many = jax.jit(_median)


@functools.partial(jax.jit, static_argnums=1)
def _trimmed_mean(values: jax.Array, trim: int) -> jax.Array:
    """The mean of the values between two order statistics, and of as many of their ties as remain."""
    k = values.shape[0]

    def term(row: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        below = row <= low
        above = (row >= high) & ~below
        kept = _fit(_largest(low, high), k)(jnp.where(below | above, 0, row))
        return kept, below.astype(kept.dtype), above.astype(kept.dtype)

    (inner, below, above), low, high = sum_between(term, values, trim)
    peak = _largest(low, high)
    fit = _fit(peak, k)
    total = inner + (below - trim) * fit(low) + (above - trim) * fit(high)
    equal = jnp.where(jnp.isnan(inner), jnp.nan, low)
    return jnp.where(low == high, equal, _restored(total / (k - 2 * trim), peak, k))


@functools.partial(jax.jit, static_argnums=1)
def _winsorized_mean(values: jax.Array, clip: int) -> jax.Array:
    """The mean of the values, clipped to two order statistics."""
    k = values.shape[0]
    if inserts(k, clip):
        (inner, scaled, spoilt), low, high = ends_by_insertion(values, clip, 0.5 ** (k - 1).bit_length())
        factor, fit = _factor(peak := _largest(low, high), k), _fit(peak, k)
        inner = inner if factor is None else jnp.where(factor < 1, scaled, inner)
        total = inner + (clip + 1) * (fit(low) + fit(high))
        return jnp.where(spoilt, jnp.nan, _restored(total / k, peak, k))

    def term(row: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return _fit(_largest(low, high), k)(jnp.where(row < low, low, jnp.where(row > high, high, row)))

    total, low, high = sum_between(term, values, clip)
    return _restored(total / k, _largest(low, high), k)


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
        peak = row_sum(jnp.abs, values, jnp.maximum)
        return _in_range(lambda fit: row_sum(fit, values) / k, peak, k)

    return _NamedRule("mean", None, rule)


def median() -> Rule:
    """The rule that takes the middle of the k values of each coordinate, or (a + b)/2 of the middle two for even k.

    For k = 3 it is max(min(a, b), min(max(a, b), c)), without a sort. Other k take a similar network of minima and
    maxima. The result is NaN if any of the k values is, as in `jax.numpy.median`.

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
        return (_median_of_many if values.shape[0] > NETWORK_LIMIT else _median)(values)

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
        if k > NETWORK_LIMIT:
            return _trimmed_mean(values, trim)
        return _ordered_mean(order_statistics(values, range(trim, k - trim)))

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
        if k > NETWORK_LIMIT:
            return _winsorized_mean(values, clip)
        return _ordered_mean(order_statistics(values, range(clip, k - clip)), clip)

    return _NamedRule("winsorized_mean", clip, rule)
