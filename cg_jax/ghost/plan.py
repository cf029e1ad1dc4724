"""Which way each parameter tensor goes: a rule for its one use, or its gradient example by example."""

import dataclasses
import math
from typing import Any

from cg_jax import _compat
from cg_jax.ghost.capture import Program, Use, uses_of
from cg_jax.ghost.rules import Norm, Product, lift, rule_for
from cg_jax.ghost.views import isometric_view, undo_view

# Bytes of per-example gradients that may exist at once. On a CPU what fits the cache is several times faster than what
# does not; on an accelerator a chunk must be large enough to fill the device.
_CHUNK_BYTES = {"cpu": 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**28
# Bytes of per-example gradients with respect to views that a group of tensors may build at once.
_GROUP_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class RulePlan:
    """A tensor with one use, seen through rearrangements only, whose primitive has a rule."""

    parameter: int
    use: Use
    view: Any  # variable of the outermost program
    rearranged_by: tuple[Any, ...]  # equations from the parameter to the view
    rule: Product | Norm


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Tensors whose gradients are built, example by example: each site's own vjp, then that of the views.

    Gradients of several uses of one tensor add up before they are squared.
    """

    parameters: tuple[int, ...]
    uses: tuple[tuple[Use, tuple[int, ...]], ...]  # (use, positions of the views)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the engine does with every parameter tensor; tensors in neither list have no gradient."""

    rules: tuple[RulePlan, ...]
    groups: tuple[GroupPlan, ...]


def make_plan(program: Program) -> Plan:
    """The plan for a captured loss."""
    found: dict[int, list[tuple[Use, int]]] = {i: [] for i in range(len(program.parameters))}
    for use in uses_of(program):
        for position in use.site.views:
            for parameter in _parameters(program, use, position):
                found[parameter].append((use, position))
    rules = {i: plan for i, uses in found.items() if (plan := _rule_plan(program, i, uses)) is not None}
    groups = _groups(program, {i: uses for i, uses in found.items() if uses and i not in rules})
    return Plan(tuple(rules.values()), groups)


def _parameters(program: Program, use: Use, position: int) -> frozenset[int]:
    """The parameters that an operand of a use is a view of."""
    return frozenset().union(*(program.reach[var] for var in use.variables(position)))


def _rule_plan(program: Program, parameter: int, uses: list[tuple[Use, int]]) -> RulePlan | None:
    if len(uses) != 1:
        return None
    ((use, position),) = uses
    if len(use.site.views) != 1 or len(use.variables(position)) != 1:
        return None
    (view,) = use.variables(position)
    chain = isometric_view(program, view)
    rule = _rule(use, position) if chain is not None else None
    return None if rule is None else RulePlan(parameter, use, view, tuple(chain or ()), rule)


def _rule(use: Use, position: int) -> Product | Norm | None:
    """The rule of a use, in terms of the outermost program's variables."""
    rule, nested = rule_for(use.site.eqn, position), use.nested
    if rule is None or nested is None:
        return rule
    view = use.site.eqn.invars[position]
    chain = isometric_view(nested.body, view)
    if chain is None or isinstance(rule, Norm):
        return None
    source = chain[0].invars[0] if chain else view
    undone = rule._replace(to_view=lambda g: undo_view(chain, source, view, rule.to_view(g)), rearranges=True)
    return undone if nested.call.length is None else lift(undone, nested.call.length, nested.is_slice(source))


def _groups(program: Program, found: dict[int, list[tuple[Use, int]]]) -> tuple[GroupPlan, ...]:
    """Tensors that share a view (a product of two, a concatenation) go together, all others alone."""
    group_of = {parameter: {parameter} for parameter in found}
    for uses in found.values():
        for use, position in uses:
            joined = set().union(*(group_of[i] for i in _parameters(program, use, position)))
            group_of.update(dict.fromkeys(joined, joined))
    plans = []
    for members in {id(group): group for group in group_of.values()}.values():
        places: dict[tuple[int, ...], tuple[Use, set[int]]] = {}
        for parameter in members:
            for use, position in found[parameter]:
                places.setdefault(use.key, (use, set()))[1].add(position)
        uses = tuple((use, tuple(sorted(positions))) for _, (use, positions) in sorted(places.items()))
        plans.append(GroupPlan(tuple(sorted(members)), uses))
    return tuple(plans)


def product_form(product: Product) -> str:
    """How ‖Aᵀ B‖² is done: "closed" (T = 1), "gram", or "instantiate", which yields the sum of Aᵀ B as well.

    Gram takes T² (D + P) multiplications, and the sum T D P more; instantiating takes T D P, and writes D P numbers.
    """
    _, t, d, p = product.dims
    if t == 1:
        return "closed"
    if _compat.backend() == "cpu":
        return "gram" if t * t * (d + p) <= 4 * d * p else "instantiate"
    return "gram" if 2 * t * t <= d * p else "instantiate"


def is_faster_flipped(product: Product) -> bool:
    """Whether BᵀA is faster than AᵀB; measured on XLA:CPU, where a wide B wants to stand first."""
    _, _, d, p = product.dims
    return _compat.backend() == "cpu" and 64 <= p < d


def product_chunk(product: Product, itemsize: int) -> int:
    """How many examples' Aᵀ B are built at once."""
    n, t, d, p = product.dims
    limit = _CHUNK_BYTES.get(_compat.backend(), _CHUNK_BYTES_ACCELERATOR)
    if _compat.backend() == "cpu" and not product.rearranges:
        return 8 if 8 * n * d * (p + t) * itemsize <= 4 * limit else 4
    return max(1, limit // (n * d * p * itemsize))


def group_chunk(program: Program, group: GroupPlan) -> int:
    """How many examples' gradients of a group are built at once."""
    views = {var for use, positions in group.uses for p in positions for var in use.variables(p)}
    variables = [*views, *(program.parameters[i] for i in group.parameters)]
    size = sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in variables)
    return max(1, _GROUP_BYTES // max(size, 1))
