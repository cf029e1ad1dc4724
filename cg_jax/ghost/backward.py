"""One forward and one backward pass over the batch that record, for every site, the inputs of its rule."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost import varying
from cg_jax.ghost.activity import has_reverse_mode, is_inexact
from cg_jax.ghost.capture import Nested, Program, Site, uses_of
from cg_jax.ghost.evaluation import differentiated, evaluate, read_all
from cg_jax.ghost.inline import InlinePlan
from cg_jax.ghost.primitives.calls import checkpoint_like

# For each use: its dynamic operands, and the cotangents of its outputs, all [B, ...]; [B, length, ...] in a scan.
Traces = dict[tuple[int, ...], tuple[list[jax.Array], list[jax.Array]]]


@jax.custom_vjp
def _tap(value: jax.Array, tap: jax.Array) -> jax.Array:
    """`value`, whose cotangent is also the cotangent of `tap`. There is no addition, so it costs nothing."""
    # vmap would sum the cotangents of a value that is the same for all examples. The select gives each example its own
    # value. The compiler folds it away.
    return jax.lax.select(jnp.zeros(value.shape, bool), tap, value)


_tap.defvjp(lambda value, tap: (_tap(value, tap), None), lambda _, cotangent: (cotangent, cotangent))


class Backward(NamedTuple):
    """The results of one forward and one backward pass over the batch."""

    losses: jax.Array  # [B]
    aux: list[jax.Array]  # [B, ...]
    traces: Traces
    sums: list[jax.Array]  # Σ wᵢ gᵢ of the views of tensors whose norms were taken inside


def backward(
    program: Program,
    env: dict[Any, Any],
    examples: list[jax.Array],
    weights: jax.Array,
    inside: Sequence[InlinePlan] = (),
) -> Backward:
    """Run the loss of every example, and the backward pass of Σ wᵢ ℓᵢ to the outputs of every site.

    A site of `inside` gives ‖wᵢ gᵢ‖² of every step instead of its cotangent, and the sum of the gradients of its view.
    """
    plans = {plan.use.key: plan for plan in inside}
    views = [plan.path.outer[-1].result if plan.path.outer else program.parameters[plan.parameter] for plan in inside]

    def forward(taps: Any, zero: jax.Array, values: list[jax.Array]) -> tuple[jax.Array, Any]:
        static = env | dict(zip(views, values, strict=True))

        def one(taps: Any, example: list[jax.Array]) -> tuple[jax.Array, Any]:
            evaluator = _Evaluator(zero, plans)
            (loss, *aux), seen = evaluator.of(
                program, static | dict(zip(program.inputs, example, strict=True)), taps, ()
            )
            return loss, (aux, seen)

        return jax.vmap(one)(taps, examples)

    taps = _zero_taps(program, (weights.shape[0],), (), plans)
    with located_errors(program):
        values = [env[view] for view in views]
        losses, pull, (aux, seen) = jax.vjp(forward, taps, jnp.zeros(()), values, has_aux=True)
        cotangents, _, sums = pull(_compat.vary(weights.astype(losses.dtype), _compat.varying_axes(losses)))

    def at(tree: Any, key: tuple[int, ...]) -> Any:
        for index in key:
            tree = tree[index]
        return tree

    return Backward(
        losses, aux, {use.key: (at(seen, use.key), at(cotangents, use.key)) for use in uses_of(program)}, sums
    )


@contextlib.contextmanager
def located_errors(program: Program) -> Generator[None]:
    """A context in which errors name the equation that JAX cannot differentiate."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        for eqn in program.dynamic:
            positions = [i for i, atom in enumerate(eqn.invars) if is_inexact(atom)]
            if positions and not has_reverse_mode(eqn, positions):
                where = _compat.line_of(eqn) or "an unknown line"
                raise ValueError(
                    "Expected a loss_fn that jax.grad can differentiate, got one whose gradient passes through "
                    f"{eqn.primitive.name}, at {where}, which has no reverse mode: {error}"
                ) from error
        raise


def _zero_taps(
    program: Program, leading: tuple[int, ...], key: tuple[int, ...], plans: dict[tuple[int, ...], InlinePlan]
) -> dict[int, Any]:
    """Zeros [*leading, *shape] for every tapped output, by site. One number if norms are taken inside."""
    taps: dict[int, Any] = {}
    for index, site in program.sites.items():
        if isinstance(site, Nested):
            length = () if site.call.length is None else (site.call.length,)
            taps[index] = _zero_taps(site.body, leading + length, (*key, index), plans)
        else:
            avals = [site.eqn.outvars[k].aval for k in site.taps]
            inside = (*key, index) in plans
            taps[index] = [varying.zeros(aval.update(shape=()) if inside else aval, leading) for aval in avals]
    return taps


class _Evaluator(NamedTuple):
    """Evaluates a program for one example, and keeps what its sites see."""

    zero: jax.Array  # differentiated, for rules that ask which operands are
    plans: dict[tuple[int, ...], InlinePlan]  # the uses whose norms are taken inside

    def of(
        self, program: Program, env: dict[Any, Any], taps: dict[int, Any], key: tuple[int, ...]
    ) -> tuple[list[Any], dict[int, Any]]:
        """(results, operands seen by the sites) of a program. `env` holds all static values and the inputs."""
        seen: dict[int, Any] = {}
        for index, eqn in enumerate(program.dynamic):
            operands, site = read_all(eqn.invars, env), program.sites.get(index)
            if isinstance(site, Nested):
                outs, seen[index] = self.of_nested(site, operands, taps[index], (*key, index))
            else:
                outs = _compat.bind(eqn, differentiated(program.marks.get(index, ()), operands, self.zero))
            if isinstance(site, Site):
                seen[index] = [operands[i] for i in site.dynamic]
                plan = self.plans.get((*key, index))
                for k, tap in zip(site.taps, taps[index], strict=True):
                    if plan is not None:
                        outs[k], seen[index] = plan.tap(outs[k], tap, seen[index]), []
                    else:  # XLA folds an added zero away, but inside a body it does not know that taps are zeros
                        outs[k] = _tap(outs[k], tap) if key else outs[k] + tap
            env.update(zip(eqn.outvars, outs, strict=True))
        return read_all(program.outputs, env), seen

    def of_nested(
        self, nested: Nested, operands: list[Any], taps: dict[int, Any], key: tuple[int, ...]
    ) -> tuple[list[Any], dict[int, Any]]:
        """A scan or a checkpoint that takes taps and also returns what its sites saw, stacked over the steps."""
        body, call = nested.body, nested.call

        def once(operands: list[Any], taps: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
            env = body.constants | dict(zip(body.all_inputs, operands, strict=True))
            evaluate(body.static, env)
            return self.of(body, env, taps, key)

        if call.length is None:
            return checkpoint_like(nested.eqn, once)(operands, taps)
        consts, init, slices = call.split(operands)

        def step(carry: list[Any], row: tuple[list[Any], dict[int, Any]]) -> tuple[list[Any], Any]:
            outs, seen = once([*consts, *carry, *row[0]], row[1])
            return outs[: call.num_carry], (outs[call.num_carry :], seen)

        if nested.checkpoint is not None:
            step = checkpoint_like(nested.checkpoint, step)
        params = nested.eqn.params
        carry, (stacked, seen) = jax.lax.scan(
            step, init, (slices, taps), call.length, reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*carry, *stacked], seen
