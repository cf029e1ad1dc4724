"""One forward and one backward pass over the batch that leave, for every site, what its rule needs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat
from cg_jax.ghost.activity import is_inexact
from cg_jax.ghost.capture import Nested, Program, Site, differentiated, evaluate, read_all, uses_of

# For each use: its dynamic operands, and the cotangents of its outputs, all [B, ...]; [B, length, ...] in a scan.
Traces = dict[tuple[int, ...], tuple[list[jax.Array], list[jax.Array]]]


@jax.custom_vjp
def _tap(value: jax.Array, tap: jax.Array) -> jax.Array:
    """`value`; its cotangent is also that of `tap`. Nothing is added, so that nothing is paid for."""
    # vmap would sum the cotangents of a value that is the same for all examples. This makes it one of each example's
    # own, and is folded away when it is compiled.
    return jax.lax.select(jnp.zeros(value.shape, bool), tap, value)


_tap.defvjp(lambda value, tap: (_tap(value, tap), None), lambda _, cotangent: (cotangent, cotangent))


def backward(
    program: Program, env: dict[Any, Any], examples: list[jax.Array], weights: jax.Array
) -> tuple[jax.Array, list[jax.Array], Traces]:
    """(losses [B], auxiliary values [B, ...], what every site saw: the cotangents of Σ wᵢ ℓᵢ at its outputs)."""

    def forward(taps: Any, zero: jax.Array) -> tuple[jax.Array, Any]:
        def one(taps: Any, example: list[jax.Array]) -> tuple[jax.Array, Any]:
            (loss, *aux), seen = _run(program, env | dict(zip(program.inputs, example, strict=True)), taps, zero)
            return loss, (aux, seen)

        return jax.vmap(one)(taps, examples)

    taps = _zero_taps(program, (weights.shape[0],))
    with located_errors(program):
        losses, pull, (aux, seen) = jax.vjp(forward, taps, jnp.zeros(()), has_aux=True)
        cotangents, _ = pull(_compat.vary(weights.astype(losses.dtype), _compat.varying_axes(losses)))

    def at(tree: Any, key: tuple[int, ...]) -> Any:
        for index in key:
            tree = tree[index]
        return tree

    return losses, aux, {use.key: (at(seen, use.key), at(cotangents, use.key)) for use in uses_of(program)}


@contextlib.contextmanager
def located_errors(program: Program) -> Iterator[None]:
    """Of a loss that JAX cannot differentiate, say which equation it cannot."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        for eqn in program.dynamic:
            positions = [i for i, atom in enumerate(eqn.invars) if is_inexact(atom)]
            if positions and not _compat.has_reverse_mode(eqn, positions):
                where = _compat.source_of(eqn) or "an unknown line"
                raise ValueError(
                    "Expected a loss_fn that jax.grad can differentiate, got one whose gradient passes through "
                    f"{eqn.primitive.name}, at {where}, which has no reverse mode: {error}"
                ) from error
        raise


def _zero_taps(program: Program, leading: tuple[int, ...]) -> dict[int, Any]:
    """Zeros for every tapped output, by site, [*leading, *shape]."""
    taps: dict[int, Any] = {}
    for index, found in program.sites.items():
        if isinstance(found, Nested):
            length = () if found.call.length is None else (found.call.length,)
            taps[index] = _zero_taps(found.body, leading + length)
        else:
            avals = [found.eqn.outvars[k].aval for k in found.taps]
            taps[index] = [_compat.zeros(aval, leading) for aval in avals]
    return taps


def _run(
    program: Program, env: dict[Any, Any], taps: dict[int, Any], zero: jax.Array, in_body: bool = False
) -> tuple[list[Any], dict[int, Any]]:
    """(results, what the sites saw) of a program for one example; `env` holds all that is static, and the inputs."""
    seen: dict[int, Any] = {}
    for index, eqn in enumerate(program.dynamic):
        operands, found = read_all(eqn.invars, env), program.sites.get(index)
        if isinstance(found, Nested):
            outs, seen[index] = _run_nested(found, operands, taps[index], zero)
        else:
            outs = _compat.bind(eqn, differentiated(program.marks.get(index, ()), operands, zero))
        if isinstance(found, Site):
            seen[index] = [operands[i] for i in found.dynamic]
            for k, tap in zip(found.taps, taps[index], strict=True):
                # The zeros of a body are not seen to be zeros when it is compiled; elsewhere to add them is folded away.
                outs[k] = _tap(outs[k], tap) if in_body else outs[k] + tap
        env.update(zip(eqn.outvars, outs, strict=True))
    return read_all(program.outputs, env), seen


def _run_nested(
    nested: Nested, operands: list[Any], taps: dict[int, Any], zero: jax.Array
) -> tuple[list[Any], dict[int, Any]]:
    """A scan that takes taps and hands out what the sites of every step saw, stacked; a checkpoint, likewise."""
    body, call = nested.body, nested.call

    def once(operands: list[Any], taps: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
        env = body.constants | dict(zip(body.all_inputs, operands, strict=True))
        evaluate(body.static, env)
        return _run(body, env, taps, zero, in_body=True)

    if call.length is None:
        return _compat.checkpoint_like(nested.eqn, once)(operands, taps)
    consts, init, slices = call.split(operands)

    def step(carry: list[Any], row: tuple[list[Any], dict[int, Any]]) -> tuple[list[Any], Any]:
        outs, seen = once([*consts, *carry, *row[0]], row[1])
        return outs[: call.num_carry], (outs[call.num_carry :], seen)

    if nested.checkpoint is not None:
        step = _compat.checkpoint_like(nested.checkpoint, step)
    params = nested.eqn.params
    carry, (stacked, seen) = jax.lax.scan(
        step, init, (slices, taps), call.length, reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *stacked], seen
