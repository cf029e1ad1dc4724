"""Statistics of tensors from a pass: by a product, by a norm, inside a scan, or from built gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax._types import PyTree
from cg_jax.ghost import instances, primitives, varying
from cg_jax.ghost.capture import Use
from cg_jax.ghost.chunks import accumulate, in_chunks, of_each
from cg_jax.ghost.evaluation import evaluate, read_all
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.passes import ByParameter, Pass
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import along, instantiated, sum_of_products, without_gradients
from cg_jax.ghost.uses import rearranged, to_parameter


@dataclasses.dataclass(frozen=True, eq=False)
class ByProduct:
    """A tensor whose uses form one product, Σₜ aₜ bₜᵀ for each example."""

    plan: RulePlan

    def sq_norms(self, of: Pass) -> ByParameter:  # noqa: D102
        plan, dtype = self.plan, of.dtype(self.plan.parameter)
        if plan.form == "instantiate":
            return {plan.parameter: self._instantiated(of)[0].astype(dtype)}
        norms = without_gradients(self._product(of), plan.form, *self._factors(of), dtype, plan.chunk)
        return {plan.parameter: norms.astype(dtype)}

    def sums(self, of: Pass) -> ByParameter:  # noqa: D102
        plan, dtype = self.plan, of.dtype(self.plan.parameter)
        if plan.form == "instantiate":
            return {plan.parameter: self._instantiated(of)[1].astype(dtype)}
        return {plan.parameter: self._sum(of, *self._factors(of)).astype(dtype)}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        parameter, (x, cotangent) = self.plan.parameter, self._factors(of)
        return {parameter: self._sum(of, x, weighted(cotangent, weights[parameter])).astype(of.dtype(parameter))}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:  # noqa: D102
        return [along(self._product(of), *self._factors(of), direction[self.plan.parameter])]

    def _product(self, of: Pass) -> Product:
        return of.once((self, "product"), lambda: self.plan.bound(of.program, of.env))

    def _factors(self, of: Pass) -> tuple[Any, Any]:
        """(inputs, cotangents). Lists if there are several uses."""
        pairs = [(of.traces[use.key][0][0], of.traces[use.key][1][0]) for use, _ in self.plan.places]
        return pairs[0] if len(pairs) == 1 else tuple(map(list, zip(*pairs, strict=True)))

    def _instantiated(self, of: Pass) -> tuple[jax.Array, jax.Array]:
        """(norms, sum), both from the same gradients."""
        dtype = of.dtype(self.plan.parameter)
        return of.once(
            (self, "gradients"),
            lambda: instantiated(self._product(of), *self._factors(of), dtype, self.plan.chunk),
        )

    def _sum(self, of: Pass, x: Any, cotangent: Any) -> jax.Array:
        """Σ over the batch of products of these cotangents."""
        product, dtype = self._product(of), of.dtype(self.plan.parameter)
        if product.rearranges:
            return sum_of_products(product, x, cotangent, dtype)
        if self.plan.places[0][0].nested is not None:  # the primitive's own vjp is in the body
            return instantiated(product, x, cotangent, dtype, self.plan.chunk)[1]
        # Patches are much larger than the input, so the primitive's own vjp computes the sum.
        return _sum_by_vjp(of, self.plan, [x], cotangent)


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
        return {self.plan.parameter: _sum_by_vjp(of, self.plan, operands, cotangent).astype(self._dtype(of))}

    def weighted_sums(self, of: Pass, weights: ByParameter) -> ByParameter:  # noqa: D102
        operands, (cotangent,) = of.traces[self.plan.places[0][0].key]
        total = _sum_by_vjp(of, self.plan, operands, weighted(cotangent, weights[self.plan.parameter]))
        return {self.plan.parameter: total.astype(self._dtype(of))}

    def along(self, of: Pass, direction: ByParameter) -> list[jax.Array]:
        """The cotangent times the result at v, since the use is linear in the tensor."""
        ((use, position),) = self.plan.places
        path, parameter = self.plan.paths[0], self.plan.parameter
        if path.length is not None:
            return [self._along_gradients(of, direction[parameter])]
        view = varying.transposed(
            lambda g: to_parameter(of.program, (use, position), path, parameter, of.env, g),
            use.site.eqn.invars[position].aval.shape,
            direction[parameter],
        )
        local, transposed = _env_of(of, use), primitives.of(use.site.eqn).transposed
        changed = {} if transposed is None else transposed(use.site.eqn)

        def one(trace: Any) -> jax.Array:
            seen, (cotangent,) = trace
            values = instances.operands_of(use.site, local, seen)
            values[position] = view
            result = _compat.bind(use.site.eqn, values, **changed)[0]
            return jnp.vdot(cotangent.astype(view.dtype), result)

        return [jax.vmap(one)(of.traces[use.key])]

    def _along_gradients(self, of: Pass, direction: jax.Array) -> jax.Array:
        """`along` for a use in a scan, where the sum over one example is its gradient."""
        use = self.plan.places[0][0]

        def one(trace: Any) -> jax.Array:
            operands, (cotangent,) = jax.tree.map(lambda x: x[None], trace)
            return jnp.vdot(_sum_by_vjp(of, self.plan, operands, cotangent).astype(direction.dtype), direction)

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


def _env_of(of: Pass, use: Use) -> dict[Any, Any]:
    """The static values at a use. In the body of a checkpoint, those of the body."""
    if use.nested is None:
        return of.env
    body, outer = use.nested.body, use.nested.operands
    local = body.constants | dict(zip(outer, read_all(list(outer.values()), of.env), strict=True))
    evaluate(body.static, local)
    return local


def _sum_by_vjp(of: Pass, tensor: RulePlan, seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """Σ over the batch of the gradients of a tensor at its one use, by an ordinary vjp in the accumulator dtype."""
    (place,), (path,) = tensor.places, tensor.paths
    (use, position), dtype = place, of.dtype(tensor.parameter)
    # A use in a scan is only handled here if it has no other static operand.
    local = _env_of(of, use) if path.length is None else {}
    changed = {"preferred_element_type": None} if "preferred_element_type" in use.site.eqn.params else {}
    view = use.site.eqn.invars[position].aval

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if trees.is_differentiable(x) else x

    def total(seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        def outputs(value: jax.Array) -> jax.Array:
            def one(example: list[jax.Array]) -> jax.Array:
                values = instances.operands_of(use.site, local, example)
                values[position] = value
                return _compat.bind(use.site.eqn, values, **changed)[0]

            return jax.vmap(one)([widen(x) for x in seen])

        # Every use with a rule is linear in the view.
        return varying.transposed(outputs, view.shape, widen(cotangent))

    if path.is_slice:
        total = jax.vmap(total, in_axes=1)
    elif path.length is not None:
        seen, cotangent = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (seen, cotangent))
    of_view = total(seen, cotangent)
    if path.length is not None:
        return rearranged(path.outer, of_view)
    return to_parameter(of.program, place, path, tensor.parameter, of.env, of_view)
