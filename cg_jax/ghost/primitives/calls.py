"""Calls that may be evaluated in place, and the bodies of scans and checkpoints."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from cg_jax import _compat
from cg_jax._jaxprs import inner_eqns, inner_jaxprs, opened
from cg_jax.ghost.primitives.base import Primitive, each, of, of_body


class Body(NamedTuple):
    """The body of a scan or of a checkpoint: f(constants, carry, slices) → (carry, slices)."""

    jaxpr: Any
    consts: Sequence[Any]
    num_consts: int
    num_carry: int
    length: int | None  # None: a checkpoint, which runs once and has constants only

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(constants, initial carry, slices) of the operands."""
        end = self.num_consts + self.num_carry
        return list(operands[: self.num_consts]), list(operands[self.num_consts : end]), list(operands[end:])


def inner_jaxpr(eqn: Any, checkpoints: bool) -> tuple[Any, Sequence[Any]] | None:
    """(body, constants) of a call that may be evaluated in place, or None. With `checkpoints`, also of a checkpoint."""
    key = of(eqn).inlines
    if checkpoints and is_checkpoint(eqn):
        key = "jaxpr"
    return None if key is None else opened(eqn.params[key])


def is_checkpoint(eqn: Any) -> bool:
    """Whether an equation is a `jax.checkpoint`."""
    return of(eqn).is_checkpoint and not eqn.params.get("differentiated")


def holds_scan(eqn: Any) -> bool:
    """Whether an inner jaxpr of an equation contains a scan."""
    return any(of(inner).is_scan for inner in inner_eqns(eqn))


def carry_of(eqn: Any) -> range:
    """The positions of the operands that start the carry of a scan."""
    num_consts, num_carry = _compat.scan_counts(eqn)
    return range(num_consts, num_consts + num_carry)


def copies_into_carries(eqns: Sequence[Any]) -> set[Any]:
    """The copies that start the carries of scans."""
    copies = {out for eqn in eqns if of(eqn).is_copy for out in eqn.outvars}
    carried = [eqn.invars[i] for eqn in eqns if of(eqn).is_scan for i in carry_of(eqn)]
    return {atom for atom in carried if not _compat.is_literal(atom) and atom in copies}


def body_of(eqn: Any) -> Body | None:
    """The body of a scan or a checkpoint, else None."""
    if of(eqn).is_scan:
        return Body(*opened(eqn.params["jaxpr"]), *_compat.scan_counts(eqn), eqn.params["length"])
    if is_checkpoint(eqn):
        return Body(*opened(eqn.params["jaxpr"]), len(eqn.invars), 0, None)
    return None


def checkpoint_like(eqn: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, rematerialised in the same way as the checkpoint `eqn`."""
    return jax.checkpoint(f, prevent_cse=eqn.params.get("prevent_cse", True), policy=eqn.params.get("policy"))


def checkpoint_in(jaxpr: Any) -> Any:
    """The first checkpoint among the equations of a jaxpr and of the calls in it, or None."""
    for eqn in jaxpr.eqns:
        inner = inner_jaxpr(eqn, checkpoints=False)
        checkpoint = eqn if is_checkpoint(eqn) else checkpoint_in(inner[0]) if inner else None
        if checkpoint is not None:
            return checkpoint
    return None


def scan_of_checkpoints(eqn: Any, checkpoint: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a scan, with every step rematerialised in the same way as `checkpoint`."""
    call = body_of(eqn)
    assert call is not None
    consts, init, slices = call.split(operands)
    body = core.jaxpr_as_fun(core.ClosedJaxpr(call.jaxpr, call.consts))

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = checkpoint_like(checkpoint, body)(*consts, *carry, *row)
        return list(outs[: call.num_carry]), list(outs[call.num_carry :])

    again = {name: eqn.params[name] for name in ("reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, init, slices, call.length, **again)
    return [*carry, *stacked]


def has_custom_vjp(eqn: Any) -> bool:
    """Whether a custom_vjp computes the cotangents of an equation, which may then be nonlinear in the output's."""
    return any(of(part).custom == "vjp" for part in (eqn, *inner_eqns(eqn)))


def has_custom_rule(eqn: Any) -> bool:
    """Whether an equation holds a custom_jvp or custom_vjp, whose rule may ask which operands are differentiated."""
    return any(of(part).custom for part in (eqn, *inner_eqns(eqn)))


def _scan_operations(eqn: Any) -> int:
    return (eqn.params.get("length") or 1) * sum(map(of_body, inner_jaxprs(eqn)))


# The bodies of jit and calls may be evaluated in place without changing derivatives. Those of a custom_jvp or
# custom_vjp may not, since their rules must be respected. Names differ between JAX releases.
ENTRIES = (
    each("jit pjit", Primitive(inlines="jaxpr"))
    | each("closed_call core_call", Primitive(inlines="call_jaxpr"))
    | each("checkpoint remat remat2", Primitive(is_checkpoint=True))
    | {"scan": Primitive(is_scan=True, operations=_scan_operations)}
    | each("custom_jvp_call custom_jvp_call_jaxpr", Primitive(custom="jvp"))
    | each("custom_vjp_call custom_vjp_call_jaxpr", Primitive(custom="vjp"))
)
