"""Express the uses of a parameter in terms of the parameter itself: as one product of all uses, if there is one.

The positions of several uses of a tensor (a weight that is used twice, four slices of it in a recurrent cell, the steps
of a scan) become positions of one product, so that their gradients add up before they are squared.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax.ghost import factors, primitives, views
from cg_jax.ghost.capture import Program, Use
from cg_jax.ghost.evaluation import evaluated, is_var, read_all
from cg_jax.ghost.factors import Factors, NotSeparableError
from cg_jax.ghost.primitives import Read, Static, Step
from cg_jax.ghost.product import Product, joined_positions, lift
from cg_jax.ghost.rules import check_shapes, rule_for
from cg_jax.ghost.views import is_isometric, path_to, undo

# A use and the position of its operand that is a view of a parameter.
Place = tuple[Use, int]


class Path(NamedTuple):
    """The path from a parameter to one of its uses."""

    outer: list[Step]  # in the outermost program
    inner: list[Step]  # in the body of a scan or checkpoint
    length: int | None  # of a scan
    is_slice: bool  # whether each step of the scan receives its own slice

    @property
    def is_isometric(self) -> bool:
        """Whether the view only rearranges the parameter."""
        return is_isometric([*self.outer, *self.inner])


def path_of(program: Program, use: Use, position: int, parameter: int) -> Path | None:
    """The path from a parameter to an operand of a use. None if there are several."""
    view, nested = use.site.eqn.invars[position], use.nested
    if nested is None:
        steps = path_to(program, parameter, view)
        return None if steps is None else Path(steps, [], None, False)
    body = nested.body
    inner = [i for i in body.reach[view] if parameter in program.reach[nested.operands[body.parameters[i]]]]
    if len(inner) != 1:
        return None
    variable = body.parameters[inner[0]]
    outside, inside = path_to(program, parameter, nested.operands[variable]), path_to(body, inner[0], view)
    if outside is None or inside is None:
        return None
    return Path(outside, inside, nested.call.length, nested.is_slice(variable))


def product_of(
    program: Program, place: Place, path: Path, parameter: int, env: Any = None, alone: bool = True
) -> Product | None:
    """The product of a use, in terms of the parameter. None if the view does not allow one.

    `env` holds the static values. Without it, only the sizes of the product may be read. A product that is not `alone`
    has its axes in the order of the parameter.
    """
    use, position = place
    base, aval = rule_for(use.site.eqn, position), program.parameters[parameter].aval
    if not isinstance(base, Product) or len(use.site.dynamic) != 1 or len(use.site.eqn.outvars) != 1:
        return None
    check_shapes(use.site.eqn, position, base, use.site.dynamic[0])
    if path.is_isometric and alone:
        if not path.outer and not path.inner and path.length is None:
            return base
        of_body = base._replace(to_view=lambda g: rearranged(path.inner, base.to_view(g)), is_shared=False)
        joined = of_body if path.length is None else lift(of_body, path.length, path.is_slice)
        return joined._replace(to_view=lambda g: rearranged(path.outer, joined.to_view(g)), sides=None)
    shape = use.site.eqn.invars[position].aval.shape
    body = use.nested.body if use.nested else program
    read_outer, read_inner = _readers(program, use, env)

    def of_example(x: jax.Array, cotangent: jax.Array) -> Factors:
        def once(x: jax.Array, cotangent: jax.Array) -> Factors:
            of_view = factors.initial(base, shape, x, cotangent)
            return views.pull(path.inner, of_view, Static(read_inner, functools.partial(spread, body)))

        joined = once(x, cotangent) if path.length is None else _lifted(once, path, x, cotangent)
        return views.pull(path.outer, joined, Static(read_outer, functools.partial(spread, program)))

    sides: list[str] = []

    def arrays(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        of_one = of_example(x, cotangent)
        sides.append(of_one.sides)
        return of_one.a, of_one.b, of_one.scale

    leading = () if path.length is None else (path.length,)
    (out,), (x,) = use.site.eqn.outvars, [use.site.eqn.invars[i].aval for i in use.site.dynamic]
    seen = [jax.ShapeDtypeStruct((*leading, *aval.shape), aval.dtype) for aval in (x, out.aval)]
    try:
        a, b, scale = jax.eval_shape(arrays, *seen)
    except NotSeparableError:
        return None
    if any(jnp.issubdtype(factor.dtype, jnp.complexfloating) for factor in (a, b)):
        return None
    if scale is not None and env is not None:
        scale = arrays(*(jnp.zeros(aval.shape, aval.dtype) for aval in seen))[2]
    return factors.to_product(aval.shape, of_example, Factors(a, b, sides[-1], scale), base)


def rearranged(steps: list[Step], gradient: jax.Array) -> jax.Array:
    """Map the gradient of a view, which rearranges the first operand of the steps, to the gradient of that operand."""
    if not steps:
        return gradient
    first = steps[0].operand.aval
    return undo(steps, jnp.zeros(first.shape, gradient.dtype), gradient, lambda atom: atom.val)


def to_parameter(
    program: Program, place: Place, path: Path, parameter: int, env: dict[Any, Any], total: jax.Array
) -> jax.Array:
    """Map the gradient of the view of a use that runs once to the gradient of the parameter."""
    read_outer, read_inner = _readers(program, place[0], env)
    if path.inner:
        total = undo(path.inner, read_inner(path.inner[0].operand), total, read_inner)
    return undo(path.outer, env[program.parameters[parameter]], total, read_outer)


def spread(program: Program, atom: Any) -> tuple[int, ...]:
    """The axes along which a static value is not constant, as far as its equations tell."""
    if not atom.aval.shape:
        return ()
    eqn = program.producers.get(atom) if is_var(atom) else None
    of_eqn = None if eqn is None else primitives.of(eqn).spread
    if of_eqn is not None:
        return of_eqn(eqn, functools.partial(spread, program))
    return tuple(axis for axis, size in enumerate(atom.aval.shape) if size != 1)


def _lifted(once: Callable[..., Factors], path: Path, x: jax.Array, cotangent: jax.Array) -> Factors:
    """The factors of all steps of a scan: positions of one product, or for slices, separate products."""
    sides: list[str] = []

    def arrays(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = once(x, cotangent)
        if step.scale is not None:
            raise NotSeparableError
        sides.append(step.sides)
        return step.a, step.b

    a, b = jax.vmap(arrays)(x, cotangent)
    if path.is_slice:
        return Factors(a, b, "N" + sides[-1])
    n = sides[-1].count("N")

    def join(factor: jax.Array) -> jax.Array:
        factor = jnp.moveaxis(factor, 0, n)  # [*N, length, T, …]
        return factor.reshape(*factor.shape[:n], factor.shape[n] * factor.shape[n + 1], *factor.shape[n + 2 :])

    return Factors(join(a), join(b), sides[-1])


def _readers(program: Program, use: Use, env: dict[Any, Any] | None) -> tuple[Read, Read]:
    """Functions that read a static value: in the outermost program, and in the body of the use.

    Without `env` they only work in an abstract evaluation.
    """
    nested = use.nested
    fixed = [] if nested is None else [var for var in nested.operands if not nested.is_slice(var)]
    outer = {*program.parameters, *program.constants, *program.producers} if env is None else env
    inner: Any = outer
    if nested is not None:
        outside = [nested.operands[var] for var in fixed]
        inner = nested.body.constants | dict(
            zip(fixed, outside if env is None else read_all(outside, env), strict=True)
        )
        for eqn in nested.body.static:  # some differ between steps
            if all(atom in inner for atom in eqn.invars if is_var(atom)):
                inner.update(zip(eqn.outvars, eqn.outvars if env is None else evaluated(eqn, inner), strict=True))

    def reader(values: Any) -> Read:
        def read(atom: Any) -> Any:
            if not is_var(atom):
                return atom.val
            if atom not in values:
                raise NotSeparableError
            return jnp.zeros(atom.aval.shape, atom.aval.dtype) if env is None else values[atom]

        return read

    return reader(outer), reader(inner)


def together(products: list[Product]) -> Product | None:
    """One product with the positions of several uses of a tensor. None if they do not fit.

    Its factors take lists of inputs and cotangents.
    """
    first = products[0]
    flipped = []
    for product in products:
        same, swapped = product.sides, str.translate(product.sides or "", _SWAP)
        fits = product.rearranges and product.scale is None and first.sides is not None
        if not fits or first.sides not in (same, swapped):
            return None
        flipped.append(first.sides != same)
    return joined_positions(products, flipped)


_SWAP = str.maketrans("DP", "PD")
