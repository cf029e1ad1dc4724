"""The cost of a plan for one example, in floating-point operations, compared with vmap(grad) of the whole loss.

A forward step of the program takes F operations. Its backward pass without the gradients of parameters takes F more.
The engine takes both, plus the norms and sums of each tensor. vmap(grad) takes 3 F and writes a gradient for each
example. Writing and reading a number costs about 40 operations, as measured on a CPU.
"""

import dataclasses
from collections.abc import Sequence

from cg_jax import _jaxprs
from cg_jax.ghost import primitives
from cg_jax.ghost.capture import Program, Use
from cg_jax.ghost.plan import GroupPlan, Plan, RulePlan, by_whole_loss, make_plan, norm_bytes
from cg_jax.ghost.product import Product

# The cost of writing and reading one number of a gradient, in operations.
PER_NUMBER = 40
# The reason for vmap(grad) of the loss.
DEAR = "the vjps of its uses cost more than the whole loss's"


def forward(program: Program) -> int:
    """Operations of a forward step for one example."""
    return sum(primitives.operations(eqn) for eqn in program.dynamic)


def of_rule(tensor: RulePlan) -> int:
    """Operations for norm and sum of a tensor by its rule."""
    rule = tensor.rule
    if rule is None:  # gᵢ = cᵢ v
        return 3
    if not isinstance(rule, Product):
        return 3 * norm_bytes(tensor.places[0][0]) // 4
    n, t, d, p = rule.dims
    masked = 2 * d * p if tensor.form == "closed" and rule.scale is not None else 0
    norm = {"closed": 2 * (d + p) + masked, "gram": 2 * t * t * (d + p + 1), "instantiate": 2 * d * p}[tensor.form]
    return n * (norm + 2 * t * d * p)


def of_use(use: Use) -> int:
    """Operations of the vjp of one use, over all steps of a scan."""
    length = (use.nested.call.length or 1) if use.nested else 1
    # An equation that is linear in the view needs no second forward step.
    passes = 3 if _jaxprs.holds_jaxprs(use.site.eqn) else 1
    return length * passes * primitives.operations(use.site.eqn)


def _size(program: Program, parameters: Sequence[int]) -> int:
    return sum(program.parameters[i].aval.size for i in parameters)


def _of_group(program: Program, group: GroupPlan) -> int:
    """Operations for norms and sums of the tensors of a group."""
    if group.whole_loss:
        return 3 * forward(program) + PER_NUMBER * _size(program, group.parameters)
    return sum(of_use(use) for use, _ in group.uses) + PER_NUMBER * _size(program, group.parameters)


def _of_plan(program: Program, plan: Plan) -> int:
    """Total operations of the engine."""
    written = sum(PER_NUMBER * _size(program, (t.parameter,)) for t in plan.rules if t.form == "instantiate")
    return (
        2 * forward(program) + written + sum(map(of_rule, plan.rules)) + sum(_of_group(program, g) for g in plan.groups)
    )


def cheapest(program: Program, max_bytes: int | None = None, norms_inside: bool = True) -> Plan:
    """The cheapest plan for a captured loss. It may use vmap(grad) of the loss for some tensors or for all."""
    plan = make_plan(program, max_bytes, norms_inside)
    uses = [use for group in plan.groups for use, _ in group.uses]
    if not any(_jaxprs.holds_jaxprs(use.site.eqn) for use in uses):
        return plan  # at most the sums are computed twice
    some = tuple(sorted(i for group in plan.groups for i in group.parameters))
    every = tuple(sorted((*some, *(tensor.parameter for tensor in (*plan.rules, *plan.inline)))))
    plans = [
        plan,
        dataclasses.replace(plan, groups=(by_whole_loss(program, some, DEAR, max_bytes),)),
        Plan((), (by_whole_loss(program, every, DEAR, max_bytes),), is_vmap=True),
    ]
    costs = [_of_plan(program, each) for each in plans]
    costs[2] -= 2 * forward(program)  # there is no other pass
    return plans[costs.index(min(costs))]
