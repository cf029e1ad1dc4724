"""What the engine will do with a loss, tensor by tensor, before it does it."""

import math
from typing import Any, NamedTuple

import jax

from cg_jax import _compat, _validate, trees
from cg_jax.ghost import plan
from cg_jax.ghost.capture import Use, capture, reaches_parameters
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.rules import rule_for
from cg_jax.per_example import LossFn

PyTree = Any


class TensorPlan(NamedTuple):
    """What the engine does with one parameter tensor; operations and bytes are of ONE example."""

    path: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]  # "primitive, file:line" of every equation in which it meets a value of the example
    rule: str  # "closed", "gram", "instantiate", "norm" or "elementwise"; "vjp" or "vmap" for a fallback; or "none"
    flops: int  # floating-point operations for norm and sum, the ordinary backward pass apart
    bytes: int  # of the arrays that are built for it
    chunk: int  # examples for which they exist at once
    reason: str  # why it falls back; empty where it does not


class Explanation(tuple[TensorPlan, ...]):
    """One `TensorPlan` for each tensor; printed, a table of it. "at once" is for how many examples the kB exist."""

    def __str__(self) -> str:
        rows = [("tensor", "shape", "rule", "Mflop/example", "kB/example", "at once", "uses", "why it falls back")]
        for row in self:
            used = row.uses[0] + (f" and {len(row.uses) - 1} more" if len(row.uses) > 1 else "") if row.uses else ""
            chunk = "any" if row.chunk >= _MANY else str(row.chunk or "")
            numbers = (f"{row.flops / 1e6:.3g}", f"{row.bytes / 1e3:.3g}", chunk)
            rows.append((row.path, "×".join(map(str, row.shape)), row.rule, *numbers, used, row.reason))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__


def explain(loss_fn: LossFn, params: PyTree, example: PyTree, *, max_bytes: int | None = None) -> Explanation:
    """What `grad_moments(loss_fn)` will do with every parameter tensor; nothing is computed.

    Rules, with the gradient G = AᵀB of one example, A [T, D] and B [T, P]: "closed" is ‖a‖² ‖b‖² (T = 1), "gram"
    ⟨AAᵀ, BBᵀ⟩, "instantiate" builds G and takes norm and sum from it. "elementwise" adds up cotangents (a bias, a
    scale), "norm" is any other rule. "vjp", the fallback, builds the gradient by the vjp of each equation in `uses`,
    example by example; "vmap" by that of the whole loss; "none" is a tensor without a gradient.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
        example: One example, without a batch axis; arrays or `jax.ShapeDtypeStruct`s.
        max_bytes: As for `grad_moments`.

    Returns:
        An `Explanation`: a tuple of one `TensorPlan` for each floating-point tensor, in the order of jax.tree.leaves;
        printed, a table. Operations are those of norm and sum; an ordinary backward pass needs those of the sum too,
        the same as "instantiate" has in all. Integer leaves of params are left out.

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
    kept, rest = trees.partition(params)
    _validate.something_to_differentiate(kept)
    program = capture(loss_fn, kept, jax.tree.map(_value, rest), example)
    _validate.dependence(reaches_parameters(program))
    todo = plan.make_plan(program, max_bytes)
    used = {i: [use for use, _ in uses] for i, uses in plan.uses_by_parameter(program).items()}
    made = {tensor.parameter: _by_rule(tensor) for tensor in todo.rules}
    for group in todo.groups:
        size = plan.group_bytes(program, group.parameters, group.uses)
        made |= {i: _in_group(group, k, used[i], size) for k, i in enumerate(group.parameters)}
    made = dict.fromkeys(todo.others, _ONE_NUMBER) | made
    nothing = ("none", 0, 0, 0, "no example's gradient reaches it" if program.is_dynamic() else _SAME)
    leaves = jax.tree.leaves(kept)
    return Explanation(
        TensorPlan(path, leaf.shape, tuple(map(_where, used[i])), *made.get(i, nothing))
        for i, (path, leaf) in enumerate(zip(trees.paths(kept), leaves, strict=True))
    )


# A chunk that no batch passes.
_MANY = 4096
# All that the tensor does is done by a number that is made of it: gᵢ = cᵢ v, and ‖gᵢ‖² = cᵢ² ‖v‖².
_ONE_NUMBER = ("closed", 3, 0, _MANY, "")
_SAME = "the loss ignores the example: one gradient serves all"


def _shaped(leaf: Any) -> Any:
    """Arrays as they are, Python numbers as arrays."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.device_put(leaf)


def _value(leaf: Any) -> Any:
    """An integer leaf's value; it is part of the loss."""
    return jax.numpy.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _where(use: Use) -> str:
    source = "/".join(_compat.source_of(use.site.eqn).split("/")[-2:])
    return f"{use.site.eqn.primitive.name}, {source}" if source else use.site.eqn.primitive.name


def _by_rule(tensor: RulePlan) -> tuple[str, int, int, int, str]:
    """(rule, operations, bytes, chunk, why it falls back)."""
    rule, form = tensor.rule, tensor.form
    if not isinstance(rule, Product):
        size = plan.norm_bytes(tensor.use)
        return form, 3 * size // 4, 2 * size, tensor.chunk, ""
    n, t, d, p = rule.dims
    norm = {"closed": 2 * n * (d + p), "gram": 2 * n * t * t * (d + p + 1), "instantiate": 2 * n * d * p}[form]
    itemsize = trees.accumulator_dtype(tensor.view.aval.dtype).itemsize
    return form, norm + 2 * n * t * d * p, plan.product_bytes(rule, form, itemsize), tensor.chunk, ""


def _in_group(group: GroupPlan, k: int, uses: list[Use], size: int) -> tuple[str, int, int, int, str]:
    """The same for a tensor whose gradient is built by its sites' vjps, or by that of the whole loss."""
    operations = 0
    for use in uses:
        rules = [rule for p in use.site.views if isinstance(rule := rule_for(use.site.eqn, p), Product)]
        length = (use.nested.call.length or 1) if use.nested else 1
        operations += length * (2 * math.prod(rules[0].dims) if rules else 2 * _compat.operations(use.site.eqn))
    reason = group.reasons[k]
    if group.whole_loss:
        reason += "; JAX has no reverse mode for " + ", ".join(sorted({use.site.eqn.primitive.name for use in uses}))
    rule = "vmap" if group.whole_loss else "vjp" if group.reasons[k] else "elementwise"
    return rule, operations, size, group.chunk, reason
