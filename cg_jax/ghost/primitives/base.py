"""The entry of a primitive, and the table of all entries."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from cg_jax._jaxprs import inner_jaxprs
from cg_jax.ghost.factors import Factors, NotSeparableError, is_complex
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.product import Product

Rule = Product | Norm
RuleBuilder = Callable[[Any, int], Rule | None]  # (equation, position of the operand that is a view of a parameter)
Read = Callable[[Any], jax.Array]  # the value of a static operand
Spread = Callable[[Any], tuple[int, ...]]  # the axes along which a static operand is not constant


class Static(NamedTuple):
    """Access to static operands."""

    read: Read
    spread: Spread


class Step(NamedTuple):
    """One equation on the path from a parameter to a view."""

    eqn: Any
    position: int  # of the operand on the path
    output: int  # of the result on the path

    @property
    def is_identity(self) -> bool:
        """Whether the result is the operand. A cast between real and complex numbers is not an identity."""
        primitive = of(self.eqn)
        if primitive.is_many:
            return self.position == self.output
        return primitive.is_identity and is_complex(self.operand.aval) == is_complex(self.result.aval)

    @property
    def operand(self) -> Any:
        """The variable nearer to the parameter."""
        return self.eqn.invars[self.position]

    @property
    def result(self) -> Any:
        """The variable nearer to the view."""
        return self.eqn.outvars[self.output]


# Maps the factors of a step's result to those of its operand. NotSeparableError if it has none.
Pull = Callable[[Step, Factors, Static], Factors]


def unscaled(pull: Pull) -> Pull:
    """A decorator that restricts `pull` to factors without a scale."""

    @functools.wraps(pull)
    def checked(step: Step, factors: Factors, static: Static) -> Factors:
        if factors.scale is not None:
            raise NotSeparableError
        return pull(step, factors, static)

    return checked


@dataclasses.dataclass(frozen=True)
class Primitive:
    """All that the engine knows about one primitive.

    The defaults are exact for every primitive: the engine takes its own vjp example by example, and asks JAX what it
    differentiates. Every field that is set makes the primitive cheaper.
    """

    # Where a parameter meets a value of the example.
    rule: RuleBuilder | None = None  # what its gradient is
    of_complex: bool = False  # whether the rule holds for complex numbers too: JAX's cotangents have no conjugate
    is_elementwise: bool = False  # entry by entry, or placed among others: its own vjp costs what the cotangent does
    is_sum: bool = False  # whether the gradient of an operand is the cotangent, unless broadcast
    is_widened: bool = False  # whether it may be done in a wider dtype: sums of cotangents may leave a narrow one
    # Linear in every operand, given the others, so that a gradient does not depend on the operand's own value.
    is_linear: bool = False
    # Parameters that make the result at v the transpose of the backward pass, where the forward pass is another map.
    transposed: Callable[[Any], dict[str, Any]] | None = None

    # On the path from a parameter to such a place.
    pull: Pull | None = None  # as a sum of products, the gradient of the result becomes that of the operand
    is_identity: bool = False  # whether the result is the operand, or the operand rounded
    rearranges: bool = False  # whether the result, if of the same size, holds each entry of the operand once
    is_many: bool = False  # whether it does so with many operands at once, each its own result
    is_copy: bool = False  # whether it is `jnp.copy`
    spread: Callable[[Any, Spread], tuple[int, ...]] | None = None  # the axes along which the result is not constant

    # What JAX does with it.
    passes: bool | None = None  # a tangent of any operand, to every result; False: no tangent; None: ask JAX
    is_differentiable: bool = False  # whether it certainly has a reverse mode
    operations: Callable[[Any], int] | None = None  # multiplications and additions of an equation

    # Of calls.
    inlines: str | None = None  # the parameter with the body of a call that may be evaluated in place
    is_scan: bool = False
    is_checkpoint: bool = False
    custom: str = ""  # "jvp" or "vjp": a user-defined rule, which must be respected


TABLE: dict[str, Primitive] = {}
_UNKNOWN = Primitive()


def add(entries: dict[str, Primitive]) -> None:
    """Add entries to the table. Each primitive has one entry."""
    twice = TABLE.keys() & entries.keys()
    if twice:
        raise ValueError(f"Expected one entry for each primitive, got a second one for {', '.join(sorted(twice))}.")
    TABLE.update(entries)


def each(names: str, primitive: Primitive) -> dict[str, Primitive]:
    """One entry for all primitives whose names are in a string, separated by spaces."""
    return dict.fromkeys(names.split(), primitive)


def named(name: str) -> Primitive:
    """The entry of the primitive of this name, or the defaults if it is not in the table."""
    return TABLE.get(name, _UNKNOWN)


def of(eqn: Any) -> Primitive:
    """The entry of an equation's primitive."""
    return named(eqn.primitive.name)


def operations(eqn: Any) -> int:
    """The approximate number of multiplications and additions of an equation."""
    count = of(eqn).operations
    if count is not None:
        return count(eqn)
    inner = inner_jaxprs(eqn)
    return sum(map(of_body, inner)) if inner else size_of(eqn.outvars)


def of_body(jaxpr: Any) -> int:
    """Operations of all equations of a jaxpr."""
    return sum(map(operations, jaxpr.eqns))


def size_of(variables: Iterable[Any]) -> int:
    """The number of entries of some variables."""
    return sum(var.aval.size for var in variables if hasattr(var.aval, "size"))
