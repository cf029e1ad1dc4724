"""Norms inside the backward pass of a scan in which each step has its own slice of a tensor: stacked layers.

A trace stores the inputs and cotangents of every step, several times what a plain gradient stores for a scan of
checkpoints. Here each step returns one number for each example, ‖gᵢ‖² of its slice, as the cotangent of a number that
it receives. The sum over the batch is the ordinary gradient of the slice. The gradients of the slices do not overlap,
so their squared norms add up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax.ghost import primitives, varying
from cg_jax.ghost.capture import Program, Use
from cg_jax.ghost.chunks import in_chunks
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import instantiated, without_gradients
from cg_jax.ghost.rules import rule_for
from cg_jax.ghost.uses import Path, Place, path_of, rearranged
from cg_jax.ghost.views import is_isometric


@dataclasses.dataclass(frozen=True)
class InlinePlan:
    """A tensor whose one use is in the body of a scan over its slices."""

    parameter: int
    use: Use
    position: int
    path: Path
    product: Product | None  # None: the gradient of a slice is built
    form: str
    chunk: int

    def sq_norms(self, seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        """‖gᵢ‖² [B] of one step."""
        eqn = self.use.site.eqn
        dtype = trees.accumulator_dtype(eqn.invars[self.position].aval.dtype)
        if self.product is not None and self.form != "instantiate":
            return without_gradients(self.product, self.form, seen[0], cotangent, dtype, self.chunk).astype(dtype)

        if self.product is not None:
            return instantiated(self.product, seen[0], cotangent, dtype, self.chunk)[0]
        norms = jax.vmap(lambda row: trees.sq_norms(self._gradient(*row)))
        return in_chunks(norms, (seen, cotangent), self.chunk)

    def _gradient(self, seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        """One example's gradient of a slice, by the use's own vjp."""
        first = self.path.inner[0].operand if self.path.inner else self.use.site.eqn.invars[self.position]

        def outputs(value: jax.Array) -> jax.Array:
            for step in self.path.inner:
                if not primitives.of(step.eqn).is_many:
                    value = _compat.bind(step.eqn, [value])[step.output]
            operands: list[Any] = [None] * len(self.use.site.eqn.invars)
            operands[self.position] = value
            for i, each in zip(self.use.site.dynamic, seen, strict=True):
                operands[i] = each
            return _compat.bind(self.use.site.eqn, operands)[0]

        return varying.transposed(outputs, first.aval.shape, cotangent)

    def tap(self, value: jax.Array, number: jax.Array, seen: list[jax.Array]) -> jax.Array:
        """`value`, with ‖gᵢ‖² of this step as the cotangent of `number`."""
        return _tap(self.sq_norms, value, number, seen)


def _tap(sq_norms: Callable[..., jax.Array], value: jax.Array, number: jax.Array, seen: list[jax.Array]) -> jax.Array:
    @jax.custom_batching.custom_vmap
    def norm(seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        return sq_norms([each[None] for each in seen], cotangent[None])[0]

    @norm.def_vmap
    def _(size: int, batched: Any, seen: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, bool]:
        rows = jax.tree.map(
            lambda each, has_rows: each if has_rows else jnp.broadcast_to(each, (size, *each.shape)),
            (seen, cotangent),
            tuple(batched),
        )
        return sq_norms(*rows), True

    @jax.custom_vjp
    def identity(value: jax.Array, number: jax.Array, seen: list[jax.Array]) -> jax.Array:
        del seen
        # One value for each example, even if it is the same for all. The compiler folds the select away.
        return jax.lax.select(
            jnp.zeros(value.shape, bool), jnp.broadcast_to(number, value.shape).astype(value.dtype), value
        )

    def backward(seen: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        return cotangent, norm(seen, cotangent).astype(number.dtype), None

    identity.defvjp(lambda value, number, seen: (identity(value, number, seen), seen), backward)
    return identity(value, number, seen)


def inline_plan(
    program: Program, parameter: int, places: list[Place], form_of: Callable[[Product], tuple[str, int]], limit: int
) -> InlinePlan | None:
    """The plan of a tensor whose norms can be taken inside a scan, or None."""
    if len(places) != 1:
        return None
    use, position = places[0]
    site, dtype = use.site, program.parameters[parameter].aval.dtype
    path = path_of(program, use, position, parameter)
    if (
        path is None
        or not path.is_slice
        or program.has_custom_vjp
        or not is_isometric(path.outer)
        or not all(step.is_identity or _is_linear(step.eqn) for step in path.inner)
        or not primitives.of(site.eqn).is_linear
        or len(site.views) != 1
        or len(site.taps) != 1
        or len(site.dynamic) + 1 != len(site.eqn.invars)
        or dtype != trees.accumulator_dtype(dtype)  # the plain gradient would be rounded in each batch
        or site.eqn.invars[position].aval.dtype != dtype
    ):
        return None
    rule = rule_for(site.eqn, position)
    if isinstance(rule, Product) and is_isometric(path.inner):
        product = rule._replace(to_view=lambda g: rearranged(path.inner, rule.to_view(g)), is_shared=False)
        return InlinePlan(parameter, use, position, path, product, *form_of(product))
    size = program.parameters[parameter].aval.size // (path.length or 1) * dtype.itemsize
    return InlinePlan(parameter, use, position, path, None, "elementwise", max(1, limit // max(1, size)))


def _is_linear(eqn: Any) -> bool:
    """Whether the result is linear in the only operand."""
    return primitives.of(eqn).is_linear and len(eqn.invars) == 1
