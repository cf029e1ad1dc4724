"""METHODS: how the gradients of mini-batches become a step. A new method is one entry."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import cg_jax as cg

from .line import Line

# Mini-batches; an epoch is a whole number of these, so that all methods see the same examples in it.
EPOCH_UNIT = 3


class Method(NamedTuple):
    """A way to train."""

    line: Line
    groups: int  # mini-batches in one step, each with its own gradient; divides EPOCH_UNIT
    transform: Callable[[], optax.GradientTransformation]  # of one gradient, or of `groups` stacked ones
    rivals: tuple[str, ...] = ()  # the methods that it is claimed to be better than, its control among them

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return self.line.label

    @property
    def short(self) -> str:
        """The label up to its comma, which claims begin with."""
        return self.label.split(",")[0]


METHODS: dict[str, Method] = {
    "sgd": Method(Line("SGD", "black"), 1, optax.identity),
    "mean3": Method(Line("mean of 3 (control)", "tab:gray", "--"), 3, lambda: cg.stacked(cg.mean())),
    "m3": Method(Line("M3, median of 3", "tab:blue"), 3, lambda: cg.stacked(cg.median()), ("sgd", "mean3")),
    "rm3": Method(Line("RM3, rolling median", "tab:cyan", "-."), 1, cg.rm3, ("sgd", "ra3")),
    "ra3": Method(Line("RA3, rolling mean", "tab:orange", "--"), 1, cg.ra3),
}


def check_method(name: str) -> None:
    """ValueError where the entry of a method does not fit the others."""
    method = METHODS[name]
    if method.groups < 1 or EPOCH_UNIT % method.groups:
        raise ValueError(f"Expected groups of {name} to divide {EPOCH_UNIT}, got groups={method.groups}.")
    unknown = [rival for rival in method.rivals if rival not in METHODS]
    if unknown:
        raise ValueError(f"Expected rivals of {name} in {(*METHODS,)}, got {unknown}.")
