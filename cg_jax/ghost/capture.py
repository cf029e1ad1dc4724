"""From a loss to its parameter uses: which equations a parameter meets a value of the example in.

A value is *static* when it follows from parameters and constants alone, else *dynamic* (it depends on the example). An
equation with a static operand that carries a gradient to a parameter, and with a dynamic result, is a `Site`. Its
static operands are *views* of the parameters: computed once, outside the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.per_example import LossFn, checked_loss, example_of

PyTree = Any

# Rearrangements: every entry of the operand stands exactly once in the result, so that norms pass through.
_ISOMETRIES = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "convert_element_type"}
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation in which views of parameters meet values of the example."""

    eqn: Any
    views: tuple[int, ...]  # positions of the operands that carry a gradient to a parameter
    dynamic: tuple[int, ...]  # positions of the operands that depend on the example
    taps: tuple[int, ...]  # positions of the outputs that have a gradient


@dataclasses.dataclass(frozen=True)
class Program:
    """The loss of one example as one flat list of equations, static ones apart."""

    constants: dict[Any, Any]
    parameters: tuple[Any, ...]  # variables of the differentiable leaves
    inputs: tuple[Any, ...]  # variables of the example's leaves
    static: tuple[Any, ...]  # equations to evaluate once
    dynamic: tuple[Any, ...]  # equations to evaluate for each example
    sites: dict[int, Site]  # index into `dynamic` → site
    reach: dict[Any, frozenset[int]]  # static variable → parameters that its gradient reaches
    output: Any

    def is_dynamic(self) -> bool:
        """Whether the loss depends on the example; if not, it is the same for all."""
        return bool(self.dynamic) and any(self.output in eqn.outvars for eqn in self.dynamic)

    def reads(self, site: Site) -> list[Any]:
        """The variables of a site's views."""
        return [site.eqn.invars[i] for i in site.views]


def _inline(jaxpr: Any, constants: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr`, nested calls in place: traced anew, it yields one flat list of equations."""
    env = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = _compat.inner_jaxpr(eqn)
        with _compat.keep_source(eqn):
            outs = _compat.bind(eqn, values) if inner is None else _inline(*inner, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(eqns: Sequence[Any], output: Any) -> list[Any]:
    """The equations that the output or a side effect needs, in order."""
    wanted, kept = {output}, []
    for eqn in reversed(eqns):
        if eqn.effects or any(out in wanted for out in eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if not _compat.is_literal(atom))
    return kept[::-1]


def _has_gradient(var: Any) -> bool:
    """Whether a value is real or complex; a complex one may stand on the way from a parameter to the loss."""
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def capture(loss_fn: LossFn, kept: PyTree, rest: PyTree, batch: PyTree) -> Program:
    """Trace loss_fn at the differentiable leaves `kept` and one example of `batch`."""
    example = example_of(batch)
    closed = jax.make_jaxpr(checked_loss(loss_fn, rest))(kept, example)
    leaves = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    closed = jax.make_jaxpr(lambda *operands: _inline(closed.jaxpr, closed.consts, operands))(*leaves)
    jaxpr = closed.jaxpr
    split = len(jax.tree.leaves(kept))
    parameters, inputs = jaxpr.invars[:split], jaxpr.invars[split:]
    (output,) = jaxpr.outvars

    reach: dict[Any, frozenset[int]] = {var: frozenset({i}) for i, var in enumerate(parameters)}
    varying = set(inputs)
    static, dynamic, sites = [], [], {}
    for eqn in [] if _compat.is_literal(output) else _needed(jaxpr.eqns, output):
        operands = [None if _compat.is_literal(atom) else atom for atom in eqn.invars]
        views = tuple(i for i, var in enumerate(operands) if reach.get(var))
        moving = tuple(i for i, var in enumerate(operands) if var in varying)
        # What draws nothing from the example may still have to run for each of them: a side effect.
        if not moving and not eqn.effects:
            static.append(eqn)
            touched = frozenset().union(*(reach[operands[i]] for i in views))
            reach.update((out, touched) for out in eqn.outvars if touched and _has_gradient(out))
            continue
        varying.update(eqn.outvars)
        if views:
            taps = tuple(i for i, out in enumerate(eqn.outvars) if _has_gradient(out))
            sites[len(dynamic)] = Site(eqn, views, moving, taps)
        dynamic.append(eqn)
    return Program(
        constants=dict(zip(jaxpr.constvars, closed.consts, strict=True)),
        parameters=tuple(parameters),
        inputs=tuple(inputs),
        static=tuple(static),
        dynamic=tuple(dynamic),
        sites=sites,
        reach=reach,
        output=output,
    )


def reaches_parameters(program: Program) -> bool:
    """Whether any gradient flows from the loss to a parameter."""
    return bool(program.sites) or bool(program.reach.get(program.output))


def evaluate(eqns: Sequence[Any], env: dict[Any, Any]) -> None:
    """Evaluate equations, in order, into `env`."""
    for eqn in eqns:
        env.update(zip(eqn.outvars, _compat.bind(eqn, read_all(eqn.invars, env)), strict=True))


def read_all(atoms: Sequence[Any], env: dict[Any, Any]) -> list[Any]:
    """The values of the operands of an equation."""
    return [atom.val if _compat.is_literal(atom) else env[atom] for atom in atoms]


def isometric_view(program: Program, view: Any) -> list[Any] | None:
    """The equations that rearrange one parameter into `view`, entry by entry, in order; None if there is more to it."""
    if view in program.parameters:
        return []
    for eqn in program.static:
        if view in eqn.outvars:
            rearranges = eqn.primitive.name in _ISOMETRIES or _keeps_size(eqn)
            source = eqn.invars[0]
            before = isometric_view(program, source) if rearranges and source in program.reach else None
            return None if before is None else [*before, eqn]
    return None


def _keeps_size(eqn: Any) -> bool:
    """Whether a broadcast only adds axes of length one."""
    return eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.size == eqn.outvars[0].aval.size


def undo_view(eqns: Sequence[Any], parameter: Any, view: Any, cotangent: jax.Array) -> jax.Array:
    """A gradient with respect to an isometric view, as one with respect to the parameter, in the cotangent's dtype."""

    def rearrange(value: jax.Array) -> jax.Array:
        env = {parameter: value}
        for eqn in eqns:
            operand = env[eqn.invars[0]]
            # A cast would round what was accumulated in a wider dtype.
            casts = eqn.primitive.name == "convert_element_type"
            env[eqn.outvars[0]] = operand if casts else _compat.bind(eqn, [operand, *eqn.invars[1:]])[0]
        return env[view]

    like = jax.ShapeDtypeStruct(parameter.aval.shape, cotangent.dtype)
    (out,) = jax.linear_transpose(rearrange, like)(cotangent)
    return out
