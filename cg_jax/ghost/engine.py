"""One pass over a batch, and functions of it: norms, sums, weighted sums, alignments."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, _validate, trees
from cg_jax._loss import LossFn, checked_pair, example_of, has_empty
from cg_jax._types import PyTree
from cg_jax.ghost import capture, cost
from cg_jax.ghost.backward import Backward, backward, located_errors
from cg_jax.ghost.capture import Program
from cg_jax.ghost.chunks import accumulate_with, auto_shards
from cg_jax.ghost.evaluation import evaluate
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.kept import KeptGradients, KeptProduct, kept_of
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.passes import ByParameter, Pass, Tensors
from cg_jax.ghost.plan import Plan, RulePlan
from cg_jax.ghost.scalars import ByNumbers
from cg_jax.ghost.tensors import ByGradients, ByNorm, ByProduct, Inside, SameForAll, selected
from cg_jax.ghost.uses import rearranged


def one_pass(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    keep: jax.Array | None = None,
    max_bytes: int | None = None,
    has_aux: bool = False,
    norms_inside: bool = True,
) -> Pass:
    """The pass over a batch. Rows where `keep` [B] is 0 have no gradient.

    With `norms_inside`, norms of stacked layers may be taken inside their scan, which saves memory. Weighted sums and
    alignments need a pass without `norms_inside`.
    """
    kept, rest = trees.partition(params)
    kept = jax.tree.map(jnp.asarray, kept)
    _validate.something_to_differentiate(kept)
    program, aux_structure = capture.capture(loss_fn, kept, rest, example_of(batch), has_aux)
    _validate.dependence(program.depends or has_empty((kept, batch)))
    loss = checked_pair(loss_fn, rest, has_aux=has_aux)
    common = (program, loss, kept, batch, keep)
    if not program.is_dynamic():
        return _same_for_all(*common)
    plan = cost.cheapest(program, max_bytes, norms_inside)
    if plan.is_vmap:
        with located_errors(program):
            return _by_vmap(*common, plan)
    env = program.constants | dict(zip(program.parameters, jax.tree.leaves(kept), strict=True))
    evaluate(program.static, env)
    losses, aux, traces, of_views = _backward(program, env, batch, keep, plan.inline)
    inside = {
        each.parameter: (traces[each.use.key][1][0].sum(1), rearranged(each.path.outer, total))
        for each, total in zip(plan.inline, of_views, strict=True)
    }
    aux = jax.tree.unflatten(aux_structure, aux)
    size = losses.shape[0]
    rows = set() if norms_inside else kept_of(program, _parts(plan), traces, size, max_bytes)
    tensors = tuple(_tensors(part, place in rows) for place, part in enumerate(_parts(plan)))
    return Pass(program, env, loss, kept, batch, keep, losses, aux, traces, inside, tensors)


def _parts(plan: Plan) -> list[Any]:
    return [*plan.inline, *plan.rules, *plan.groups]


def _tensors(plan: Any, is_kept: bool) -> Tensors:
    """The object that computes the statistics of one part of a plan, which keeps its gradients or not."""
    if isinstance(plan, InlinePlan):
        return Inside(plan)
    if not isinstance(plan, RulePlan):
        return KeptGradients(plan) if is_kept else ByGradients(plan)
    by_product = KeptProduct if is_kept else ByProduct
    others = None if plan.rule is None else ByNorm(plan) if isinstance(plan.rule, Norm) else by_product(plan)
    if plan.exact is not None:
        return ByNumbers(plan, others)
    assert others is not None  # a tensor without a use is in no plan
    return others


def _backward(
    program: Program, env: dict[Any, Any], batch: PyTree, keep: jax.Array | None, inside: Sequence[InlinePlan]
) -> Backward:
    """The forward and the backward pass. Rows that are not kept have zero cotangents."""
    ones = jnp.ones(jax.tree.leaves(batch)[0].shape[0])
    if keep is None or not program.has_custom_vjp:
        return backward(program, env, jax.tree.leaves(batch), ones if keep is None else keep, inside)
    # A custom_vjp may return anything for a zero cotangent. So rows are selected afterwards.
    whole = backward(program, env, jax.tree.leaves(batch), ones)
    traces = {key: (seen, selected(keep, cotangents)) for key, (seen, cotangents) in whole.traces.items()}
    return whole._replace(traces=traces)


def _by_vmap(program: Program, loss: LossFn, kept: PyTree, batch: PyTree, keep: jax.Array | None, plan: Plan) -> Pass:
    """The pass by vmap(grad) of the whole loss, in chunks. It includes norms and sums."""
    (group,) = plan.groups

    def one(row: tuple[PyTree, jax.Array | None]) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
        example, weight = row
        value, grad = jax.value_and_grad(loss, has_aux=True)(kept, example)
        grad = trees.accumulate(grad)
        return grad if weight is None else selected(weight, grad), value

    (sq_norms, (losses, aux)), sums = accumulate_with(jax.vmap(one), (batch, keep), group.chunk)
    norms_and_sums = [[jax.tree.leaves(each)[i] for i in group.parameters] for each in (sq_norms, sums)]
    tensors = ByGradients(group)
    return Pass(
        program, {}, loss, kept, batch, keep, losses, aux, {}, {}, (tensors,), memo={tensors: tuple(norms_and_sums)}
    )


def _same_for_all(program: Program, loss: LossFn, kept: PyTree, batch: PyTree, keep: jax.Array | None) -> Pass:
    """The pass of a loss that ignores the example."""
    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(kept, jax.tree.map(lambda leaf: leaf[0], batch))
    _, aux = jax.vmap(lambda example: loss(kept, example))(batch)
    losses = jnp.full(jax.tree.leaves(batch)[0].shape[:1], value)
    tensors = SameForAll(jax.tree.leaves(trees.accumulate(grad)))
    return Pass(program, {}, loss, kept, batch, keep, losses, aux, {}, {}, (tensors,))


def sq_norms(of: Pass) -> PyTree:
    """‖gᵢ‖² [B] of each tensor, in the accumulator dtype; None for integer leaves."""
    return _like_params(of, lambda tensors: tensors.sq_norms(of), lambda leaf, dtype: jnp.zeros(of.losses.shape, dtype))


def sums(of: Pass) -> PyTree:
    """Σ gᵢ, like the parameters, in the accumulator dtype; None for integer leaves."""
    return _like_params(of, lambda tensors: tensors.sums(of), lambda leaf, dtype: jnp.zeros(leaf.shape, dtype))


def weighted_sums(of: Pass, weights: PyTree) -> PyTree:
    """Σ wᵢ gᵢ, like the parameters, in the accumulator dtype. Any real weights [B], or [B] for each tensor."""
    leaves = jax.tree.leaves(weights)
    if isinstance(weights, jax.Array):
        leaves *= len(jax.tree.leaves(of.kept))
    by_parameter = dict(enumerate(leaves))
    by_tensors: Callable[[Tensors], ByParameter] = lambda tensors: tensors.weighted_sums(of, by_parameter)  # noqa: E731
    return _like_params(of, by_tensors, lambda leaf, dtype: jnp.zeros(leaf.shape, dtype))


def alignments(of: Pass, direction: PyTree) -> jax.Array:
    """⟨gᵢ, v⟩ [B], v like the parameters, in the accumulator dtype.

    Inside shard_map, parts of tensors that are sharded over another axis than the examples are summed over it.
    """
    by_parameter = dict(enumerate(jax.tree.leaves(trees.accumulate(direction))))
    return _over_shards(of, [part for tensors in of.tensors for part in tensors.along(of, by_parameter)])


def mutual_alignments(of: Pass, weights: jax.Array | None) -> jax.Array:
    """⟨gᵢ, Σ wⱼ gⱼ⟩ [B]: `alignments` along `weighted_sums`, or along `sums`, or by the inner products of all pairs.

    The pairs of a tensor cost the same for any number of calls. If the compiler may shard the batch, they would move
    the inputs and cotangents of all examples to every device.
    """
    parts: list[jax.Array] = []
    is_sharded = auto_shards(of.batch) > 1
    for tensors in of.tensors:
        pairs = tensors.pairs(of) if isinstance(tensors, ByProduct) and not is_sharded else None
        if pairs is not None:
            (inner, scale), row = pairs, 1 if weights is None else weights.astype(pairs[1].dtype)
            parts.append(scale * jnp.dot(inner, scale * row, precision="highest"))
        elif weights is None:
            parts += tensors.along(of, tensors.sums(of))
        else:
            by_parameter = dict.fromkeys(range(len(jax.tree.leaves(of.kept))), weights)
            parts += tensors.along(of, tensors.weighted_sums(of, by_parameter))
    return _over_shards(of, parts)


def _over_shards(of: Pass, parts: list[jax.Array]) -> jax.Array:
    """The sum of parts [B] of inner products."""
    rows = _compat.varying_axes(of.losses)
    return trees.total([_compat.sum_over(part, rows) for part in parts]) if parts else jnp.zeros(of.losses.shape)


def filled(rows: PyTree, keep: jax.Array) -> PyTree:
    """Replace each row [B, ...] where `keep` [B] is False by the first other one."""
    sources = jnp.where(keep, jnp.arange(keep.size), jnp.argmax(keep))
    return jax.tree.map(lambda leaf: leaf[sources], rows)


def without_rows(of: Pass, keep: jax.Array) -> Pass:
    """The pass without the gradients of the rows where `keep` [B] is False, which may be non-finite.

    Such a row gets the inputs of a row that is kept, and zero cotangents.
    """
    traces = {key: (filled(seen, keep), selected(keep, cotangents)) for key, (seen, cotangents) in of.traces.items()}
    before = jnp.ones(keep.shape) if of.keep is None else of.keep
    kept, batch = jnp.where(keep, before, 0), filled(of.batch, keep)
    return dataclasses.replace(of, batch=batch, keep=kept, traces=traces, memo={})


def _like_params(
    of: Pass, by_tensors: Callable[[Tensors], ByParameter], zero: Callable[[jax.Array, Any], jax.Array]
) -> PyTree:
    """A tree like the differentiable parameters. Parameters without a use have a zero gradient."""
    leaves, structure = jax.tree.flatten(of.kept)
    by_parameter: ByParameter = {}
    for tensors in of.tensors:
        by_parameter.update(by_tensors(tensors))
    return jax.tree.unflatten(
        structure,
        [by_parameter[i] if i in by_parameter else zero(leaf, of.dtype(i)) for i, leaf in enumerate(leaves)],
    )
