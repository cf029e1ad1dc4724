"""Find the parameter uses of a loss: the equations in which a parameter meets a value of the example.

A value is *static* if it follows from parameters and constants alone. Otherwise it depends on the example and is
*dynamic*. A `Site` is an equation with a static operand that carries a gradient to a parameter, and with a dynamic
result through which that gradient passes. Its static operands are *views* of the parameters. They are computed once,
outside the batch. If no gradient passes (a stop_gradient before or after it), there is no site and no cost.

The body of a scan or of a checkpoint is a program too (`Nested`). Its parameters are the views that the equation
receives. An equation that does not fit, for example with a parameter in the carry, stays one opaque site.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax._loss import LossFn, checked_pair
from cg_jax._types import PyTree
from cg_jax.ghost import activity, primitives
from cg_jax.ghost.evaluation import is_var, leading_to, read_all
from cg_jax.ghost.primitives import calls

Dynamic = Sequence[tuple[Any, tuple[int, ...]]]  # equations, and which of their results carry a tangent


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation in which views of parameters meet values of the example."""

    eqn: Any
    views: tuple[int, ...]  # positions of the operands that carry a gradient to a parameter
    dynamic: tuple[int, ...]  # positions of the operands that depend on the example
    tangents: tuple[int, ...]  # positions of all operands that carry a tangent in jax.grad
    taps: tuple[int, ...]  # positions of the outputs that a gradient passes through


@dataclasses.dataclass(frozen=True)
class Nested:
    """A scan or a checkpoint with sites in its body, whose parameters are operands of the equation."""

    eqn: Any
    call: calls.Body
    body: "Program"
    operands: dict[Any, Any]  # static variable of the body → variable or literal of the outer program
    checkpoint: Any  # the checkpoint equation in the body of a scan, if any: every step runs as that checkpoint

    def is_slice(self, var: Any) -> bool:
        """Whether a parameter of the body is a slice of its operand, a different one in every step."""
        return self.call.length is not None and var in self.slices

    @property
    def slices(self) -> tuple[Any, ...]:
        """The body's variables that stand for slices."""
        return self.body.all_inputs[self.call.num_consts + self.call.num_carry :]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function as one flat list of equations, with the static ones separate."""

    constants: dict[Any, Any]
    all_inputs: tuple[Any, ...]
    parameters: tuple[Any, ...]  # variables whose gradients are wanted
    inputs: tuple[Any, ...]  # variables that depend on the example
    static: tuple[Any, ...]  # equations to evaluate once
    dynamic: tuple[Any, ...]  # equations to evaluate for each example
    sites: dict[int, Site | Nested]  # index into `dynamic` → site
    # Index into `dynamic` → positions of static operands that a custom rule must see differentiated.
    marks: dict[int, tuple[int, ...]]
    reach: dict[Any, frozenset[int]]  # static variable → parameters that its gradient reaches
    outputs: tuple[Any, ...]
    producers: dict[Any, Any]  # static variable → its equation
    depends: bool  # whether the first output is computed from a parameter, with a gradient or without

    @functools.cached_property
    def has_custom_vjp(self) -> bool:
        """Whether the backward pass may turn a zero cotangent into a nonzero one."""
        return any(calls.has_custom_vjp(eqn) for eqn in (*self.static, *self.dynamic))

    def is_dynamic(self) -> bool:
        """Whether the loss depends on the example. If not, it is the same for all."""
        return any(self.outputs[0] in eqn.outvars for eqn in self.dynamic)


class Use(NamedTuple):
    """A site and its position."""

    key: tuple[int, ...]  # index into Program.dynamic, and into that of the nested body
    site: Site
    nested: Nested | None

    def variables(self, position: int) -> frozenset[Any]:
        """The outermost program's variables that the operand at `position` is a view of."""
        var = self.site.eqn.invars[position]
        if self.nested is None:
            return frozenset({var})
        body = self.nested.body
        return frozenset(self.nested.operands[body.parameters[i]] for i in body.reach[var])


def uses_of(program: Program) -> Iterator[Use]:
    """All sites in order, including those in bodies."""
    for index, site in program.sites.items():
        if isinstance(site, Site):
            yield Use((index,), site, None)
            continue
        for inner, inner_site in site.body.sites.items():
            assert isinstance(inner_site, Site)  # one level deep
            yield Use((index, inner), inner_site, site)


def _inline(
    jaxpr: Any, constants: Sequence[Any], operands: Sequence[Any], in_body: bool, around: Any = None
) -> list[Any]:
    """Evaluate `jaxpr` with nested calls in place. Tracing this gives one flat list of equations.

    Only one level of bodies is opened. So a checkpoint in the body of a scan is opened too (each step runs as that
    checkpoint, see `Nested`), and a checkpoint around a scan moves into its body.
    """
    env = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, operands, strict=True))

    for eqn in jaxpr.eqns:
        values = read_all(eqn.invars, env)
        opened = calls.is_checkpoint(eqn) and (in_body or calls.holds_scan(eqn))
        inner = calls.inner_jaxpr(eqn, opened)
        with _compat.keep_line(eqn):
            if primitives.of(eqn).is_scan and not in_body:
                for i in calls.carry_of(eqn):
                    values[i] = jnp.copy(values[i])  # its one use if a parameter starts a carry, see `_classify`
            if inner is not None:
                outs = _inline(*inner, values, in_body, eqn if opened else around)
            elif around is not None and primitives.of(eqn).is_scan and not in_body:
                outs = calls.scan_of_checkpoints(eqn, around, values)
            else:
                outs = _compat.bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return read_all(jaxpr.outvars, env)


def _flat(jaxpr: Any, constants: Sequence[Any], in_body: bool) -> Any:
    """`jaxpr`, closed, without nested calls."""
    avals = [var.aval for var in jaxpr.invars]
    return jax.make_jaxpr(lambda *operands: _inline(jaxpr, constants, operands, in_body))(*avals)


def capture(loss_fn: LossFn, kept: PyTree, rest: PyTree, example: PyTree, has_aux: bool = False) -> tuple[Program, Any]:
    """Trace loss_fn at the differentiable leaves `kept` and one example: (program, structure of the auxiliary values).

    The program's outputs are the loss and the leaves of the auxiliary values.
    """
    pair = checked_pair(loss_fn, rest, has_aux=has_aux)
    closed, (_, aux) = jax.make_jaxpr(pair, return_shape=True)(kept, example)
    flat = _flat(closed.jaxpr, closed.consts, in_body=False)
    split = len(jax.tree.leaves(kept))
    parameters, inputs = flat.jaxpr.invars[:split], flat.jaxpr.invars[split:]
    return _classify(flat, parameters, inputs, (), flat.jaxpr.outvars[:1], nest=True), jax.tree.structure(aux)


def _classify(
    flat: Any,
    parameters: Sequence[Any],
    inputs: Sequence[Any],
    active: Sequence[Any],
    results: Sequence[Any],
    nest: bool,
) -> Program:
    """Sort the equations of a flat jaxpr. With `nest`, open the bodies of scans and checkpoints.

    `active` are the inputs that carry a tangent. `results` are the variables that cotangents come from.
    """
    reach: dict[Any, frozenset[int]] = {var: frozenset({i}) for i, var in enumerate(parameters)}
    depends, varying, carrying = set(parameters), set(inputs), set(active)
    static: list[Any] = []
    dynamic: list[tuple[Any, tuple[int, ...]]] = []
    begins = calls.copies_into_carries(flat.jaxpr.eqns) if nest else set()
    for eqn in leading_to([out for out in flat.jaxpr.outvars if is_var(out)], flat.jaxpr.eqns):
        operands = [None if _compat.is_literal(atom) else atom for atom in eqn.invars]
        if any(var in depends for var in operands):
            depends.update(eqn.outvars)
        passing = [i for i, var in enumerate(operands) if var in carrying or reach.get(var)]
        outs = activity.active_outputs(eqn, passing) if passing else ()
        # An equation without a value of the example may still have to run for each example, for its side effect. A
        # parameter that starts a carry meets the example there, so that the scan receives one for each example.
        is_use = bool(outs) and any(out in begins for out in eqn.outvars)
        if not any(var in varying for var in operands) and not eqn.effects and not is_use:
            static.append(eqn)
            touched = frozenset().union(*(reach.get(var, frozenset()) for var in operands))
            if primitives.of(eqn).is_many:  # many operands at once, each with its own result
                reach.update((eqn.outvars[k], reach[var]) for k, var in enumerate(operands) if reach.get(var))
            else:
                reach.update((eqn.outvars[k], touched) for k in outs)
            continue
        varying.update(eqn.outvars)
        carrying.update(eqn.outvars[k] for k in outs)
        dynamic.append((eqn, outs))
    return Program(
        constants=dict(zip(flat.jaxpr.constvars, map(jnp.asarray, flat.consts), strict=True)),
        all_inputs=tuple(flat.jaxpr.invars),
        parameters=tuple(parameters),
        inputs=tuple(inputs),
        static=tuple(static),
        dynamic=tuple(eqn for eqn, _ in dynamic),
        sites=_sites(dynamic, reach, varying, carrying, results, nest),
        marks=_marks(dynamic, reach),
        reach=reach,
        outputs=tuple(flat.jaxpr.outvars),
        producers={out: eqn for eqn in static for out in eqn.outvars},
        depends=any(out in depends for out in flat.jaxpr.outvars[:1] if is_var(out)),
    )


def _marks(dynamic: Dynamic, reach: dict[Any, frozenset[int]]) -> dict[int, tuple[int, ...]]:
    """The operands that parameters reach of each equation with a rule of its own, by index into `dynamic`."""
    return {
        index: tuple(i for i, var in enumerate(eqn.invars) if is_var(var) and reach.get(var))
        for index, (eqn, outs) in enumerate(dynamic)
        if outs and calls.has_custom_rule(eqn)
    }


def _sites(
    dynamic: Dynamic,
    reach: dict[Any, frozenset[int]],
    varying: set[Any],
    carrying: set[Any],
    results: Sequence[Any],
    nest: bool,
) -> dict[int, Site | Nested]:
    """The sites where a cotangent from the results meets a parameter, by index into `dynamic`."""
    wanted = {out for out in results if is_var(out) and out in carrying}
    sites: dict[int, Site | Nested] = {}
    for index in reversed(range(len(dynamic))):
        eqn, outs = dynamic[index]
        taps = tuple(k for k in outs if eqn.outvars[k] in wanted)
        if not taps:
            continue
        operands = [None if _compat.is_literal(atom) else atom for atom in eqn.invars]
        wanted.update(var for var in operands if var in carrying)
        views = tuple(i for i, var in enumerate(operands) if reach.get(var))
        if views:
            moving = tuple(i for i, var in enumerate(operands) if var in varying)
            tangents = tuple(i for i, var in enumerate(operands) if var in carrying or i in views)
            site = Site(eqn, views, moving, tangents, taps)
            sites.update((index, each) for each in _taken_apart(site, outs, nest))
    return dict(sorted(sites.items()))


def _taken_apart(site: Site, outs: tuple[int, ...], nest: bool) -> list[Site | Nested]:
    """The sites in a site: those of its body, the site itself, or none if no gradient passes from any view."""
    nested = _nested(site, outs) if nest else None
    if nested is not None:
        return [nested] if nested.body.sites else []
    views = site.views
    if not activity.passes_on(site.eqn):
        views = tuple(i for i in views if set(activity.active_outputs(site.eqn, [i])) & set(site.taps))
    return [dataclasses.replace(site, views=views)] if views else []


def _nested(site: Site, outs: tuple[int, ...]) -> Nested | None:
    """The body of a scan or checkpoint as a program, or None if its sites cannot be separated.

    That is so if a parameter is in the carry, if a result depends on parameters alone, or if a custom_vjp is between a
    parameter and its uses. The custom_vjp must receive the sum of their cotangents, not one after the other.
    """
    eqn, call = site.eqn, calls.body_of(site.eqn)
    if call is None or eqn.effects or call.length == 0:
        return None
    carry = range(call.num_consts, call.num_consts + call.num_carry)
    if set(site.views) & set(carry):
        return None
    flat = _flat(call.jaxpr, call.consts, in_body=True)
    variables = flat.jaxpr.invars
    # A carried value changes in every step. So it is never static, even if it is the same for all examples.
    inputs = [var for i, var in enumerate(variables) if i in site.dynamic or i in carry]
    active = [variables[i] for i in site.tangents if i in site.dynamic and i not in carry]
    active += [variables[call.num_consts + k] for k in outs if k < call.num_carry]
    results = [flat.jaxpr.outvars[k] for k in _results_of_body(flat, call, site.taps, outs)]
    body = _classify(flat, [variables[i] for i in site.views], inputs, active, results, nest=False)
    has_custom_vjp = any(calls.has_custom_vjp(static) for static in body.static)
    if has_custom_vjp or any(body.reach.get(out) for out in body.outputs if is_var(out)):
        return None
    operands = {var: eqn.invars[i] for i, var in enumerate(variables) if i not in site.dynamic and i not in carry}
    return Nested(eqn, call, body, operands, None if call.length is None else calls.checkpoint_in(call.jaxpr))


def _results_of_body(flat: Any, call: calls.Body, taps: tuple[int, ...], outs: tuple[int, ...]) -> set[int]:
    """The results of a body that cotangents come from. For a carry, also through later steps."""
    results, carried = set(taps), {k for k in outs if k < call.num_carry}
    while True:
        used = leading_to([v for k in results if is_var(v := flat.jaxpr.outvars[k])], flat.jaxpr.eqns)
        atoms = [*(atom for eqn in used for atom in eqn.invars), *(flat.jaxpr.outvars[k] for k in results)]
        read = {atom for atom in atoms if is_var(atom)}
        more = {k for k in carried - results if flat.jaxpr.invars[call.num_consts + k] in read}
        if not more:
            return results
        results |= more
