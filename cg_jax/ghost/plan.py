"""Which way each parameter tensor goes: a rule for its one use, or its gradient example by example."""

import dataclasses
import math
from typing import Any

from cg_jax import _compat
from cg_jax.ghost.capture import Program, isometric_view
from cg_jax.ghost.rules import Norm, Product, rule_for

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
    site: int  # index into Program.dynamic
    view: Any  # variable
    rearranged_by: tuple[Any, ...]  # equations from the parameter to the view
    rule: Product | Norm


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Tensors whose gradients are built, example by example: each site's own vjp, then that of the views.

    Gradients of several uses of one tensor add up before they are squared.
    """

    parameters: tuple[int, ...]
    sites: tuple[tuple[int, tuple[int, ...]], ...]  # (index into Program.dynamic, positions of the views)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the engine does with every parameter tensor; tensors in neither list have no gradient."""

    rules: tuple[RulePlan, ...]
    groups: tuple[GroupPlan, ...]


def make_plan(program: Program) -> Plan:
    """The plan for a captured loss."""
    uses: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(program.parameters))}
    for index, site in program.sites.items():
        for position in site.views:
            for parameter in program.reach[site.eqn.invars[position]]:
                uses[parameter].append((index, position))
    rules = {i: plan for i, found in uses.items() if (plan := _rule_plan(program, i, found)) is not None}
    groups = _groups(program, {i: found for i, found in uses.items() if found and i not in rules})
    return Plan(tuple(rules.values()), groups)


def _rule_plan(program: Program, parameter: int, uses: list[tuple[int, int]]) -> RulePlan | None:
    if len(uses) != 1:
        return None
    ((index, position),) = uses
    site = program.sites[index]
    view = site.eqn.invars[position]
    chain = isometric_view(program, view)
    rule = rule_for(site.eqn, position) if chain is not None and len(site.views) == 1 else None
    return None if rule is None else RulePlan(parameter, index, view, tuple(chain or ()), rule)


def _groups(program: Program, uses: dict[int, list[tuple[int, int]]]) -> tuple[GroupPlan, ...]:
    """Tensors that share a view (a product of two, a concatenation) go together, all others alone."""
    group_of = {parameter: {parameter} for parameter in uses}
    for found in uses.values():
        for index, position in found:
            together = program.reach[program.sites[index].eqn.invars[position]]
            joined = set().union(*(group_of[i] for i in together))
            group_of.update(dict.fromkeys(joined, joined))
    plans = []
    for members in {id(group): group for group in group_of.values()}.values():
        places: dict[int, set[int]] = {}
        for parameter in members:
            for index, position in uses[parameter]:
                places.setdefault(index, set()).add(position)
        sites = tuple((index, tuple(sorted(places[index]))) for index in sorted(places))
        plans.append(GroupPlan(tuple(sorted(members)), sites))
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


def product_chunk(product: Product, itemsize: int) -> int:
    """How many examples' Aᵀ B are built at once."""
    n, _, d, p = product.dims
    limit = _CHUNK_BYTES.get(_compat.backend(), _CHUNK_BYTES_ACCELERATOR)
    return max(1, limit // (n * d * p * itemsize))


def group_chunk(program: Program, group: GroupPlan) -> int:
    """How many examples' gradients of a group are built at once."""
    views = {program.sites[index].eqn.invars[i] for index, positions in group.sites for i in positions}
    variables = [*views, *(program.parameters[i] for i in group.parameters)]
    size = sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in variables)
    return max(1, _GROUP_BYTES // max(size, 1))
