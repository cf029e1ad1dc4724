"""Tensors whose gradients, built for their norms, are kept for the weighted sums and inner products that follow.

The weights of examples depend on the norms of all tensors, so a gradient that was built for its norm would be built
again for its sum. A kept gradient costs memory: T positions less work for each number. The tensors with most positions
come first, until the gradients would take more bytes than the pass itself holds, or than `max_bytes`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax.ghost import varying
from cg_jax.ghost.backward import Traces
from cg_jax.ghost.capture import Program
from cg_jax.ghost.chunks import accumulate_with, of_each
from cg_jax.ghost.passes import ByParameter, Pass
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import instantiated_rows
from cg_jax.ghost.tensors import ByGradients, ByProduct

# Below so many positions, building a gradient again is about as fast as reading it.
_FEWEST_POSITIONS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class KeptProduct(ByProduct):
    """A product whose gradients [B, N, D, P] are kept."""

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        return {self.plan.parameter: self._rows(of)[0].astype(of.dtype(self.plan.parameter))}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        return self.weighted_sums(of, {self.plan.parameter: jnp.ones(self._rows(of)[0].shape)})

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        parameter = self.plan.parameter
        total = _weighted_sum(self._rows(of)[1], weights[parameter])
        return {parameter: self.product(of).to_view(total).astype(of.dtype(parameter))}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:
        """⟨gᵢ, v⟩ from the gradients, if they were built for their norms."""
        if (self, "rows") not in of.memo:
            return super().along(of, direction)
        n, _, d, p = self.product(of).dims
        v = varying.transposed(self.product(of).to_view, (n, d, p), direction[self.plan.parameter])
        return [_inner(self._rows(of)[1], v)]

    def _rows(self, of: Pass) -> tuple[jax.Array, jax.Array]:
        dtype, chunk = of.dtype(self.plan.parameter), self.plan.chunk
        return of.once((self, "rows"), lambda: instantiated_rows(self.product(of), *self.factors(of), dtype, chunk))


@dataclasses.dataclass(frozen=True, eq=False)
class KeptGradients(ByGradients):
    """Tensors whose gradients [B, *param] are kept."""

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        return dict(zip(self.plan.parameters, self._rows(of)[0], strict=True))

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        return self.weighted_sums(of, dict.fromkeys(self.plan.parameters, jnp.ones(of.losses.shape)))

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        pairs = zip(self.plan.parameters, self._rows(of)[1], strict=True)
        return {i: _weighted_sum(rows, weights[i]) for i, rows in pairs}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:
        """⟨gᵢ, v⟩ from the gradients, if they were built for their norms."""
        if (self, "rows") not in of.memo:
            return super().along(of, direction)
        return [_inner(rows, direction[i]) for i, rows in zip(self.plan.parameters, self._rows(of)[1], strict=True)]

    def _rows(self, of: Pass) -> tuple[list[jax.Array], list[jax.Array]]:
        def build() -> tuple[list[jax.Array], list[jax.Array]]:
            gradient, operands = self.gradient(of)
            gradients = of_each(gradient)
            by_row, _ = accumulate_with(lambda part: (g := gradients(part), g), operands, self.plan.chunk)
            return by_row

        return of.once((self, "rows"), build)


def _weighted_sum(rows: jax.Array, weights: jax.Array) -> jax.Array:
    flat = rows.reshape(rows.shape[0], -1)
    return jnp.dot(weights.astype(rows.dtype), flat, precision="highest").reshape(rows.shape[1:])


def _inner(rows: jax.Array, direction: jax.Array) -> jax.Array:
    return jnp.dot(rows.reshape(rows.shape[0], -1), direction.reshape(-1), precision="highest")


def kept_of(program: Program, parts: Sequence[Any], traces: Traces, size: int, max_bytes: int | None) -> set[int]:
    """The places of the parts of a plan whose gradients are kept, for a batch of `size` examples."""
    held = {id(leaf): leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(traces)}
    left = sum(held.values()) if max_bytes is None else max_bytes
    chosen: set[int] = set()
    candidates = [place for place, part in enumerate(parts) if _is_candidate(part)]
    for place in sorted(candidates, key=lambda place: _positions(parts[place]), reverse=True):
        bytes_of_part = size * _bytes(program, parts[place])
        if 0 < bytes_of_part <= left:
            chosen.add(place)
            left -= bytes_of_part
    return chosen


def _is_candidate(part: Any) -> bool:
    if isinstance(part, GroupPlan):
        return True
    is_built = isinstance(part, RulePlan) and isinstance(part.rule, Product) and part.form == "instantiate"
    return is_built and _positions(part) >= _FEWEST_POSITIONS


def _positions(part: RulePlan | GroupPlan) -> int:
    """The products that build one number of a gradient. Those of a vjp are taken for few."""
    return part.rule.dims[1] if isinstance(part, RulePlan) and isinstance(part.rule, Product) else _FEWEST_POSITIONS


def _bytes(program: Program, part: RulePlan | GroupPlan) -> int:
    """Of the gradient of one example."""
    if isinstance(part, RulePlan):
        assert isinstance(part.rule, Product)
        n, _, d, p = part.rule.dims
        return n * d * p * part.itemsize
    leaves = [program.parameters[i].aval for i in part.parameters]
    return sum(leaf.size * trees.accumulator_dtype(leaf.dtype).itemsize for leaf in leaves)
