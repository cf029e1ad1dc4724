"""Build gradients of some tensors example by example, by the vjp of every site.

This is exact for any primitive, and for tensors with several uses, whose gradients add up before they are squared.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax._types import PyTree
from cg_jax.ghost import primitives, varying
from cg_jax.ghost.capture import Nested, Site, Use
from cg_jax.ghost.evaluation import differentiated, evaluate, is_var, leading_to, read_all
from cg_jax.ghost.passes import Pass
from cg_jax.ghost.plan import GroupPlan
from cg_jax.ghost.primitives.calls import has_custom_rule
from cg_jax.ghost.views import path_to, undo

# The trace of a use for one example: its dynamic operands, and the cotangents of its outputs.
Trace = tuple[list[jax.Array], list[jax.Array]]


def by_sites(of: Pass, group: GroupPlan) -> Callable[[Any], list[jax.Array]]:
    """The function (traces of the group's uses for one example) → the gradients of the group's tensors."""
    views = list({var: None for use, positions in group.uses for p in positions for var in use.variables(p)})
    widely = _widely(of, group, views)
    if widely is not None:
        return widely
    _, to_parameters = view_pullback(of, group.parameters, views)

    def gradient(traces: list[Trace]) -> list[jax.Array]:
        total = {view: varying.zeros(view.aval) for view in views}
        for (use, positions), trace in zip(group.uses, traces, strict=True):
            for view, part in of_use(use, positions, of.env, trace):
                total[view] += part
        return trees.accumulate(to_parameters([total[view] for view in views]))

    return gradient


def _widely(of: Pass, group: GroupPlan, views: Sequence[Any]) -> Callable[[list[Trace]], list[jax.Array]] | None:
    """The gradient of one narrow tensor from elementwise uses, in the accumulator dtype. None for other tensors."""
    program, env = of.program, of.env
    (parameter, *more) = group.parameters
    variable = program.parameters[parameter]
    dtype = trees.accumulator_dtype(variable.aval.dtype)
    paths = {view: path_to(program, parameter, view) for view in views} if not more else {}
    if more or dtype == variable.aval.dtype or any(path is None for path in paths.values()):
        return None
    if any(use.nested or len(at) > 1 or not primitives.of(use.site.eqn).is_widened for use, at in group.uses):
        return None

    def widen(value: Any) -> Any:
        return value.astype(dtype) if trees.is_differentiable(value) else value

    def read(atom: Any) -> Any:
        return env[atom] if is_var(atom) else atom.val

    def gradient(traces: list[Trace]) -> list[jax.Array]:
        total = _compat.vary(jnp.zeros(variable.aval.shape, dtype), _compat.varying_axes(traces))
        for (use, (position,)), (seen, cotangents) in zip(group.uses, traces, strict=True):
            values = [widen(value) for value in operands_of(use.site, env, seen)]

            def result(view: jax.Array, use: Use = use, position: int = position, values: Any = values) -> jax.Array:
                return _compat.bind(use.site.eqn, [view if i == position else v for i, v in enumerate(values)])[0]

            (part,) = jax.vjp(result, values[position])[1](widen(cotangents[0]))
            total += undo(paths[use.site.eqn.invars[position]] or [], env[variable], part, read)
        return [total]

    return gradient


def view_pullback(
    of: Pass, parameters: Sequence[int], views: Sequence[Any]
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]]]:
    """(the values of some views, the function (their cotangents) → the gradients of some parameters)."""
    program, env = of.program, of.env
    if list(views) == [program.parameters[i] for i in parameters]:  # nothing to trace
        return [env[view] for view in views], lambda cotangents: cotangents
    transformed = leading_to(views, program.static)
    # With respect to all tensors of the views, as in jax.grad: a rule may ask which operands are differentiated.
    reached = sorted(frozenset(parameters).union(*(program.reach[view] for view in views)))
    variables = [program.parameters[i] for i in reached]

    def values_of(values: list[jax.Array]) -> list[jax.Array]:
        local = env | dict(zip(variables, values, strict=True))
        evaluate(transformed, local)
        return [local[view] for view in views]

    outs, pull = jax.vjp(values_of, [env[variable] for variable in variables])

    def gradients(cotangents: list[jax.Array]) -> list[jax.Array]:
        by_parameter = dict(zip(reached, pull(cotangents)[0], strict=True))
        return [by_parameter[i] for i in parameters]

    return outs, gradients


def by_whole_loss(of: Pass, group: GroupPlan) -> Callable[[Any], list[jax.Array]]:
    """The function (one example) → the gradients of the group's tensors, by the vjp of the whole (loss, aux)."""
    leaves, structure = jax.tree.flatten(of.kept)

    def gradient(example: PyTree) -> list[jax.Array]:
        # With respect to all tensors, as in jax.grad: a rule may ask which operands are differentiated. Gradients that
        # are not used are not computed.
        grads, _ = jax.grad(lambda values: of.loss(jax.tree.unflatten(structure, values), example), has_aux=True)(
            leaves
        )
        return trees.accumulate([grads[i] for i in group.parameters])

    return gradient


def _marks(site: Site, positions: Sequence[int]) -> list[int]:
    """The operands beside those at `positions` that a custom rule must see differentiated."""
    return [i for i in site.tangents if i not in positions] if has_custom_rule(site.eqn) else []


def operands_of(site: Site, env: dict[Any, Any], seen: list[jax.Array]) -> list[Any]:
    """All operands of a site for one example. Static ones come from `env`."""
    values = [atom.val if _compat.is_literal(atom) else env.get(atom) for atom in site.eqn.invars]
    for position, value in zip(site.dynamic, seen, strict=True):
        values[position] = value
    return values


def of_use(use: Use, positions: tuple[int, ...], env: dict[Any, Any], trace: Trace) -> list[tuple[Any, jax.Array]]:
    """The gradients of one example with respect to the outermost variables of the views of a use."""
    seen, cotangents = trace
    if use.nested is not None:
        return _of_nested(use, use.nested, positions, env, trace)
    if primitives.of(use.site.eqn).is_sum and len(positions) == 1:
        (view,) = (use.site.eqn.invars[p] for p in positions)
        if view.aval.shape == cotangents[0].shape:  # nothing to trace
            return [(view, cotangents[0].astype(view.aval.dtype))]
    outputs, views = outputs_by_views(use.site, positions, env, seen)
    _, pull = jax.vjp(outputs, views, jnp.zeros(()))
    return [(use.site.eqn.invars[p], part) for p, part in zip(positions, pull(cotangents)[0], strict=True)]


def outputs_by_views(
    site: Site, positions: tuple[int, ...], env: dict[Any, Any], seen: list[jax.Array]
) -> tuple[Callable[[list[jax.Array], jax.Array], list[jax.Array]], list[jax.Array]]:
    """(one example's tapped outputs of a site as a function of the views at `positions` and a zero, the views' values).

    If it is differentiated with respect to both, the operands that carry a tangent are the same as in jax.grad.
    """
    values = operands_of(site, env, seen)
    others = _marks(site, positions)

    def outputs(views: list[jax.Array], zero: jax.Array) -> list[jax.Array]:
        filled = differentiated(others, values, zero)
        for position, view in zip(positions, views, strict=True):
            filled[position] = view
        outs = _compat.bind(site.eqn, filled)
        return [outs[k] for k in site.taps]

    return outputs, [values[position] for position in positions]


def _of_nested(
    use: Use, nested: Nested, positions: tuple[int, ...], env: dict[Any, Any], trace: Trace
) -> list[tuple[Any, jax.Array]]:
    """`of_use` for a use in the body of a checkpoint, or of a scan, step by step."""
    site, body = use.site, nested.body
    reached = frozenset().union(*(body.reach[site.eqn.invars[p]] for p in positions))
    wanted = [body.parameters[i] for i in sorted(reached)]
    sliced = [var for var in nested.operands if nested.is_slice(var)]
    fixed = [var for var in nested.operands if not nested.is_slice(var)]
    local = body.constants | dict(zip(fixed, read_all([nested.operands[var] for var in fixed], env), strict=True))

    def of_step(slices: list[Any], seen: list[jax.Array], cotangents: list[jax.Array]) -> list[jax.Array]:
        step = local | dict(zip(sliced, slices, strict=True))

        def outputs(values: list[jax.Array], zero: jax.Array) -> list[jax.Array]:
            filled = step | dict(zip(wanted, values, strict=True))
            evaluate(body.static, filled)
            operands = operands_of(site, filled, seen)
            outs = _compat.bind(site.eqn, differentiated(others, operands, zero))
            return [outs[k] for k in site.taps]

        _, pull = jax.vjp(outputs, [step[var] for var in wanted], jnp.zeros(()))
        return pull(cotangents)[0]

    others = _marks(site, positions)
    outer = [nested.operands[var] for var in wanted]
    if nested.call.length is None:
        return list(zip(outer, of_step([], *trace), strict=True))

    def step(totals: list[jax.Array], row: tuple[list[Any], list[jax.Array], list[jax.Array]]) -> tuple[Any, Any]:
        parts = dict(zip(wanted, of_step(*row), strict=True))
        added = [total + parts[var] for total, var in zip(totals, shared, strict=True)]
        return added, [parts[var] for var in wanted if var not in shared]

    shared = [var for var in wanted if not nested.is_slice(var)]
    zeros = [varying.zeros(var.aval) for var in shared]
    rows = (read_all([nested.operands[var] for var in sliced], env), *trace)
    totals, stacked = jax.lax.scan(step, zeros, rows)
    apart = [var for var in wanted if var not in shared]
    by_variable = dict(zip([*shared, *apart], [*totals, *stacked], strict=True))
    return [(nested.operands[var], by_variable[var]) for var in wanted]
