"""Sums and inner products of the gradients at one use of a tensor, by the primitive itself, which is linear in it."""

from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, trees
from cg_jax.ghost import instances, primitives, varying
from cg_jax.ghost.capture import Use
from cg_jax.ghost.evaluation import evaluate, read_all
from cg_jax.ghost.passes import Pass
from cg_jax.ghost.plan import RulePlan
from cg_jax.ghost.uses import rearranged, to_parameter


def _env_of(of: Pass, use: Use) -> dict[Any, Any]:
    """The static values at a use. In the body of a checkpoint, those of the body."""
    if use.nested is None:
        return of.env
    body, outer = use.nested.body, use.nested.operands
    local = body.constants | dict(zip(outer, read_all(list(outer.values()), of.env), strict=True))
    evaluate(body.static, local)
    return local


def _widened(use: Use) -> dict[str, Any]:
    """The parameters of the equation of a use that differ if its operands are wider."""
    return {"preferred_element_type": None} if "preferred_element_type" in use.site.eqn.params else {}


def _widen(operands: list[jax.Array], dtype: Any) -> list[jax.Array]:
    """Floating-point operands in another dtype."""
    return [x.astype(dtype) if trees.is_differentiable(x) else x for x in operands]


def sum_by_vjp(of: Pass, tensor: RulePlan, seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """Σ over the batch of the gradients of a tensor at its one use, by an ordinary vjp in the accumulator dtype."""
    (place,), (path,) = tensor.places, tensor.paths
    (use, position), dtype = place, of.dtype(tensor.parameter)
    # A use in a scan is only handled here if it has no other static operand.
    local = _env_of(of, use) if path.length is None else {}
    changed, view = _widened(use), use.site.eqn.invars[position].aval

    def total(seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        def outputs(value: jax.Array) -> jax.Array:
            def one(example: list[jax.Array]) -> jax.Array:
                values = instances.operands_of(use.site, local, example)
                values[position] = value
                return _compat.bind(use.site.eqn, values, **changed)[0]

            return jax.vmap(one)(_widen(seen, dtype))

        # Every use with a rule is linear in the view.
        return varying.transposed(outputs, view.shape, cotangent.astype(dtype))

    if path.is_slice:
        total = jax.vmap(total, in_axes=1)
    elif path.length is not None:
        seen, cotangent = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (seen, cotangent))
    of_view = total(seen, cotangent)
    if path.length is not None:
        return rearranged(path.outer, of_view)
    return to_parameter(of.program, place, path, tensor.parameter, of.env, of_view)


def along_by_primitive(of: Pass, tensor: RulePlan, direction: jax.Array) -> jax.Array:
    """⟨gᵢ, v⟩ [B] = ⟨cotangent, the result at v in place of the view⟩, for a tensor whose one use is not in a scan."""
    ((use, position),) = tensor.places
    path, parameter = tensor.paths[0], tensor.parameter
    view = varying.transposed(
        lambda g: to_parameter(of.program, (use, position), path, parameter, of.env, g),
        use.site.eqn.invars[position].aval.shape,
        direction,
    )
    local, transposed = _env_of(of, use), primitives.of(use.site.eqn).transposed
    changed = _widened(use) | ({} if transposed is None else transposed(use.site.eqn))

    def one(trace: Any) -> jax.Array:
        seen, (cotangent,) = trace
        values = instances.operands_of(use.site, local, _widen(seen, view.dtype))
        values[position] = view
        result = _compat.bind(use.site.eqn, values, **changed)[0]
        return jnp.vdot(cotangent.astype(view.dtype), result)

    return jax.vmap(one)(of.traces[use.key])
