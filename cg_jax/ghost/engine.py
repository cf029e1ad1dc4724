"""Run the plan: one forward and one backward pass over the batch, then each tensor's norms and sum from what they
left.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat, _validate, trees
from cg_jax.ghost import capture, plan
from cg_jax.ghost.capture import Program, Site, evaluate, read_all
from cg_jax.ghost.plan import GroupPlan, RulePlan
from cg_jax.ghost.rules import Product
from cg_jax.per_example import LossFn, checked_loss

PyTree = Any
# For one tensor: squared norms [B], and the sum over the batch.
Yield = tuple[jax.Array, jax.Array]
# For each site: its dynamic operands, and the cotangents of its floating-point outputs, all [B, ...].
Traces = dict[int, tuple[list[jax.Array], list[jax.Array]]]


@jax.custom_vjp
def _tap(value: jax.Array, tap: jax.Array) -> jax.Array:
    """`value`; its cotangent is also that of `tap`. Nothing is added, so that nothing is paid for."""
    del tap
    return value


_tap.defvjp(lambda value, tap: (value, None), lambda _, cotangent: (cotangent, cotangent))


def statistics(
    loss_fn: LossFn, params: PyTree, batch: PyTree, weights: jax.Array | None
) -> tuple[jax.Array, PyTree, PyTree]:
    """(losses [B], ‖wᵢ gᵢ‖² for each tensor [B], Σ wᵢ gᵢ like the parameters); exact, in one backward pass.

    Norms and sums are in the accumulator dtype; integer leaves are None.
    """
    kept, rest = trees.partition(params)
    kept = jax.tree.map(jnp.asarray, kept)
    _validate.something_to_differentiate(kept)
    program = capture.capture(loss_fn, kept, rest, batch)
    _validate.dependence(capture.reaches_parameters(program))
    size = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.ones(size) if weights is None else weights
    if not program.is_dynamic():
        return _same_for_all(checked_loss(loss_fn, rest), kept, batch, weights)
    leaves, structure = jax.tree.flatten(kept)
    env = program.constants | dict(zip(program.parameters, leaves, strict=True))
    evaluate(program.static, env)
    losses, traces = _backward(program, env, jax.tree.leaves(batch), weights)

    made: dict[int, Yield] = {}
    todo = plan.make_plan(program)
    for tensor in todo.rules:
        made[tensor.parameter] = _by_rule(program, env, tensor, traces)
    loss = checked_loss(loss_fn, rest)
    for group in todo.groups:
        gradient = _instance(program, env, group)
        operands: Any = {index: traces[index] for index, _ in group.sites}
        if not _compat.has_reverse_mode(gradient, jax.tree.map(lambda leaf: leaf[0], operands)):
            gradient, operands = _whole_gradient(loss, leaves, structure, group), (batch, weights)
        yields = _accumulate(gradient, operands, plan.group_chunk(program, group))
        made.update(zip(group.parameters, zip(*yields, strict=True), strict=True))
    for i, leaf in enumerate(leaves):
        dtype = trees.accumulator_dtype(leaf.dtype)
        made.setdefault(i, (jnp.zeros(size, dtype), jnp.zeros(leaf.shape, dtype)))
    sq_norms, sums = ([made[i][k] for i in range(len(leaves))] for k in (0, 1))
    return losses, jax.tree.unflatten(structure, sq_norms), jax.tree.unflatten(structure, sums)


def _same_for_all(loss: LossFn, kept: PyTree, batch: PyTree, weights: jax.Array) -> tuple[jax.Array, PyTree, PyTree]:
    """The statistics of a loss that ignores the example."""
    value, grad = jax.value_and_grad(loss)(kept, jax.tree.map(lambda leaf: leaf[0], batch))
    grad = trees.accumulate(grad)
    sq_norms = jax.tree.map(lambda q: q * jnp.square(weights).astype(q.dtype), trees.sq_norms(grad))
    sums = jax.tree.map(lambda g: g * weights.sum().astype(g.dtype), grad)
    return jnp.full(weights.shape, value), sq_norms, sums


def _backward(
    program: Program, env: dict[Any, Any], examples: list[jax.Array], weights: jax.Array
) -> tuple[jax.Array, Traces]:
    """(losses, what every site saw): the cotangents of Σ wᵢ ℓᵢ at every site's outputs."""
    size = weights.shape[0]
    taps = {
        index: [jnp.zeros((size, *site.eqn.outvars[k].aval.shape), site.eqn.outvars[k].aval.dtype) for k in site.taps]
        for index, site in program.sites.items()
    }

    def one(taps: dict[int, list[jax.Array]], example: list[jax.Array]) -> tuple[jax.Array, dict[int, list[jax.Array]]]:
        local, seen = env | dict(zip(program.inputs, example, strict=True)), {}
        for index, eqn in enumerate(program.dynamic):
            operands = read_all(eqn.invars, local)
            outs = _compat.bind(eqn, operands)
            if index in taps:
                site = program.sites[index]
                seen[index] = [operands[i] for i in site.dynamic]
                for k, tap in zip(site.taps, taps[index], strict=True):
                    outs[k] = _tap(outs[k], tap)
            local.update(zip(eqn.outvars, outs, strict=True))
        return local[program.output], seen

    losses, pull, seen = jax.vjp(lambda taps: jax.vmap(one)(taps, examples), taps, has_aux=True)
    (cotangents,) = pull(weights.astype(losses.dtype))
    return losses, {index: (seen[index], cotangents[index]) for index in program.sites}


def _by_rule(program: Program, env: dict[Any, Any], tensor: RulePlan, traces: Traces) -> Yield:
    """A tensor whose one use has a rule."""
    site = program.sites[tensor.site]
    operands, (cotangent,) = traces[tensor.site]
    dtype = trees.accumulator_dtype(tensor.view.aval.dtype)
    if isinstance(tensor.rule, Product):
        sq_norms, total = _by_product(tensor.rule, operands[0], cotangent, dtype)
        if total is None:
            total = _sum_by_vjp(site, env, operands, cotangent, dtype)
    else:
        sq_norms = jax.vmap(tensor.rule.sq_norm)(operands, cotangent.astype(dtype))
        total = _sum_by_vjp(site, env, operands, cotangent, dtype)
    parameter = program.parameters[tensor.parameter]
    total = capture.undo_view(tensor.rearranged_by, parameter, tensor.view, total)
    out_dtype = trees.accumulator_dtype(parameter.aval.dtype)
    return sq_norms.astype(out_dtype), total.astype(out_dtype)


def _by_product(product: Product, x: jax.Array, cotangent: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """(‖AᵀB‖² [B], Σ AᵀB as the view's gradient, or None where the primitive's own vjp does the sum better)."""

    def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=product.precision, preferred_element_type=dtype)

    form = plan.product_form(product)
    if form == "instantiate":

        def gradient(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
            return dot("ntd,ntp->ndp", *product.factors(*operands))

        chunk = plan.product_chunk(product, jnp.dtype(dtype).itemsize)
        sq_norms, total = _accumulate(gradient, (x, cotangent), chunk)
        return sq_norms, product.to_view(total)
    a, b = jax.vmap(product.factors)(x, cotangent)
    if form == "closed":
        sq_norms = (_last_axis_sq_norms(a) * _last_axis_sq_norms(b)).sum((1, 2))
    else:
        sq_norms = (dot("bntd,bnsd->bnts", a, a) * dot("bntp,bnsp->bnts", b, b)).sum((1, 2, 3))
    total = product.to_view(dot("bntd,bntp->ndp", a, b)) if product.rearranges else None
    return sq_norms, total


def _last_axis_sq_norms(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(trees.accumulator_dtype(x.dtype))).sum(-1)


def _operands(site: Site, env: dict[Any, Any], example: list[jax.Array]) -> list[Any]:
    """All operands of a site for one example: the static ones from `env`."""
    values = [atom.val if _compat.is_literal(atom) else env.get(atom) for atom in site.eqn.invars]
    for position, value in zip(site.dynamic, example, strict=True):
        values[position] = value
    return values


def _sum_by_vjp(site: Site, env: dict[Any, Any], seen: list[jax.Array], cotangent: jax.Array, dtype: Any) -> jax.Array:
    """Σ over the batch of the gradients of a site's one view, as an ordinary backward pass forms it, in `dtype`."""
    (position,) = site.views
    changed = {"preferred_element_type": None} if "preferred_element_type" in site.eqn.params else {}

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if trees.is_differentiable(x) else x

    def outputs(view: jax.Array) -> jax.Array:
        def one(example: list[jax.Array]) -> jax.Array:
            values = _operands(site, env, example)
            values[position] = view
            return _compat.bind(site.eqn, values, **changed)[0]

        return jax.vmap(one)([widen(x) for x in seen])

    _, pull = jax.vjp(outputs, widen(env[site.eqn.invars[position]]))
    return pull(widen(cotangent))[0]


def _instance(program: Program, env: dict[Any, Any], group: GroupPlan) -> Callable[[Any], list[jax.Array]]:
    """The function of what the sites saw of one example → its gradients with respect to the group's tensors."""
    parameters = [program.parameters[i] for i in group.parameters]
    views = list({program.sites[index].eqn.invars[i]: None for index, positions in group.sites for i in positions})

    def view_values(values: list[jax.Array]) -> list[jax.Array]:
        local = env | dict(zip(parameters, values, strict=True))
        evaluate(program.static, local)
        return [local[view] for view in views]

    _, to_parameters = jax.vjp(view_values, [env[parameter] for parameter in parameters])

    def gradient(example: dict[int, tuple[list[jax.Array], list[jax.Array]]]) -> list[jax.Array]:
        total = {view: jnp.zeros(view.aval.shape, view.aval.dtype) for view in views}
        for index, positions in group.sites:
            site = program.sites[index]
            for position, part in zip(positions, _site_gradients(site, env, positions, *example[index]), strict=True):
                total[site.eqn.invars[position]] += part
        return trees.accumulate(to_parameters([total[view] for view in views])[0])

    return gradient


def _whole_gradient(
    loss: LossFn, leaves: list[jax.Array], structure: Any, group: GroupPlan
) -> Callable[[Any], list[jax.Array]]:
    """The function (example, weight) → its gradients with respect to the group's tensors, by the whole loss."""

    def gradient(row: tuple[PyTree, jax.Array]) -> list[jax.Array]:
        example, weight = row

        def weighted(values: list[jax.Array]) -> jax.Array:
            filled = list(leaves)
            for place, value in zip(group.parameters, values, strict=True):
                filled[place] = value
            value = loss(jax.tree.unflatten(structure, filled), example)
            return value * weight.astype(value.dtype)

        return trees.accumulate(jax.grad(weighted)([leaves[i] for i in group.parameters]))

    return gradient


def _site_gradients(
    site: Site, env: dict[Any, Any], positions: tuple[int, ...], seen: list[jax.Array], cotangents: list[jax.Array]
) -> list[jax.Array]:
    """One example's gradients with respect to the views at `positions`, by the primitive's own vjp."""
    values = _operands(site, env, seen)

    def outputs(views: list[jax.Array]) -> list[jax.Array]:
        filled = list(values)
        for position, view in zip(positions, views, strict=True):
            filled[position] = view
        outs = _compat.bind(site.eqn, filled)
        return [outs[k] for k in site.taps]

    _, pull = jax.vjp(outputs, [values[position] for position in positions])
    return pull(cotangents)[0]


def _accumulate(gradient: Callable[[Any], PyTree], operands: PyTree, chunk: int) -> tuple[PyTree, PyTree]:
    """(‖gᵢ‖² [B], Σ gᵢ) of gᵢ = gradient(operands[i]), leaf by leaf, with `chunk` of the gᵢ in existence at once."""
    size = jax.tree.leaves(operands)[0].shape[0]

    def of_rows(rows: PyTree) -> tuple[PyTree, PyTree]:
        grads = jax.vmap(gradient)(rows)
        return trees.row_sq_norms(grads), trees.row_sums(grads)

    if chunk >= size:
        return of_rows(operands)
    steps = size // chunk
    head = jax.tree.map(lambda leaf: leaf[: steps * chunk].reshape(steps, chunk, *leaf.shape[1:]), operands)
    tail = jax.tree.map(lambda leaf: leaf[steps * chunk :], operands)

    def step(total: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        if chunk == 1:  # one plain product, not a batch of one
            grad = gradient(jax.tree.map(lambda leaf: leaf[0], rows))
            return trees.add(total, grad), jax.tree.map(lambda q: q[None], trees.sq_norms(grad))
        sq_norms, sums = of_rows(rows)
        return trees.add(total, sums), sq_norms

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda leaf: leaf[0], operands))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, sq_norms = jax.lax.scan(step, zeros, head)
    sq_norms = jax.tree.map(lambda leaf: leaf.reshape(-1), sq_norms)
    if size > steps * chunk:
        more_norms, more = of_rows(tail)
        sq_norms = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), sq_norms, more_norms)
        total = trees.add(total, more)
    return sq_norms, total
