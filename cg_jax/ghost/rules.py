"""Rules for the squared norm of a gradient, from the inputs and cotangents of a parameter use.

A rule gives a `Product`, or a `Norm` if the gradient of the view only places or adds up cotangents. A primitive without
a rule uses its own vjp, example by example. The built-in rules are in the table of `primitives`. This module registers
user-defined rules.
"""

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, Self, overload

import jax

from cg_jax import _compiled
from cg_jax.ghost import primitives
from cg_jax.ghost.factors import is_complex
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.primitives import TABLE, Primitive, Rule, RuleBuilder
from cg_jax.ghost.product import Product

# Primitive → (its built-in entry if any, its registered rules). The last rule is in force.
_REGISTERED: dict[str, tuple[Primitive | None, list["Registration"]]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Registration(contextlib.AbstractContextManager["Registration", None]):
    """A rule registered by `register_rule`, in force until it is removed. Calling it calls the rule.

    As a context manager, it removes the rule at the end of the block.
    """

    primitive: str
    rule: RuleBuilder

    def __call__(self, eqn: Any, view: int) -> Rule | None:
        """rule(eqn, view)."""
        return self.rule(eqn, view)

    def __enter__(self) -> Self:
        """The registration itself."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        """Remove the rule."""
        self.remove()

    def remove(self) -> None:
        """Remove the rule. The rule registered before it, or the built-in one, is in force again. May be repeated."""
        _, rules = _REGISTERED.get(self.primitive, (None, []))
        if self in rules:
            rules.remove(self)
            _put_in_force(self.primitive)


@overload
def register_rule(primitive: str, rule: RuleBuilder) -> Registration: ...
@overload
def register_rule(primitive: str) -> Callable[[RuleBuilder], Registration]: ...
def register_rule(
    primitive: str, rule: RuleBuilder | None = None
) -> Registration | Callable[[RuleBuilder], Registration]:
    """Register `rule` for the places where a parameter meets a value of the example in `primitive`.

    Results are exact without rules: a primitive without a rule falls back to its own vjp, example by example. A rule
    makes it cheap. A rule holds for real numbers, and replaces the one registered before it.

    The rule is in force from the next call on. Functions of cg_jax compile again after a rule is registered or removed.
    A function that you compiled yourself, with `jax.jit` around one of cg_jax, keeps the rules that it was traced with.

    Args:
        primitive: The primitive's name, as `jax.make_jaxpr` prints it.
        rule: rule(eqn, view) → the gradient of the parameter at operand `view` of the equation `eqn`: a `Product`, a
            `Norm`, or None to fall back to the primitive's own vjp. The primitive must be linear in that operand, given
            the others. Without it, `register_rule(primitive)` is a decorator for the rule.

    Returns:
        A `Registration`. `remove()` or the end of a `with` block removes the rule. Then the rule that it replaced is in
        force again. A decorated rule becomes a `Registration`, and can be called as before.

    Raises:
        TypeError: primitive is not a string, or rule cannot be called. When a loss is traced: the rule returns
            something other than a `Product`, a `Norm` or None.
        ValueError: When a loss is traced: a `Norm` gives more than one number for an example, or the factors or to_view
            of a `Product` do not have the shapes given by its dims.

    Examples:
        A bias of the output's own shape: its gradient is the cotangent.

        >>> import jax, cg_jax as cg
        >>> @cg.register_rule("add")
        ... def shift(eqn, view):
        ...     same = eqn.invars[view].aval.shape == eqn.outvars[0].aval.shape
        ...     return cg.Norm(lambda operands, cotangent: (cotangent**2).sum()) if same else None
        >>> def loss_fn(b, x):
        ...     return ((x + b) ** 2).sum() / 2
        >>> b, x = jax.numpy.zeros(2), jax.numpy.array([[3.0, 4.0], [0.0, 1.0]])
        >>> cg.explain(loss_fn, b, x[0])[0].rule
        'norm'
        >>> cg.per_example_sq_norms(loss_fn)(b, x)
        Array([25.,  1.], dtype=float32)
        >>> shift.remove()
        >>> cg.explain(loss_fn, b, x[0])[0].rule
        'elementwise'
    """
    if not isinstance(primitive, str):
        raise TypeError(
            f"Expected primitive to be the name of one, as jax.make_jaxpr prints it, got {type(primitive).__name__}."
        )
    if rule is None:
        return lambda rule: _registered(primitive, rule)
    return _registered(primitive, rule)


def _registered(primitive: str, rule: RuleBuilder) -> Registration:
    if not callable(rule):
        raise TypeError(f"Expected rule to be a function of (eqn, view), got {type(rule).__name__}.")
    registration = Registration(primitive, rule)
    _REGISTERED.setdefault(primitive, (TABLE.get(primitive), []))[1].append(registration)
    _put_in_force(primitive)
    return registration


def _put_in_force(primitive: str) -> None:
    """Update the table entry of a primitive to its registered rule, and invalidate compiled programs."""
    own, rules = _REGISTERED[primitive]
    if rules:
        TABLE[primitive] = dataclasses.replace(own or Primitive(), rule=rules[-1], of_complex=False)
        _compiled.outdate()
        return
    del _REGISTERED[primitive], TABLE[primitive]
    if own is not None:
        TABLE[primitive] = own
    _compiled.outdate()


def rule_for(eqn: Any, view: int) -> Rule | None:
    """The rule for a parameter at operand `view` of an equation, if any. Some rules do not hold for complex numbers."""
    primitive = primitives.of(eqn)
    has_complex = any(is_complex(var.aval) for var in (*eqn.invars, *eqn.outvars))
    rule = None if primitive.rule is None or (has_complex and not primitive.of_complex) else primitive.rule(eqn, view)
    if rule is not None and not isinstance(rule, Product | Norm):
        raise TypeError(
            f"Expected the rule of {eqn.primitive.name} to give a Product, a Norm or None, got {type(rule).__name__}."
        )
    others = [i for i in range(len(eqn.invars)) if i != view]
    if isinstance(rule, Product) and len(others) == 1:
        check_shapes(eqn, view, rule, others[0])
    return rule


def check_shapes(eqn: Any, view: int, rule: Product, position: int) -> None:
    """ValueError if the product of a registered rule does not have the shapes given by its dims.

    `position` is that of the operand that depends on the example.
    """
    if eqn.primitive.name not in _REGISTERED or len(eqn.outvars) != 1:
        return
    shape = eqn.invars[view].aval.shape
    factors = jax.eval_shape(rule.factors, eqn.invars[position].aval, eqn.outvars[0].aval)
    if len(rule.dims) != 4 or not isinstance(factors, tuple) or len(factors) != 2:
        raise ValueError(
            f"Expected the rule of {eqn.primitive.name} to give a Product with dims (N, T, D, P) and a pair of "
            f"factors, got dims={rule.dims} and factors {jax.tree.map(lambda leaf: leaf.shape, factors)}."
        )
    (n, t, d, p), (a, b) = rule.dims, factors
    gradient = jax.eval_shape(rule.to_view, jax.ShapeDtypeStruct((n, d, p), a.dtype))
    got, want = (a.shape, b.shape, gradient.shape), ((n, t, d), (n, t, p), shape)
    if got != want or n * d * p != math.prod(shape):
        raise ValueError(
            f"Expected the rule of {eqn.primitive.name} to give factors and a gradient of the shapes {want}, as its "
            f"dims {rule.dims} and the operand {shape} say, got {got}."
        )
