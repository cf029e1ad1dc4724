"""Weightings: functions from the statistics of a batch to a weight of every example."""

import dataclasses
import math
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _validate
from cg_jax._types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleStatistics:
    """What a weighting sees of the gradients gᵢ of a batch of B examples. It never sees the gradients.

    Inside `jax.shard_map` with an axis name, B counts the examples of all devices.

    Attributes:
        losses: ℓᵢ, [B], float32 (float64 if the parameters are). Zero where mask is False.
        sq_norms: ‖gᵢ‖² of the whole gradient, [B]. Zero where mask is False.
        tensor_sq_norms: ‖gᵢ‖² of each tensor, a pytree like params of [B], with None for integer leaves.
        mask: Boolean [B]. Examples where it is False do not count: they are masked, or left out as non-finite.
        alignments: alignments(weights [B]) → gᵢ · Σⱼ wⱼ gⱼ, [B]. alignments() → gᵢ · Σⱼ gⱼ. One call costs about two
            thirds of a plain gradient, and over devices one all-reduce of the parameters' size.
    """

    losses: jax.Array
    sq_norms: jax.Array
    tensor_sq_norms: PyTree
    mask: jax.Array
    alignments: Callable[..., jax.Array]

    @property
    def count(self) -> jax.Array:
        """The number of examples that count, at least 1, in the dtype of the norms."""
        return jnp.maximum(self.mask.sum(), 1).astype(self.sq_norms.dtype)

    @property
    def norms(self) -> jax.Array:
        """‖gᵢ‖, [B]."""
        return jnp.sqrt(self.sq_norms)

    def mean_over(self, weights: jax.Array) -> jax.Array:
        """Weights [B] over their sum, zero for examples that do not count. All zero if the sum is."""
        weights = jnp.where(self.mask, weights, 0)
        total = weights.sum()
        return weights / jnp.where(total == 0, 1, total)


# A weighting gives weights [B], or a pytree like params of [B] to weight tensors differently.
Weighting = Callable[[ExampleStatistics], Any]


class Unique:
    """The key of a weighting that holds a traced number: it equals only itself, and its programs are not kept."""


@dataclasses.dataclass(frozen=True)
class NamedWeighting:
    """A weighting with the name and the numbers of its factory. Weightings with equal ones are equal."""

    name: str
    key: Hashable  # the numbers
    shown: str
    function: Weighting = dataclasses.field(compare=False)

    @property
    def is_traced(self) -> bool:
        """Whether it, or one that it is composed of, holds a traced number."""
        parts = self.key if isinstance(self.key, tuple) else ()
        inner = [each for each in parts if isinstance(each, NamedWeighting)]
        return isinstance(self.key, Unique) or any(each.is_traced for each in inner)

    def __call__(self, statistics: ExampleStatistics) -> Any:
        """function(statistics)."""
        return self.function(statistics)

    def __repr__(self) -> str:
        return f"cg_jax.{self.name}({self.shown})"


def require_weighting(name: str, value: Any) -> None:
    """TypeError unless `value` is a function of an `ExampleStatistics`, and no factory of one, nor a rule."""
    _validate.function(name, value)
    if isinstance(value, types.FunctionType) and value.__module__.startswith("cg_jax.weighting"):
        called = f"cg_jax.{value.__name__}"
        if "<locals>" not in value.__qualname__:
            raise TypeError(f"Expected {name} to be a weighting, as {called}(…) makes it, got {called} itself.")
    if type(value).__module__ == "cg_jax.rules" or getattr(value, "__module__", "") == "cg_jax.rules":
        raise TypeError(
            f"Expected {name} to be a function of an ExampleStatistics, got the coordinate-wise rule {value!r}; pass "
            "rules to coordinatewise_grads. The mean is lambda of: of.mask / of.count."
        )


def named(
    name: str, function: Weighting, numbers: Mapping[str, Any] | None = None, key: Hashable = None
) -> NamedWeighting:
    """A weighting that equals others of the same name and key, or numbers. Its repr leaves out None and False."""
    numbers = numbers or {}
    shown = ", ".join(f"{each}={value}" for each, value in numbers.items() if value is not None and value is not False)
    return NamedWeighting(name, tuple(numbers.values()) if key is None else key, shown, function)


def ratio(numerator: Any, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, or 1 where the denominator is 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 1, numerator / jnp.where(is_zero, 1, denominator))


def share_of(name: str, share: Any) -> float:
    """A share as a float. ValueError unless 0 < share <= 1."""
    share = _validate.number(name, share)
    if not 0 < share <= 1:
        raise ValueError(f"Expected 0 < {name} <= 1, got {name}={share}.")
    return share


def quantile(values: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """The q-quantile of the values [B] where mask holds, by linear interpolation as in `jnp.quantile`.

    NaN if one of them is.
    """
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    position = q * jnp.maximum(mask.sum() - 1, 0).astype(values.dtype)
    low = jnp.floor(position)
    above = position - low
    first, second = (ordered[at.astype(jnp.int32)] for at in (low, jnp.ceil(position)))
    between = jnp.where(above == 0, first, first * (1 - above) + jnp.where(above == 0, 0, second) * above)
    return jnp.where((jnp.isnan(values) & mask).any(), jnp.nan, between)


def first_of(order: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """1/n for the n = ⌈share · m⌉ of the m examples where mask holds that come first by `order` [B], else 0.

    Ties are broken by the position in the batch. NaN comes last.
    """
    size = order.size
    # ⌈share · m⌉ for every m, in exact decimals: 0.55 · 20 is 11, not 11.000000000000002.
    sizes = jnp.asarray([math.ceil(round(share * m, 9)) for m in range(size + 1)], jnp.int32)
    n = sizes[mask.sum()]
    ranks = jnp.zeros(size, jnp.int32).at[jnp.lexsort((order, ~mask))].set(jnp.arange(size, dtype=jnp.int32))
    return jnp.where((ranks < n) & mask, 1 / jnp.maximum(n, 1).astype(order.dtype), 0)
