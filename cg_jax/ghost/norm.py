"""Squared norms without the gradient, for uses whose gradient only places or adds up cotangents."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (dynamic operands, cotangent) → (row numbers [R], values [R, E]).
Rows = Callable[[list[jax.Array], jax.Array], tuple[jax.Array, jax.Array]]

# Up to this many ids, all pairs are compared. Above it, sorting is faster.
_PAIRS = 512


class Norm(NamedTuple):
    """A rule that gives the squared norm ‖g‖² of the gradient g of one operand, without g.

    It suits a primitive whose gradient only scales, places or adds up the entries of the cotangent: a bias, a scale, a
    slice or a look-up. The primitive's own vjp computes the sum Σ gᵢ over the batch, so the primitive must be linear in
    the operand, given the others. In the body of `jax.lax.scan` the rule is used if each step has its own slice of the
    parameter.

    Attributes:
        sq_norm: sq_norm(operands, cotangent) → ‖g‖², one real number, of ONE example. The engine adds the batch axis,
            [B, ...], by `jax.vmap`. `operands` is the list of the operands of the equation that depend on the example,
            in order. `cotangent` has the shape of the equation's output, and the accumulator dtype, float32 or wider.
        rows: For the built-in rules only.

    Examples:
        The scale w of x * w has the gradient x ⊙ c, where c is the cotangent:

        >>> import jax.numpy as jnp, cg_jax as cg
        >>> def scale(eqn, view):
        ...     if eqn.invars[0].aval.shape != eqn.invars[1].aval.shape:
        ...         return None
        ...     return cg.Norm(lambda operands, cotangent: ((operands[0] * cotangent) ** 2).sum())
        >>> with cg.register_rule("mul", scale):
        ...     cg.per_example_sq_norms(lambda w, x: (w * x).sum())(jnp.ones(2), jnp.array([[3.0, 4.0]]))
        Array([25.], dtype=float32)
    """

    sq_norm: Callable[[list[jax.Array], jax.Array], jax.Array]
    rows: Rows | None = None  # of a table: the rows that the gradient adds values to


def of_table(rows: Rows) -> Norm:
    """The rule of a use that adds values to rows of a table."""
    return Norm(lambda operands, cotangent: sq_norm_of_rows(*rows(operands, cotangent)), rows)


def sq_norm_of_rows(ids: jax.Array, values: jax.Array) -> jax.Array:
    """‖g‖² of a gradient that adds values [R, E] at the rows `ids` [R]."""
    if values.size == 0:
        return jnp.zeros((), values.dtype)
    return jnp.square(jax.ops.segment_sum(values, _labels(ids), ids.size)).sum()


def lift_norm(rule: Norm, is_slice: bool) -> Norm | None:
    """The rule of a use in the body of a scan, from operands and cotangents [length, ...] of all steps.

    A slice differs in each step. Rows of a table that is the same in all steps add up over the steps. There is no rule
    for anything else.
    """
    if is_slice:
        return Norm(lambda operands, cotangent: jax.vmap(rule.sq_norm)(operands, cotangent).sum())
    rows = rule.rows
    if rows is None:
        return None

    def of_steps(operands: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, values = jax.vmap(rows)(operands, cotangent)
        return ids.reshape(-1), values.reshape(ids.size, values.shape[-1])

    return of_table(of_steps)


def _labels(ids: jax.Array) -> jax.Array:
    """Numbers below R for ids [R]. Equal ids get equal numbers."""
    if ids.size <= _PAIRS:
        return jnp.argmax(ids[:, None] == ids[None], axis=1).astype(jnp.int32)
    order = jnp.argsort(ids)
    changes = jnp.diff(ids[order]) != 0
    return jnp.zeros_like(ids).at[order[1:]].set(jnp.cumsum(changes).astype(ids.dtype))
