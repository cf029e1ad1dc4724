"""Iterate over the equations of a jaxpr, including those of its inner jaxprs."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(open jaxpr, its constants) of an open or a closed jaxpr."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation, open."""

    def is_jaxpr(value: Any) -> bool:
        return isinstance(value, core.ClosedJaxpr | core.Jaxpr)

    leaves = jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)
    return [opened(leaf)[0] for leaf in leaves if is_jaxpr(leaf)]


def holds_jaxprs(eqn: Any) -> bool:
    """Whether an equation is a loop, a branch or a call with its own rule."""
    return bool(inner_jaxprs(eqn))


def inner_eqns(eqn: Any) -> Iterator[Any]:
    """All equations of the inner jaxprs of an equation, at any depth."""
    for jaxpr in inner_jaxprs(eqn):
        yield from all_eqns(jaxpr)


def all_eqns(jaxpr: Any) -> Iterator[Any]:
    """All equations of an open or closed jaxpr, including those of its inner jaxprs."""
    for eqn in opened(jaxpr)[0].eqns:
        yield eqn
        yield from inner_eqns(eqn)
