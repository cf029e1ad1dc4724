"""Statistics of tensors from a pass: by a product, by a norm, inside a scan, or from built gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._types import PyTree
from cg_jax.ghost import instances
from cg_jax.ghost.by_primitive import along_by_primitive, sum_by_vjp
from cg_jax.ghost.chunks import accumulate, in_chunks, of_each
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.passes import ByParameter, Pass
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import along, has_cheap_pairs, instantiated, pairs, sum_of_products, without_gradients


@dataclasses.dataclass(frozen=True, eq=False)
class ByProduct:
    """A tensor whose uses form one product, Σₜ aₜ bₜᵀ for each example."""

    plan: RulePlan

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        plan, dtype = self.plan, of.dtype(self.plan.parameter)
        if plan.form == "instantiate":
            return {plan.parameter: self._instantiated(of)[0].astype(dtype)}
        norms = without_gradients(self.product(of), plan.form, *self.factors(of), dtype, plan.chunk)
        return {plan.parameter: norms.astype(dtype)}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        plan, dtype = self.plan, of.dtype(self.plan.parameter)
        if plan.form == "instantiate":
            return {plan.parameter: self._instantiated(of)[1].astype(dtype)}
        return {plan.parameter: self._sum(of, *self.factors(of)).astype(dtype)}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        parameter, (x, cotangent) = self.plan.parameter, self.factors(of)
        return {parameter: self._sum(of, x, weighted(cotangent, weights[parameter])).astype(of.dtype(parameter))}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:  # noqa: D102
        product, v = self.product(of), direction[self.plan.parameter]
        if product.rearranges:
            return [along(product, *self.factors(of), v)]
        if self.plan.places[0][0].nested is None:  # patches are much larger than the input
            return [along_by_primitive(of, self.plan, v)]
        return [in_chunks(lambda rows: along(product, rows[0], rows[1], v), self.factors(of), self.plan.chunk)]

    def pairs(self, of: Pass) -> tuple[jax.Array, jax.Array] | None:
        """(K [B, B], s [B]) with gᵢ · gⱼ = sᵢ sⱼ Kᵢⱼ, or None if they cost more than a weighted sum and alignments."""
        product, size = self.product(of), of.losses.shape[0]
        if not has_cheap_pairs(product, size):
            return None
        return of.once((self, "pairs"), lambda: pairs(product, *self.factors(of), of.dtype(self.plan.parameter)))

    def product(self, of: Pass) -> Product:
        """The product, given the static values."""
        return of.once((self, "product"), lambda: self.plan.bound(of.program, of.env))

    def factors(self, of: Pass) -> tuple[Any, Any]:
        """(inputs, cotangents). Lists if there are several uses."""
        pairs = [(of.traces[use.key][0][0], of.traces[use.key][1][0]) for use, _ in self.plan.places]
        return pairs[0] if len(pairs) == 1 else tuple(map(list, zip(*pairs, strict=True)))

    def _instantiated(self, of: Pass) -> tuple[jax.Array, jax.Array]:
        """(norms, sum), both from the same gradients."""
        dtype = of.dtype(self.plan.parameter)
        return of.once(
            (self, "gradients"),
            lambda: instantiated(self.product(of), *self.factors(of), dtype, self.plan.chunk),
        )

    def _sum(self, of: Pass, x: Any, cotangent: Any) -> jax.Array:
        """Σ over the batch of products of these cotangents."""
        product, dtype = self.product(of), of.dtype(self.plan.parameter)
        if product.rearranges:
            return sum_of_products(product, x, cotangent, dtype)
        if self.plan.places[0][0].nested is not None:  # the primitive's own vjp is in the body
            return instantiated(product, x, cotangent, dtype, self.plan.chunk)[1]
        # Patches are much larger than the input, so the primitive's own vjp computes the sum.
        return sum_by_vjp(of, self.plan, [x], cotangent)


@dataclasses.dataclass(frozen=True, eq=False)
class ByNorm:
    """A tensor whose one use places or adds up cotangents."""

    plan: RulePlan

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        rule, (use, _) = self.plan.rule, self.plan.places[0]
        assert isinstance(rule, Norm)
        dtype = of.dtype(self.plan.parameter)
        operands, (cotangent,) = of.traces[use.key]
        norms = jax.vmap(lambda row: rule.sq_norm(*row))
        sq_norms = in_chunks(norms, (operands, cotangent.astype(dtype)), self.plan.chunk)
        if sq_norms.ndim != 1:
            raise ValueError(
                f"Expected the rule of {use.site.eqn.primitive.name} to give one number for each example, its ‖g‖², "
                f"got an array of shape {sq_norms.shape[1:]}."
            )
        return {self.plan.parameter: sq_norms.astype(dtype)}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        operands, (cotangent,) = of.traces[self.plan.places[0][0].key]
        return {self.plan.parameter: sum_by_vjp(of, self.plan, operands, cotangent).astype(self._dtype(of))}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        operands, (cotangent,) = of.traces[self.plan.places[0][0].key]
        total = sum_by_vjp(of, self.plan, operands, weighted(cotangent, weights[self.plan.parameter]))
        return {self.plan.parameter: total.astype(self._dtype(of))}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:
        """The cotangent times the result at v, since the use is linear in the tensor."""
        if self.plan.paths[0].length is not None:
            return [self._along_gradients(of, direction[self.plan.parameter])]
        return [along_by_primitive(of, self.plan, direction[self.plan.parameter])]

    def _along_gradients(self, of: Pass, direction: jax.Array) -> jax.Array:
        """`along` for a use in a scan, where the sum over one example is its gradient."""
        use = self.plan.places[0][0]

        def one(trace: Any) -> jax.Array:
            operands, (cotangent,) = jax.tree.map(lambda x: x[None], trace)
            return jnp.vdot(sum_by_vjp(of, self.plan, operands, cotangent).astype(direction.dtype), direction)

        return in_chunks(jax.vmap(one), of.traces[use.key], self.plan.chunk)

    def _dtype(self, of: Pass) -> Any:
        return of.dtype(self.plan.parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """A tensor whose norms are taken inside the backward pass of a scan. Weights and directions need other plans."""

    plan: InlinePlan

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        return {self.plan.parameter: of.inside[self.plan.parameter][0]}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        return {self.plan.parameter: of.inside[self.plan.parameter][1]}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        raise NotImplementedError("Expected a pass that keeps traces, got one with norms inside a scan.")

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:  # noqa: D102
        raise NotImplementedError("Expected a pass that keeps traces, got one with norms inside a scan.")


@dataclasses.dataclass(frozen=True, eq=False)
class ByGradients:
    """Tensors whose gradients are built, a chunk of examples at a time."""

    plan: GroupPlan

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        return dict(zip(self.plan.parameters, self._shared(of)[0], strict=True))

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        return dict(zip(self.plan.parameters, self._shared(of)[1], strict=True))

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        gradient, operands = self.gradient(of)

        def scaled(row: Any) -> list[jax.Array]:
            return [g * weight.astype(g.dtype) for g, weight in zip(gradient(row[0]), row[1], strict=True)]

        rows = operands, [weights[i] for i in self.plan.parameters]
        _, totals = accumulate(of_each(scaled), rows, self.plan.chunk)
        return dict(zip(self.plan.parameters, totals, strict=True))

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:  # noqa: D102
        gradient, operands = self.gradient(of)

        def one(row: Any) -> jax.Array:
            return trees.total(
                [jnp.vdot(g, direction[i]) for i, g in zip(self.plan.parameters, gradient(row), strict=True)]
            )

        return [in_chunks(jax.vmap(one), operands, self.plan.chunk)]

    def gradient(self, of: Pass) -> tuple[Callable[[Any], list[jax.Array]], Any]:
        """(the function of one example's row → its gradients, the rows)."""
        plan = self.plan
        if plan.whole_loss:
            gradient, operands = instances.by_whole_loss(of, plan), of.batch
        else:
            gradient, operands = instances.by_sites(of, plan), [of.traces[use.key] for use, _ in plan.uses]
        if of.keep is None or not (plan.whole_loss or of.program.has_custom_vjp):
            return gradient, operands
        return lambda row: selected(row[1], gradient(row[0])), (operands, of.keep)

    def norms_and_sums(self, of: Pass) -> tuple[list[jax.Array], list[jax.Array]]:
        """(norms, sums) of each tensor, both from the same gradients."""
        gradient, operands = self.gradient(of)
        return accumulate(of_each(gradient), operands, self.plan.chunk)

    def _shared(self, of: Pass) -> tuple[list[jax.Array], list[jax.Array]]:
        return of.once(self, lambda: self.norms_and_sums(of))


@dataclasses.dataclass(frozen=True, eq=False)
class SameForAll:
    """All tensors of a loss that ignores the example. It has one gradient."""

    gradients: list[jax.Array]

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        keep = _kept(of)
        return {i: jnp.square(keep).astype(g.dtype) * trees.sq_norms(g) for i, g in enumerate(self.gradients)}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        return self.weighted_sums(of, dict.fromkeys(range(len(self.gradients)), jnp.ones(of.losses.shape)))

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        kept = _kept(of)
        return {i: g * (kept * weights[i]).sum().astype(g.dtype) for i, g in enumerate(self.gradients)}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:  # noqa: D102
        return [jnp.vdot(g, direction[i]) * _kept(of).astype(g.dtype) for i, g in enumerate(self.gradients)]


def _kept(of: Pass) -> jax.Array:
    return jnp.ones(of.losses.shape) if of.keep is None else of.keep


def selected(keep: jax.Array, rows: PyTree) -> PyTree:
    """Rows, or zeros where `keep` [B] (or a scalar, for one row) is zero or False."""
    is_kept = keep if keep.dtype == bool else keep > 0
    return jax.tree.map(
        lambda leaf: jnp.where(is_kept.reshape(keep.shape + (1,) * (leaf.ndim - keep.ndim)), leaf, 0), rows
    )


def weighted(rows: PyTree, weights: jax.Array) -> PyTree:
    """wᵢ times row i of each leaf [B, ...], in the accumulator dtype."""

    def scaled(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(trees.accumulator_dtype(leaf.dtype))
        return leaf * weights.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype)

    return jax.tree.map(scaled, rows)
