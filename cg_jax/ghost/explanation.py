"""Explain what the engine will do with a loss, tensor by tensor."""

from typing import Any, NamedTuple

import jax

from cg_jax import _compat, _validate, trees
from cg_jax._loss import LossFn, with_state
from cg_jax._types import PyTree
from cg_jax.ghost import cost, plan
from cg_jax.ghost.capture import Use, capture
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import product_bytes


class TensorPlan(NamedTuple):
    """What the engine does with one parameter tensor. Operations and bytes are for ONE example."""

    path: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]  # "primitive, file:line" of every equation in which it meets a value of the example
    rule: str  # "closed", "gram", "instantiate", "norm" or "elementwise"; "vjp" or "vmap" for a fallback; or "none"
    flops: int  # floating-point operations for norm and sum, without the ordinary backward pass
    bytes: int  # of the arrays built for it
    chunk: int  # examples whose arrays exist at once
    reason: str  # why it falls back, or empty


class Explanation(tuple[TensorPlan, ...]):
    """One `TensorPlan` for each tensor. It prints as a table: "kB" exist for "at once" examples."""

    def __str__(self) -> str:
        rows = [("tensor", "shape", "rule", "Mflop/example", "kB/example", "at once", "uses", "why it falls back")]
        for row in self:
            used = row.uses[0] + (f" and {len(row.uses) - 1} more" if len(row.uses) > 1 else "") if row.uses else ""
            chunk = "any" if row.chunk >= plan.ANY_CHUNK else str(row.chunk or "")
            numbers = (f"{row.flops / 1e6:.3g}", f"{row.bytes / 1e3:.3g}", chunk)
            rows.append((row.path, "×".join(map(str, row.shape)), row.rule, *numbers, used, row.reason))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__


def explain(
    loss_fn: LossFn,
    params: PyTree,
    example: PyTree,
    *,
    state: PyTree = None,
    max_bytes: int | None = None,
    has_aux: bool = False,
) -> Explanation:
    """What `grad_moments(loss_fn)` will do with every parameter tensor. Nothing is computed.

    The rules, for the gradient G = AᵀB of one example, A [T, D] and B [T, P]: "closed" is ‖a‖² ‖b‖² (T = 1). "gram" is
    ⟨AAᵀ, BBᵀ⟩. "instantiate" builds G and computes norm and sum from it. "elementwise" adds up cotangents (a bias, a
    scale). "norm" is any other rule. The fallback "vjp" builds the gradient by the vjp of each equation in `uses`,
    example by example. The fallback "vmap" uses the vjp of the whole loss. "none" is a tensor without a gradient.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
        example: One example, without a batch axis; arrays or `jax.ShapeDtypeStruct`s.
        state: As for `grad_moments`; arrays or `jax.ShapeDtypeStruct`s.
        max_bytes: As for `grad_moments`.
        has_aux: As for `grad_moments`.

    Returns:
        An `Explanation`: a tuple of one `TensorPlan` for each floating-point tensor, in the order of jax.tree.leaves.
        It prints as a table. Operations are those of norm and sum. An ordinary backward pass also needs the sum, which
        costs as many operations as "instantiate" in all. Integer leaves of params are omitted.

    Raises:
        ValueError: max_bytes < 1, or a loss that does not depend on params.
        TypeError: loss_fn does not return a real scalar.

    Examples:
        >>> import jax, jax.numpy as jnp, cg_jax as cg
        >>> def loss_fn(params, x):
        ...     return jnp.tanh(x @ params["w"] + params["b"]).sum()
        >>> rows = cg.explain(loss_fn, {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}, jnp.zeros(3))
        >>> [(row.path, row.rule, row.reason) for row in rows]
        [('b', 'elementwise', ''), ('w', 'closed', '')]
    """
    _validate.function("loss_fn", loss_fn)
    params, example = _validate.parameters(params), _validate.arrays("example", example, shapes=True)
    _validate.max_bytes(max_bytes)
    params, example = jax.tree.map(_shaped, (params, example))
    loss_fn = with_state(loss_fn, jax.tree.map(_value, state))
    kept, rest = trees.partition(params)
    _validate.something_to_differentiate(kept)
    program, _ = capture(loss_fn, kept, jax.tree.map(_value, rest), example, has_aux)
    _validate.dependence(program.depends)
    chosen = cost.cheapest(program, max_bytes)
    used = {i: [use for use, _ in uses] for i, uses in plan.uses_by_parameter(program).items()}
    rows = {tensor.parameter: _by_rule(tensor) for tensor in chosen.rules}
    for plan_inside in chosen.inline:
        rows[plan_inside.parameter] = _inside(plan_inside)
    for group in chosen.groups:
        size = plan.group_bytes(program, group.parameters, group.uses)
        rows |= {i: _in_group(group, k, used[i], size) for k, i in enumerate(group.parameters)}
    nothing = ("none", 0, 0, 0, "no example's gradient reaches it" if program.is_dynamic() else _SAME)
    leaves = jax.tree.leaves(kept)
    return Explanation(
        TensorPlan(path, leaf.shape, tuple(map(_where, used[i])), *rows.get(i, nothing))
        for i, (path, leaf) in enumerate(zip(trees.paths(kept), leaves, strict=True))
    )


_SAME = "the loss ignores the example: one gradient serves all"


def _shaped(leaf: Any) -> Any:
    """Convert Python numbers to arrays."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.device_put(leaf)


def _value(leaf: Any) -> Any:
    """The value of an integer leaf, which is part of the loss."""
    return jax.numpy.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _where(use: Use) -> str:
    line = "/".join(_compat.line_of(use.site.eqn).split("/")[-2:])
    return f"{use.site.eqn.primitive.name}, {line}" if line else use.site.eqn.primitive.name


def _by_rule(tensor: RulePlan) -> tuple[str, int, int, int, str]:
    """(rule, operations, bytes, chunk, why it falls back)."""
    rule, form = tensor.rule, tensor.form
    if rule is None:  # gᵢ = cᵢ v, and ‖gᵢ‖² = cᵢ² ‖v‖²
        return form, cost.of_rule(tensor), 0, tensor.chunk, ""
    if not isinstance(rule, Product):
        return form, cost.of_rule(tensor), 2 * plan.norm_bytes(tensor.places[0][0]), tensor.chunk, ""
    return form, cost.of_rule(tensor), product_bytes(rule, form, tensor.itemsize), tensor.chunk, ""


def _inside(each: InlinePlan) -> tuple[str, int, int, int, str]:
    """The same for a tensor whose norms are taken inside a scan."""
    size = 0 if each.product is None else product_bytes(each.product, each.form, 4)
    return each.form, cost.of_use(each.use), size, each.chunk, ""


def _in_group(group: GroupPlan, k: int, uses: list[Use], size: int) -> tuple[str, int, int, int, str]:
    """The same for a tensor whose gradient is built by the vjps of its sites, or by the vjp of the whole loss."""
    operations = sum(map(cost.of_use, uses))
    reason = group.reasons[k]
    if group.whole_loss and reason != cost.DEAR:
        reason += "; JAX has no reverse mode for " + ", ".join(sorted({use.site.eqn.primitive.name for use in uses}))
    rule = "vmap" if group.whole_loss else "vjp" if group.reasons[k] else "elementwise"
    return rule, operations, size, group.chunk, reason
