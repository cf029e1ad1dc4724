"""Which way each parameter tensor goes: by a rule for its one use, or by its gradients, example by example."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax.ghost.capture import Program, Use, leading_to, uses_of
from cg_jax.ghost.product import Product, lift
from cg_jax.ghost.products import product_bytes as product_bytes
from cg_jax.ghost.products import product_chunk, product_form
from cg_jax.ghost.rules import Norm, rule_for
from cg_jax.ghost.views import isometric_view, undo_view

# What a tensor is asked for: squared norms [B], and the sum over the batch.
Yield = tuple[jax.Array, jax.Array]

# Bytes that the per-example arrays of one tensor may take at once, by default.
_MAX_BYTES = {"cpu": 2**26}
_MAX_BYTES_ACCELERATOR = 2**28
# Entry by entry, or placed among other entries: their own vjp costs what their cotangent does, so it is their rule.
_ELEMENTWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "max", "min", "select_n", "pow", "atan2", "rem", "clamp"}
    | {"concatenate", "dynamic_update_slice", "scatter", "scatter-add"}
)


@dataclasses.dataclass(frozen=True)
class RulePlan:
    """A tensor with one use, seen through rearrangements only, whose primitive has a rule."""

    parameter: int
    use: Use
    view: Any  # variable of the outermost program
    rearranged_by: tuple[Any, ...]  # equations from the parameter to the view
    rule: Product | Norm
    form: str  # "closed", "gram" or "instantiate" for a product; "norm"
    chunk: int  # examples whose arrays are built at once


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Tensors whose gradients are built, example by example: each site's own vjp, then that of the views.

    Gradients of several uses of one tensor add up before they are squared.
    """

    parameters: tuple[int, ...]
    uses: tuple[tuple[Use, tuple[int, ...]], ...]  # (use, positions of the views)
    reasons: tuple[str, ...]  # for each parameter, why no rule does it; empty where its use is elementwise
    whole_loss: bool  # a site has no reverse mode of its own: by vmap(grad) of the loss with respect to these tensors
    chunk: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the engine does with every parameter tensor; tensors in no list have no gradient."""

    rules: tuple[RulePlan, ...]
    groups: tuple[GroupPlan, ...]
    scalars: tuple[tuple[Use, int], ...]  # (use, position) of numbers that were made of whole tensors
    others: dict[int, tuple[tuple[Use, int], ...]]  # the other uses of the tensors that they were made of


def make_plan(program: Program, max_bytes: int | None = None) -> Plan:
    """The plan for a captured loss; `max_bytes` bounds the arrays of one tensor, but for one example's own."""
    limit = max_bytes or _MAX_BYTES.get(_compat.backend(), _MAX_BYTES_ACCELERATOR)
    found = uses_by_parameter(program)
    scalars = _scalar_uses(program, found)
    concerned = frozenset().union(*(_parameters(program, use, position) for use, position in scalars))
    found = {i: [each for each in uses if each not in scalars] for i, uses in found.items()}
    rules: list[RulePlan] = []
    reasons: dict[int, str] = {}
    for parameter, uses in found.items():
        plan = _rule_plan(program, parameter, uses, limit) if uses else None
        if isinstance(plan, str):
            reasons[parameter] = plan
        elif plan is not None:
            rules.append(plan)
    groups = _groups(program, {i: found[i] for i in reasons}, reasons, limit)
    return Plan(tuple(rules), groups, tuple(scalars), {i: tuple(found[i]) for i in concerned})


def _scalar_uses(program: Program, found: dict[int, list[tuple[Use, int]]]) -> list[tuple[Use, int]]:
    """The uses of one real number that is made of larger tensors, all of whose other uses can be followed forward."""

    def is_number(use: Use, position: int) -> bool:
        var = use.site.eqn.invars[position]
        if use.nested is not None or var.aval.size != 1 or not jnp.issubdtype(var.aval.dtype, jnp.floating):
            return False
        if isometric_view(program, var) is not None or not _compat.has_reverse_mode(use.site.eqn, [position]):
            return False
        return not any(map(_compat.has_custom_vjp, (use.site.eqn, *leading_to([var], program.static))))

    numbers = list(dict.fromkeys(each for uses in found.values() for each in uses if is_number(*each)))

    def can_be_followed(use: Use, position: int) -> bool:
        others = [o for i in _parameters(program, use, position) for o in found[i] if o not in numbers]
        return all(o.nested is None and not _compat.has_custom_vjp(o.site.eqn) for o, _ in others) and all(
            _compat.has_reverse_mode(o.site.eqn, [p]) for o, p in others
        )

    return [each for each in numbers if can_be_followed(*each)]


def uses_by_parameter(program: Program) -> dict[int, list[tuple[Use, int]]]:
    """For every parameter its uses, and the position of the operand that is a view of it."""
    found: dict[int, list[tuple[Use, int]]] = {i: [] for i in range(len(program.parameters))}
    for use in uses_of(program):
        for position in use.site.views:
            for parameter in _parameters(program, use, position):
                found[parameter].append((use, position))
    return found


def _parameters(program: Program, use: Use, position: int) -> frozenset[int]:
    """The parameters that an operand of a use is a view of."""
    return frozenset().union(*(program.reach[var] for var in use.variables(position)))


def _rule_plan(program: Program, parameter: int, uses: list[tuple[Use, int]], limit: int) -> RulePlan | str:
    """The plan of a tensor by a rule, or why there is none; an elementwise use has no need of one, and no reason."""
    if len(uses) > 1:
        return f"used {len(uses)} times: gradients add up before they are squared"
    ((use, position),) = uses
    name = use.site.eqn.primitive.name
    if name == "scan":
        return "the scan is taken whole: a parameter is in its carry, or its body cannot be taken apart"
    if len(use.site.views) > 1 or len(use.variables(position)) > 1:
        return f"several parameters meet in one {name}"
    (view,) = use.variables(position)
    chain = isometric_view(program, view)
    rule = None if chain is None else _rule(use, position)
    if rule is None and name in _ELEMENTWISE and (chain is not None or _is_broadcast(program, view)):
        return ""
    if chain is None:
        return f"transformed by other parameters or by more than a rearrangement before {name}"
    if rule is None:
        where = "in the body of a scan or checkpoint" if use.nested else "here"
        return f"no rule for {name} {where}: its own vjp"
    form = "norm" if isinstance(rule, Norm) else product_form(rule)
    if isinstance(rule, Product) and not rule.rearranges and use.nested is not None:
        form = "instantiate"  # the primitive's own vjp, which would form the sum, stands in the body
    itemsize = trees.accumulator_dtype(view.aval.dtype).itemsize
    chunk = _norm_chunk(use, limit) if isinstance(rule, Norm) else product_chunk(rule, form, itemsize, limit)
    return RulePlan(parameter, use, view, tuple(chain), rule, form, chunk)


def _is_broadcast(program: Program, view: Any) -> bool:
    """Whether a view only spreads one parameter over more axes."""
    eqns = [eqn for eqn in program.static if view in eqn.outvars]
    return bool(eqns) and eqns[0].primitive.name == "broadcast_in_dim" and (
        isometric_view(program, eqns[0].invars[0]) is not None
    )  # fmt: skip


def _rule(use: Use, position: int) -> Product | Norm | None:
    """The rule of a use, in terms of the outermost program's variables."""
    rule, nested = rule_for(use.site.eqn, position), use.nested
    if rule is None or nested is None:
        return rule
    view = use.site.eqn.invars[position]
    chain = isometric_view(nested.body, view)
    if isinstance(rule, Norm):  # a body that runs once, and no view inside it
        return rule if nested.call.length is None and chain == [] else None
    if chain is None:
        return None
    source = chain[0].invars[0] if chain else view
    undone = rule._replace(to_view=lambda g: undo_view(chain, source, view, rule.to_view(g)))
    return undone if nested.call.length is None else lift(undone, nested.call.length, nested.is_slice(source))


def _groups(
    program: Program, found: dict[int, list[tuple[Use, int]]], reasons: dict[int, str], limit: int
) -> tuple[GroupPlan, ...]:
    """Tensors that share a view (a product of two, a concatenation) go together, all others alone."""
    group_of = {parameter: {parameter} for parameter in found}
    for uses in found.values():
        for use, position in uses:
            joined = set().union(*(group_of[i] for i in _parameters(program, use, position)))
            group_of.update(dict.fromkeys(joined, joined))
    plans = []
    for group in {id(group): group for group in group_of.values()}.values():
        members = tuple(sorted(group))
        places: dict[tuple[int, ...], tuple[Use, set[int]]] = {}
        for parameter in members:
            for use, position in found[parameter]:
                places.setdefault(use.key, (use, set()))[1].add(position)
        uses = tuple((use, tuple(sorted(positions))) for _, (use, positions) in sorted(places.items()))
        whole = not all(_compat.has_reverse_mode(use.site.eqn, positions) for use, positions in uses)
        chunk = max(1, limit // max(group_bytes(program, members, uses), 1))
        plans.append(GroupPlan(members, uses, tuple(reasons[i] for i in members), whole, chunk))
    return tuple(plans)


def group_bytes(program: Program, members: tuple[int, ...], uses: tuple[tuple[Use, tuple[int, ...]], ...]) -> int:
    """Bytes of one example's gradients of a group: of its views, and of its tensors."""
    views = {var for use, positions in uses for p in positions for var in use.variables(p)}
    variables = [*views, *(program.parameters[i] for i in members)]
    return sum(math.prod(var.aval.shape) * trees.accumulator_dtype(var.aval.dtype).itemsize for var in variables)


def norm_bytes(use: Use) -> int:
    """Bytes of the cotangent of one example, which a norm's rule sorts or copies."""
    (out,) = use.site.eqn.outvars
    return math.prod(out.aval.shape) * trees.accumulator_dtype(out.aval.dtype).itemsize


def _norm_chunk(use: Use, limit: int) -> int:
    return max(1, limit // max(1, 2 * norm_bytes(use)))
