"""How the squared norm of a gradient follows from a parameter use's inputs and cotangents, primitive by primitive.

A rule is looked up in `RULES` by the primitive's name. It gives a `Product`, or a `Norm` where the view's gradient only
places or adds up cotangents. What has no rule is done by the primitive's own vjp, example by example.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from cg_jax.ghost.convolution import conv_general_dilated
from cg_jax.ghost.product import Product, dot_general
from cg_jax.ghost.tables import Norm, dynamic_slice, gather

Rule = Product | Norm
RuleBuilder = Callable[[Any, int], Rule | None]
RULES: dict[str, RuleBuilder] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
}
# Those that hold for complex numbers too: JAX's cotangents are without a conjugate.
_OF_COMPLEX = (dot_general, conv_general_dilated)


def register_rule(primitive: str, rule: RuleBuilder) -> None:
    """Have the engine use `rule` where a parameter meets a value of the example in `primitive`.

    Nothing needs a rule to be exact: a primitive without one is done by its own vjp, example by example. A rule makes
    it cheap. It replaces one registered before, and holds for what is traced from then on: a loss that is compiled
    already stays as it is.

    Args:
        primitive: The primitive's name, as `jax.make_jaxpr` prints it.
        rule: rule(eqn, view) → what becomes of the parameter at operand `view` of the equation `eqn`, all of it for ONE
            example: a `Product` (the gradient is Aᵀ B, with A from the one other operand and B from the cotangent), a
            `Norm` (a function from the operands that depend on the example, and the cotangent of the output, to ‖g‖²;
            the sum over the batch is then formed by the primitive's own vjp), or None where neither fits, for the
            primitive's own vjp. It is asked only for real numbers. In the body of a scan a
            `Norm` is used for tensors that each step has its own slice of.

            Of a Product `dims` are (N, T, D, P): factors(input, cotangent) gives A [N, T, D] and B [N, T, P], N
            independent products over T positions, and to_view makes of their G = Aᵀ B, [N, D, P], an array of the
            shape of the operand.

    Raises:
        TypeError: primitive is no string; when a loss is traced, a rule that gives something else.

    Examples:
        A bias of the output's own shape: its gradient is the cotangent.

        >>> import jax, cg_jax as cg
        >>> def shift(eqn, view):
        ...     same = eqn.invars[view].aval.shape == eqn.outvars[0].aval.shape
        ...     return cg.ghost.Norm(lambda operands, cotangent: (cotangent**2).sum()) if same else None
        >>> cg.register_rule("add", shift)
        >>> def loss_fn(b, x):
        ...     return ((x + b) ** 2).sum() / 2
        >>> cg.per_example_sq_norms(loss_fn)(jax.numpy.zeros(2), jax.numpy.array([[3.0, 4.0], [0.0, 1.0]]))
        Array([25.,  1.], dtype=float32)
        >>> del cg.ghost.RULES["add"]
    """
    if not isinstance(primitive, str):
        raise TypeError(
            f"Expected primitive to be the name of one, as jax.make_jaxpr prints it, got {type(primitive).__name__}."
        )
    RULES[primitive] = rule


def rule_for(eqn: Any, view: int) -> Rule | None:
    """The rule for a parameter at operand `view` of an equation, if there is one; of complex numbers, for products."""
    builder = RULES.get(eqn.primitive.name)
    is_complex = any(jnp.issubdtype(var.aval.dtype, jnp.complexfloating) for var in (*eqn.invars, *eqn.outvars))
    rule = None if builder is None or (is_complex and builder not in _OF_COMPLEX) else builder(eqn, view)
    if rule is not None and not isinstance(rule, Product | Norm):
        raise TypeError(
            f"Expected the rule of {eqn.primitive.name} to give a Product, a Norm or None, got {type(rule).__name__}."
        )
    return rule
