"""Run the plan: one forward and one backward pass over the batch, then each tensor's norms and sum from what they
left.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, _validate, trees
from cg_jax.ghost import capture, instances, plan, scalars, views
from cg_jax.ghost.backward import Traces, backward
from cg_jax.ghost.capture import Program, Site, Use, evaluate, read_all
from cg_jax.ghost.chunks import accumulate, in_chunks, of_each
from cg_jax.ghost.plan import RulePlan, Yield
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import instantiated, sum_of_products, without_gradients
from cg_jax.per_example import LossFn, checked_loss, example_of

PyTree = Any


def statistics(
    loss_fn: LossFn, params: PyTree, batch: PyTree, weights: jax.Array | None, max_bytes: int | None = None
) -> tuple[jax.Array, PyTree, PyTree]:
    """(losses [B], ‖wᵢ gᵢ‖² for each tensor [B], Σ wᵢ gᵢ like the parameters); exact, in one backward pass.

    Norms and sums are in the accumulator dtype; integer leaves are None.
    """
    kept, rest = trees.partition(params)
    kept = jax.tree.map(jnp.asarray, kept)
    _validate.something_to_differentiate(kept)
    program = capture.capture(loss_fn, kept, rest, example_of(batch))
    _validate.dependence(capture.reaches_parameters(program))
    size = jax.tree.leaves(batch)[0].shape[0]
    keep = weights
    weights = jnp.ones(size) if weights is None else weights
    loss = checked_loss(loss_fn, rest)
    if not program.is_dynamic():
        return _same_for_all(loss, kept, batch, weights)
    leaves, structure = jax.tree.flatten(kept)
    env = program.constants | dict(zip(program.parameters, leaves, strict=True))
    evaluate(program.static, env)
    nonlinear = program.has_custom_vjp()
    if keep is not None and nonlinear:
        # A custom_vjp may answer a zero cotangent with anything: rows are left out afterwards, by selection.
        losses, traces = backward(program, env, jax.tree.leaves(batch), jnp.ones(size))
        traces = {key: (seen, _select(keep, cotangents)) for key, (seen, cotangents) in traces.items()}
    else:
        losses, traces = backward(program, env, jax.tree.leaves(batch), weights)

    made: dict[int, Yield] = {}
    todo = plan.make_plan(program, max_bytes)
    for tensor in todo.rules:
        made[tensor.parameter] = _by_rule(program, env, tensor, traces)
    for group in todo.groups:
        gradient: Callable[[Any], PyTree]
        if group.whole_loss:
            gradient, operands = instances.by_whole_loss(loss, leaves, structure, group), batch
        else:
            gradient, operands = instances.by_sites(program, env, group), [traces[use.key] for use, _ in group.uses]
        if keep is not None and (nonlinear or group.whole_loss):
            gradient, operands = _left_out(gradient), (operands, keep)
        yields = accumulate(of_each(gradient), operands, group.chunk)
        made.update(zip(group.parameters, zip(*yields, strict=True), strict=True))
    for i, leaf in enumerate(leaves):
        dtype = trees.accumulator_dtype(leaf.dtype)
        made.setdefault(i, (jnp.zeros(size, dtype), jnp.zeros(leaf.shape, dtype)))
    made |= scalars.add(program, env, todo, traces, made)
    sq_norms, sums = ([made[i][k] for i in range(len(leaves))] for k in (0, 1))
    return losses, jax.tree.unflatten(structure, sq_norms), jax.tree.unflatten(structure, sums)


def _select(keep: jax.Array, rows: PyTree) -> PyTree:
    """Rows, or zeros where `keep` [B] (or a scalar, for one row) is zero."""
    return jax.tree.map(
        lambda leaf: jnp.where(keep.reshape(keep.shape + (1,) * (leaf.ndim - keep.ndim)) > 0, leaf, 0), rows
    )


def _left_out(gradient: Callable[[Any], PyTree]) -> Callable[[Any], PyTree]:
    """`gradient` of (operands, keep): zero where `keep` is."""
    return lambda row: _select(row[1], gradient(row[0]))


def _same_for_all(loss: LossFn, kept: PyTree, batch: PyTree, weights: jax.Array) -> tuple[jax.Array, PyTree, PyTree]:
    """The statistics of a loss that ignores the example."""
    value, grad = jax.value_and_grad(loss)(kept, jax.tree.map(lambda leaf: leaf[0], batch))
    grad = trees.accumulate(grad)
    sq_norms = jax.tree.map(lambda q: q * jnp.square(weights).astype(q.dtype), trees.sq_norms(grad))
    sums = jax.tree.map(lambda g: g * weights.sum().astype(g.dtype), grad)
    return jnp.full(weights.shape, value), sq_norms, sums


def _by_rule(program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces) -> Yield:
    """A tensor whose one use has a rule."""
    site, rule = tensor.use.site, tensor.rule
    operands, (cotangent,) = traces[tensor.use.key]
    dtype = trees.accumulator_dtype(tensor.view.aval.dtype)
    if not isinstance(rule, Product):
        norms = jax.vmap(lambda row: rule.sq_norm(*row))
        sq_norms = in_chunks(norms, (operands, cotangent.astype(dtype)), tensor.chunk)
        if sq_norms.ndim != 1:
            raise ValueError(
                f"Expected the rule of {site.eqn.primitive.name} to give one number for each example, its ‖g‖², got an "
                f"array of shape {sq_norms.shape[1:]}."
            )
        total = None
    elif tensor.form == "instantiate":
        sq_norms, total = instantiated(rule, operands[0], cotangent, dtype, tensor.chunk)
    else:
        sq_norms = without_gradients(rule, tensor.form, operands[0], cotangent, dtype, tensor.chunk)
        # Patches are many times the input: there, where it can, the primitive's own vjp forms the sum.
        total = sum_of_products(rule, operands[0], cotangent, dtype) if rule.rearranges else None
    if total is None:
        total = _sum_by_vjp(site, _env_of(tensor.use, env), operands, cotangent, dtype)
    parameter = program.parameters[tensor.parameter]
    total = views.undo_view(tensor.rearranged_by, parameter, tensor.view, total)
    out_dtype = trees.accumulator_dtype(parameter.aval.dtype)
    return sq_norms.astype(out_dtype), total.astype(out_dtype)


def _env_of(use: Use, env: dict[Any, Any]) -> dict[Any, Any]:
    """The static values where a use stands: in the body of a checkpoint, those of the body."""
    if use.nested is None:
        return env
    body, outer = use.nested.body, use.nested.operands
    local = body.constants | dict(zip(outer, read_all(list(outer.values()), env), strict=True))
    evaluate(body.static, local)
    return local


def _sum_by_vjp(site: Site, env: dict[Any, Any], seen: list[jax.Array], cotangent: jax.Array, dtype: Any) -> jax.Array:
    """Σ over the batch of the gradients of a site's one view, as an ordinary backward pass forms it, in `dtype`."""
    (position,) = site.views
    changed = {"preferred_element_type": None} if "preferred_element_type" in site.eqn.params else {}

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if trees.is_differentiable(x) else x

    def outputs(view: jax.Array) -> jax.Array:
        def one(example: list[jax.Array]) -> jax.Array:
            values = instances.operands_of(site, env, example)
            values[position] = view
            return _compat.bind(site.eqn, values, **changed)[0]

        return jax.vmap(one)([widen(x) for x in seen])

    _, pull = jax.vjp(outputs, widen(env[site.eqn.invars[position]]))
    return pull(widen(cotangent))[0]
