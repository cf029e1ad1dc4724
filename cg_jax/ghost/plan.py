"""Choose the method for each parameter tensor: a rule for its uses, or its gradients, example by example."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax.ghost import primitives
from cg_jax.ghost.activity import has_reverse_mode
from cg_jax.ghost.capture import Program, Use, uses_of
from cg_jax.ghost.evaluation import is_var, leading_to
from cg_jax.ghost.inline import InlinePlan, inline_plan
from cg_jax.ghost.norm import Norm, lift_norm
from cg_jax.ghost.primitives.calls import has_custom_vjp
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import product_chunk, product_form
from cg_jax.ghost.rules import rule_for
from cg_jax.ghost.uses import Path, Place, path_of, product_of, together
from cg_jax.ghost.views import is_isometric, path_to

# The default limit on the bytes of the per-example arrays of one tensor.
_MAX_BYTES = {"cpu": 2**26}
_MAX_BYTES_ACCELERATOR = 2**28
# A chunk larger than any batch.
ANY_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Tensors whose gradients are built example by example, by the vjp of each site and then of the views.

    Gradients of several uses of one tensor add up before they are squared.
    """

    parameters: tuple[int, ...]
    uses: tuple[tuple[Use, tuple[int, ...]], ...]  # (use, positions of the views)
    reasons: tuple[str, ...]  # for each parameter, why it has no rule; empty if its use is elementwise
    whole_loss: bool  # by vmap(grad) of the loss: a site has no reverse mode of its own, or its vjp costs more
    chunk: int


@dataclasses.dataclass(frozen=True)
class RulePlan:
    """A tensor with a rule for its uses: one use, or several that form one product."""

    parameter: int
    places: tuple[Place, ...]
    paths: tuple[Path, ...]  # from the parameter, one for each place
    # A product here gives sizes for planning; use `bound` to compute. None: the tensor has numbers alone.
    rule: Product | Norm | None
    form: str  # "closed", "gram" or "instantiate" for a product; "norm"
    chunk: int  # examples whose arrays exist at once
    itemsize: int  # of the tensor's accumulator dtype
    numbers: tuple[Place, ...] = ()  # uses of numbers computed from the tensor, such as a penalty
    exact: GroupPlan | None = None  # with numbers: the plan by built gradients, if the terms of the rule cancel

    def bound(self, program: Program, env: dict[Any, Any]) -> Product:
        """The product, given the static values."""
        pairs = zip(self.places, self.paths, strict=True)
        alone = len(self.places) == 1
        products = [product_of(program, place, path, self.parameter, env, alone) for place, path in pairs]
        product = products[0] if len(products) == 1 else together([each for each in products if each is not None])
        assert product is not None  # `_rule_plan` has one without values
        return product


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the engine does with every parameter tensor. Tensors in no list have no gradient."""

    rules: tuple[RulePlan, ...]
    groups: tuple[GroupPlan, ...]
    inline: tuple[InlinePlan, ...] = ()  # norms inside the backward pass
    is_vmap: bool = False  # all by vmap(grad) of the loss, which is then the one pass


def bytes_at_once(max_bytes: int | None) -> int:
    """The limit on the bytes of the arrays of one tensor."""
    return max_bytes or _MAX_BYTES.get(jax.default_backend(), _MAX_BYTES_ACCELERATOR)


def by_whole_loss(program: Program, members: tuple[int, ...], reason: str, max_bytes: int | None) -> GroupPlan:
    """The plan of tensors by vmap(grad) of the loss."""
    places = uses_by_parameter(program)
    group = _group(program, members, places, dict.fromkeys(members, reason), bytes_at_once(max_bytes))
    return dataclasses.replace(group, whole_loss=True)


def make_plan(program: Program, max_bytes: int | None = None, norms_inside: bool = True) -> Plan:
    """The plan for a captured loss. `max_bytes` bounds the arrays of one tensor, for chunks of at least one example.

    With `norms_inside`, norms may be taken inside the backward pass of a scan.
    """
    limit = bytes_at_once(max_bytes)
    places = uses_by_parameter(program)
    numbers = _numbers(program, places)
    rules: list[RulePlan] = []
    inline: list[InlinePlan] = []
    reasons: dict[int, str] = {}
    for parameter, of_one in places.items():
        shared = tuple(place for place in of_one if _key(place) in numbers)
        others = [place for place in of_one if _key(place) not in numbers]
        if not of_one:
            continue
        inside = None
        if norms_inside and not shared:
            inside = inline_plan(program, parameter, others, functools.partial(_form, limit), limit)
        if inside is not None:
            inline.append(inside)
            continue
        plan = _rule_plan(program, parameter, others, limit) if others else _number_plan(program, parameter, shared)
        if isinstance(plan, RulePlan) and shared and isinstance(plan.rule, Norm) and plan.paths[0].length is not None:
            plan = "looked up in a scan, and a penalty: gradients add up before they are squared"
        if isinstance(plan, str):
            reasons[parameter] = plan
        elif shared:
            exact = _group(program, (parameter,), places, {}, limit)
            rules.append(dataclasses.replace(plan, numbers=shared, exact=exact))
        else:
            rules.append(plan)
    groups = _groups(program, {i: places[i] for i in reasons}, numbers, reasons, limit)
    return Plan(tuple(rules), groups, tuple(inline))


def _form(limit: int, product: Product) -> tuple[str, int]:
    """(form, chunk) of a product whose sum is computed separately."""
    form = product_form(product)
    return form, product_chunk(product, form, 4, limit)


def _key(place: Place) -> tuple[tuple[int, ...], int]:
    """The key that identifies a place."""
    return place[0].key, place[1]


def _numbers(program: Program, places: dict[int, list[Place]]) -> set[Any]:
    """The keys of all places that use a number computed from tensors."""
    once = {_key(place): place for of_one in places.values() for place in of_one}
    return {key for key, place in once.items() if _is_number(program, *place)}


def _is_number(program: Program, use: Use, position: int) -> bool:
    """Whether an operand is one real number computed from larger tensors.

    Its gradient is then the same for all examples, except for a factor, its cotangent: see `scalars`.
    """
    var = use.site.eqn.invars[position]
    if use.nested is not None or var.aval.size != 1 or not jnp.issubdtype(var.aval.dtype, jnp.floating):
        return False
    steps = [path_to(program, parameter, var) for parameter in program.reach[var]]
    if all(each is not None and is_isometric(each) for each in steps):
        return False
    if not has_reverse_mode(use.site.eqn, [position]):
        return False
    return not any(map(has_custom_vjp, (use.site.eqn, *leading_to([var], program.static))))


def _number_plan(program: Program, parameter: int, numbers: tuple[Place, ...]) -> RulePlan | str:
    """The plan of a tensor that meets the example through numbers alone, gᵢ = cᵢ v, or why there is none."""
    if len({use.site.eqn.invars[position] for use, position in numbers}) > 1:
        return "several numbers are made of it: gradients add up before they are squared"
    itemsize = trees.accumulator_dtype(program.parameters[parameter].aval.dtype).itemsize
    return RulePlan(parameter, (), (), None, "closed", ANY_CHUNK, itemsize)


def uses_by_parameter(program: Program) -> dict[int, list[Place]]:
    """The uses of every parameter, with the position of the operand that is a view of it."""
    places: dict[int, list[Place]] = {i: [] for i in range(len(program.parameters))}
    for use in uses_of(program):
        for position in use.site.views:
            for parameter in _parameters(program, use, position):
                places[parameter].append((use, position))
    return places


def _parameters(program: Program, use: Use, position: int) -> frozenset[int]:
    """The parameters that an operand of a use is a view of."""
    return frozenset().union(*(program.reach[var] for var in use.variables(position)))


def _rule_plan(program: Program, parameter: int, places: list[Place], limit: int) -> RulePlan | str:
    """The plan of a tensor by a rule, or why there is none: empty for an elementwise use, which needs no rule."""
    many = f"used {len(places)} times: gradients add up before they are squared"
    ways = [path_of(program, use, position, parameter) for use, position in places]
    if len(places) == 1 and (reason := _without_rule(program, places[0], ways[0])) is not None:
        return reason
    paths = tuple(path for path in ways if path is not None)
    if len(paths) < len(places):
        return many
    itemsize = trees.accumulator_dtype(program.parameters[parameter].aval.dtype).itemsize
    if len(places) == 1 and (rule := _norm(places[0], paths[0])) is not None:
        return RulePlan(parameter, tuple(places), paths, rule, "norm", _norm_chunk(places[0][0], limit), itemsize)
    products = []
    for place, path in zip(places, paths, strict=True):
        product = product_of(program, place, path, parameter, alone=len(places) == 1)
        if product is None:
            return many if len(places) > 1 else f"transformed by more than a linear view before {_name(place)}"
        products.append(product)
    product = products[0] if len(products) == 1 else together(products)
    if product is None:
        return many
    form = product_form(product)
    if len(places) > 1 and form == "instantiate":
        return many  # gradients that are built for each use can be added up as well
    if not product.rearranges and places[0][0].nested is not None:
        form = "instantiate"  # the primitive's own vjp, which would compute the sum, is in the body
    chunk = product_chunk(product, form, itemsize, limit)
    return RulePlan(parameter, tuple(places), paths, product, form, chunk, itemsize)


def _without_rule(program: Program, place: Place, path: Path | None) -> str | None:
    """Why the one use of a tensor has no rule. Empty if it needs none, None if it has one."""
    use, position = place
    name = _name(place)
    if primitives.of(use.site.eqn).is_scan:
        return "the scan is taken whole: a parameter is in its carry, or its body cannot be taken apart"
    rule = rule_for(use.site.eqn, position)
    rule = _norm(place, path) if isinstance(rule, Norm) else rule
    if rule is None and primitives.of(use.site.eqn).is_elementwise and _is_cheap(program, use, position):
        return ""
    if path is None:
        return f"transformed by other parameters or in several ways before {name}"
    if rule is None:
        where = "in the body of a scan or checkpoint" if use.nested else "here"
        return f"no rule for {name} {where}: its own vjp"
    return None


def _norm(place: Place, path: Path | None) -> Norm | None:
    """The rule of a use that places or adds up cotangents, over all steps if it is in a scan."""
    use, position = place
    rule = rule_for(use.site.eqn, position)
    if not isinstance(rule, Norm) or path is None or not path.is_isometric or path.inner:
        return None
    if path.length is None:
        return rule
    others = [atom for i, atom in enumerate(use.site.eqn.invars) if i != position and i not in use.site.dynamic]
    return None if any(map(is_var, others)) else lift_norm(rule, path.is_slice)


def _name(place: Place) -> str:
    return place[0].site.eqn.primitive.name


def _is_cheap(program: Program, use: Use, position: int) -> bool:
    """Whether undoing a view costs at most a few operations per entry."""
    views = list(use.variables(position))
    limit = 8 * max(var.aval.size for var in views)
    return all(primitives.operations(eqn) <= limit for eqn in leading_to(views, program.static))


def _groups(
    program: Program, places: dict[int, list[Place]], numbers: set[Any], reasons: dict[int, str], limit: int
) -> tuple[GroupPlan, ...]:
    """Group tensors that share a view (a product of two, a concatenation). All others are alone."""
    group_of = {parameter: {parameter} for parameter in places}
    for of_one in places.values():
        for use, position in of_one:
            if _key((use, position)) not in numbers:
                members = [i for i in _parameters(program, use, position) if i in group_of]
                joined = set().union(*(group_of[i] for i in members))
                group_of.update(dict.fromkeys(joined, joined))
    groups = {id(group): tuple(sorted(group)) for group in group_of.values()}
    return tuple(_group(program, members, places, reasons, limit) for members in groups.values())


def _group(
    program: Program, members: tuple[int, ...], places: dict[int, list[Place]], reasons: dict[int, str], limit: int
) -> GroupPlan:
    """The plan of tensors whose gradients are built at all of their uses."""
    at: dict[tuple[int, ...], tuple[Use, set[int]]] = {}
    for parameter in members:
        for use, position in places[parameter]:
            at.setdefault(use.key, (use, set()))[1].add(position)
    uses = tuple((use, tuple(sorted(positions))) for _, (use, positions) in sorted(at.items()))
    whole = not all(has_reverse_mode(use.site.eqn, positions) for use, positions in uses)
    chunk = max(1, limit // max(group_bytes(program, members, uses), 1))
    return GroupPlan(members, uses, tuple(reasons.get(i, "") for i in members), whole, chunk)


def group_bytes(program: Program, members: tuple[int, ...], uses: tuple[tuple[Use, tuple[int, ...]], ...]) -> int:
    """Bytes of the gradients of a group for one example: of its views and of its tensors."""
    views = {var for use, positions in uses for p in positions for var in use.variables(p)}
    variables = [*views, *(program.parameters[i] for i in members)]
    return sum(math.prod(var.aval.shape) * trees.accumulator_dtype(var.aval.dtype).itemsize for var in variables)


def norm_bytes(use: Use) -> int:
    """Bytes of the cotangent of one example, which the rule of a norm sorts or copies."""
    (out,) = use.site.eqn.outvars
    return math.prod(out.aval.shape) * trees.accumulator_dtype(out.aval.dtype).itemsize


def _norm_chunk(use: Use, limit: int) -> int:
    return max(1, limit // max(1, 2 * norm_bytes(use)))
