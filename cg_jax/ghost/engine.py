"""Run the plan: one forward and one backward pass over the batch, then each tensor's norms and sum from what they
left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, _validate, trees
from cg_jax._loss import LossFn, checked_pair, example_of, has_empty
from cg_jax.ghost import capture, cost, instances, scalars, varying
from cg_jax.ghost.backward import Pass, Traces, backward, located_errors
from cg_jax.ghost.capture import Program, Use
from cg_jax.ghost.chunks import accumulate, accumulate_with, in_chunks, of_each
from cg_jax.ghost.evaluation import evaluate, read_all
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.plan import RulePlan
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import Yield, along, instantiated, sum_of_products, without_gradients
from cg_jax.ghost.uses import rearranged, to_parameter

PyTree = Any


def statistics(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    weights: jax.Array | None,
    max_bytes: int | None = None,
    has_aux: bool = False,
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """(losses [B], ‖wᵢ gᵢ‖² for each tensor [B], Σ wᵢ gᵢ like the parameters, auxiliary values [B, ...] or None).

    Exact, in one backward pass. Norms and sums are in the accumulator dtype; integer leaves are None.
    """
    kept, rest = trees.partition(params)
    kept = jax.tree.map(jnp.asarray, kept)
    _validate.something_to_differentiate(kept)
    program, aux_structure = capture.capture(loss_fn, kept, rest, example_of(batch), has_aux)
    _validate.dependence(program.depends or has_empty((kept, batch)))
    loss = checked_pair(loss_fn, rest, has_aux=has_aux)
    if not program.is_dynamic():
        return _same_for_all(loss, kept, batch, weights)
    leaves, structure = jax.tree.flatten(kept)
    chosen = cost.cheapest(program, max_bytes)
    if chosen.is_vmap:
        with located_errors(program):
            sq_norms, sums, losses, aux = _by_vmap(loss, kept, batch, weights, chosen.groups[0].chunk)
        return losses, sq_norms, sums, aux
    env = program.constants | dict(zip(program.parameters, leaves, strict=True))
    evaluate(program.static, env)
    losses, aux, traces, of_views = _pass(program, env, batch, weights, chosen.inline)
    yields: dict[int, Yield] = {}
    for plan, total in zip(chosen.inline, of_views, strict=True):
        _, (sq_norms,) = traces[plan.use.key]
        yields[plan.parameter] = sq_norms.sum(1), rearranged(plan.path.outer, total)
    for tensor in chosen.rules:
        yields[tensor.parameter] = _of_tensor(program, env, tensor, traces)
    for group in chosen.groups:
        if group.whole_loss:
            gradient, operands = instances.by_whole_loss(loss, leaves, structure, group), batch
        else:
            gradient, operands = instances.by_sites(program, env, group), [traces[use.key] for use, _ in group.uses]
        if weights is not None and (group.whole_loss or program.has_custom_vjp):
            gradient, operands = _left_out(gradient), (operands, weights)
        of_group = accumulate(of_each(gradient), operands, group.chunk)
        yields.update(zip(group.parameters, zip(*of_group, strict=True), strict=True))
    size = losses.shape[0]
    for i, leaf in enumerate(leaves):
        dtype = trees.accumulator_dtype(leaf.dtype)
        yields.setdefault(i, (jnp.zeros(size, dtype), jnp.zeros(leaf.shape, dtype)))
    sq_norms, sums = (jax.tree.unflatten(structure, [yields[i][k] for i in range(len(leaves))]) for k in (0, 1))
    return losses, sq_norms, sums, jax.tree.unflatten(aux_structure, aux)


def _pass(
    program: Program, env: dict[Any, Any], batch: PyTree, weights: jax.Array | None, inside: Sequence[InlinePlan]
) -> Pass:
    """The one pass; nothing comes back to rows of weight 0."""
    ones = jnp.ones(jax.tree.leaves(batch)[0].shape[0])
    if weights is None or not program.has_custom_vjp:
        return backward(program, env, jax.tree.leaves(batch), ones if weights is None else weights, inside)
    # A custom_vjp may answer a zero cotangent with anything: rows are left out afterwards, by selection.
    left = backward(program, env, jax.tree.leaves(batch), ones)
    traces = {key: (seen, _select(weights, cotangents)) for key, (seen, cotangents) in left.traces.items()}
    return left._replace(traces=traces)


def _by_vmap(
    loss: LossFn, kept: PyTree, batch: PyTree, weights: jax.Array | None, chunk: int
) -> tuple[PyTree, PyTree, jax.Array, PyTree]:
    """(squared norms, sums, losses, auxiliary values) by vmap(grad) of the whole loss, in chunks."""

    def one(row: tuple[PyTree, jax.Array | None]) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
        example, weight = row
        value, grad = jax.value_and_grad(loss, has_aux=True)(kept, example)
        grad = trees.accumulate(grad)
        return grad if weight is None else _select(weight, grad), value

    (sq_norms, (losses, aux)), sums = accumulate_with(jax.vmap(one), (batch, weights), chunk)
    return sq_norms, sums, losses, aux


def _select(keep: jax.Array, rows: PyTree) -> PyTree:
    """Rows, or zeros where `keep` [B] (or a scalar, for one row) is zero."""
    return jax.tree.map(
        lambda leaf: jnp.where(keep.reshape(keep.shape + (1,) * (leaf.ndim - keep.ndim)) > 0, leaf, 0), rows
    )


def _left_out(gradient: Callable[[Any], PyTree]) -> Callable[[Any], PyTree]:
    """`gradient` of (operands, keep): zero where `keep` is."""
    return lambda row: _select(row[1], gradient(row[0]))


def _same_for_all(
    loss: LossFn, kept: PyTree, batch: PyTree, weights: jax.Array | None
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """The statistics of a loss that ignores the example."""
    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(kept, jax.tree.map(lambda leaf: leaf[0], batch))
    _, aux = jax.vmap(lambda example: loss(kept, example))(batch)
    weights = jnp.ones(jax.tree.leaves(batch)[0].shape[0]) if weights is None else weights
    grad = trees.accumulate(grad)
    sq_norms = jax.tree.map(lambda q: q * jnp.square(weights).astype(q.dtype), trees.sq_norms(grad))
    sums = jax.tree.map(lambda g: g * weights.sum().astype(g.dtype), grad)
    return jnp.full(weights.shape, value), sq_norms, sums, aux


def _of_tensor(program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces) -> Yield:
    """A tensor whose uses have a rule, or are numbers that are made of it."""
    rule, x, cotangent, others = None, None, None, None
    if isinstance(tensor.rule, Product):
        rule, (x, cotangent) = tensor.bound(program, env), _factors_of(tensor, traces)
        others = _by_product(program, env, tensor, rule, x, cotangent)
    elif isinstance(tensor.rule, Norm):
        others = _by_norm(program, env, tensor, traces)
    if tensor.exact is None:
        assert others is not None  # a tensor without a use is in no plan
        return others
    group = tensor.exact

    def exact() -> jax.Array:
        gradient = instances.by_sites(program, env, group)
        return accumulate(of_each(gradient), [traces[use.key] for use, _ in group.uses], group.chunk)[0][0]

    def inner(direction: jax.Array) -> jax.Array:
        if rule is None:
            return _along_view(program, env, tensor, traces, direction)
        return along(rule, x, cotangent, direction)

    return scalars.add(program, env, tensor, traces, others, inner, exact)


def _factors_of(tensor: RulePlan, traces: Traces) -> tuple[Any, Any]:
    """(inputs, cotangents) of a product: of several uses, lists."""
    pairs = [(traces[use.key][0][0], traces[use.key][1][0]) for use, _ in tensor.places]
    return pairs[0] if len(pairs) == 1 else tuple(map(list, zip(*pairs, strict=True)))


def _by_norm(program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces) -> Yield:
    """A tensor whose one use places or adds up cotangents."""
    rule, (use, _) = tensor.rule, tensor.places[0]
    assert isinstance(rule, Norm)
    dtype = trees.accumulator_dtype(program.parameters[tensor.parameter].aval.dtype)
    operands, (cotangent,) = traces[use.key]
    norms = jax.vmap(lambda row: rule.sq_norm(*row))
    sq_norms = in_chunks(norms, (operands, cotangent.astype(dtype)), tensor.chunk)
    if sq_norms.ndim != 1:
        raise ValueError(
            f"Expected the rule of {use.site.eqn.primitive.name} to give one number for each example, its ‖g‖², got an "
            f"array of shape {sq_norms.shape[1:]}."
        )
    return sq_norms.astype(dtype), _sum_by_vjp(program, env, tensor, operands, cotangent).astype(dtype)


def _by_product(
    program: Program, env: dict[Any, Any], tensor: RulePlan, rule: Product, x: Any, cotangent: Any
) -> Yield:
    """A tensor whose uses are one product."""
    dtype = trees.accumulator_dtype(program.parameters[tensor.parameter].aval.dtype)
    if tensor.form == "instantiate":
        sq_norms, total = instantiated(rule, x, cotangent, dtype, tensor.chunk)
    else:
        sq_norms = without_gradients(rule, tensor.form, x, cotangent, dtype, tensor.chunk)
        # Patches are many times the input: there, where it can, the primitive's own vjp forms the sum.
        if rule.rearranges:
            total = sum_of_products(rule, x, cotangent, dtype)
        else:
            total = _sum_by_vjp(program, env, tensor, [x], cotangent)
    return sq_norms.astype(dtype), total.astype(dtype)


def _along_view(
    program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces, direction: jax.Array
) -> jax.Array:
    """⟨gᵢ, v⟩ [B] of a tensor's one use, which is linear in it: the cotangent times the results at v."""
    ((use, position),) = tensor.places
    view = varying.transposed(
        lambda g: to_parameter(program, (use, position), tensor.paths[0], tensor.parameter, env, g),
        use.site.eqn.invars[position].aval.shape,
        direction,
    )

    local = _env_of(use, env)

    def one(trace: Any) -> jax.Array:
        seen, (cotangent,) = trace
        values = instances.operands_of(use.site, local, seen)
        values[position] = view
        return jnp.vdot(cotangent.astype(direction.dtype), _compat.bind(use.site.eqn, values)[0])

    return jax.vmap(one)(traces[use.key])


def _env_of(use: Use, env: dict[Any, Any]) -> dict[Any, Any]:
    """The static values where a use stands: in the body of a checkpoint, those of the body."""
    if use.nested is None:
        return env
    body, outer = use.nested.body, use.nested.operands
    local = body.constants | dict(zip(outer, read_all(list(outer.values()), env), strict=True))
    evaluate(body.static, local)
    return local


def _sum_by_vjp(
    program: Program, env: dict[Any, Any], tensor: RulePlan, seen: list[jax.Array], cotangent: jax.Array
) -> jax.Array:
    """Σ over the batch of a tensor's gradients at its one use, as an ordinary backward pass forms it, accumulated."""
    (place,), (path,) = tensor.places, tensor.paths
    (use, position), dtype = place, trees.accumulator_dtype(program.parameters[tensor.parameter].aval.dtype)
    # Of a scan, only what has no other static operand is done here.
    local = _env_of(use, env) if path.length is None else {}
    changed = {"preferred_element_type": None} if "preferred_element_type" in use.site.eqn.params else {}
    view = use.site.eqn.invars[position].aval

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if trees.is_differentiable(x) else x

    def total(seen: list[jax.Array], cotangent: jax.Array) -> jax.Array:
        def outputs(value: jax.Array) -> jax.Array:
            def one(example: list[jax.Array]) -> jax.Array:
                values = instances.operands_of(use.site, local, example)
                values[position] = value
                return _compat.bind(use.site.eqn, values, **changed)[0]

            return jax.vmap(one)([widen(x) for x in seen])

        # All that has a rule is linear in the view.
        return varying.transposed(outputs, view.shape, widen(cotangent))

    if path.is_slice:
        total = jax.vmap(total, in_axes=1)
    elif path.length is not None:
        seen, cotangent = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (seen, cotangent))
    of_view = total(seen, cotangent)
    if path.length is not None:
        return rearranged(path.outer, of_view)
    return to_parameter(program, place, path, tensor.parameter, env, of_view)
