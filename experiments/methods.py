"""METHODS: how the gradients of mini-batches, or of single examples, become a step. A new method is one entry."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import cg_jax as cg

from .filtering import gradient_agreement
from .line import Line

# Mini-batches; an epoch is a whole number of these, so that all methods see the same examples in it.
EPOCH_UNIT = 3

LossFn = Callable[..., jax.Array]  # (params, example) → loss
Average = Callable[[Any, Any], Any]  # (params, batch) → one gradient


class Method(NamedTuple):
    """A way to train."""

    line: Line
    groups: int  # mini-batches in one step, each with its own gradient; divides EPOCH_UNIT
    transform: Callable[[], optax.GradientTransformation]  # of one gradient, or of `groups` stacked ones
    rivals: tuple[str, ...] = ()  # the methods that it is claimed to be better than, its control among them
    # Of a loss and the number of examples of a step: a robust average over the gradients of those examples, all
    # mini-batches of the step together, which is then the one gradient that is transformed. Needs no BatchNorm.
    average: Callable[[LossFn, int], Average] | None = None
    models: tuple[str, ...] | None = None  # the networks that it can train; None: all
    dear: bool = False  # whether a step costs so much more than others that it is measured in fewer places

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return self.line.label

    @property
    def short(self) -> str:
        """The label up to its comma, which claims begin with."""
        return self.label.split(",")[0]

    @property
    def gradients(self) -> int:
        """How many gradients of mini-batches a step begins with; 1 where it is an average over examples."""
        return self.groups if self.average is None else 1


# One number each, whatever share of the labels is wrong.
_HALF, _MOST = 0.5, 0.7
# The cosine distance that the authors' implementation begins with.
_DISTANCE = 0.97
_CONTROLS = ("mean3", "m3", "gaf")


def _weighted(weighting: Callable[[], Any]) -> Callable[[LossFn, int], Average]:
    """The average whose weights a weighting of the library gives."""

    def average(loss_fn: LossFn, size: int) -> Average:
        del size
        grads = cg.weighted_grads(loss_fn, weighting())
        return lambda params, batch: grads(params, batch)[0]

    return average


def _winsorized(loss_fn: LossFn, size: int) -> Average:
    """A quarter of the values of every coordinate is moved inwards from each side."""
    return cg.coordinatewise_grads(loss_fn, cg.winsorized_mean(size // 4))


def _per_side(line: Line, rule: Callable[[Any], Any]) -> Method:
    """A coordinate-wise rule over the examples of one mini-batch."""
    return Method(line, 1, optax.identity, (), lambda loss_fn, _: cg.coordinatewise_grads(loss_fn, rule), ("mlp",))


def _by_example(line: Line, average: Callable[[LossFn, int], Average], *rivals: str) -> Method:
    """An average over the examples of the batch that mean3 takes."""
    return Method(line, 3, optax.identity, (*_CONTROLS, *rivals), average)


# Winsorised SGD, as published: of one mini-batch, with a few examples per side, or all but the middle.
PER_SIDE: dict[str, Method] = {
    "winsor1": _per_side(Line("c = 1", "tab:blue", "--", "o"), cg.winsorized_mean(1)),
    "winsor2": _per_side(Line("c = 2", "tab:green", "-.", "^"), cg.winsorized_mean(2)),
    "winsor4": _per_side(Line("c = 4", "tab:orange", ":", "s"), cg.winsorized_mean(4)),
    "winsor8": _per_side(Line("c = 8", "tab:red", "--", "x"), cg.winsorized_mean(8)),
    "cw_median": _per_side(Line("median", "tab:purple", "-.", "D"), cg.median()),
}

METHODS: dict[str, Method] = {
    "sgd": Method(Line("SGD", "black"), 1, optax.identity),
    "mean3": Method(Line("mean of 3 (control)", "tab:gray", "--"), 3, lambda: cg.stacked(cg.mean())),
    "m3": Method(Line("M3, median of 3", "tab:blue", "-", "*"), 3, lambda: cg.stacked(cg.median()), ("sgd", "mean3")),
    "rm3": Method(Line("RM3, rolling median", "tab:cyan", "-.", "+"), 1, cg.rm3, ("sgd", "ra3")),
    "ra3": Method(Line("RA3, rolling mean", "tab:orange", "--", "+"), 1, cg.ra3),
    "gaf": Method(
        Line("GAF, agreeing mini-batches", "tab:brown", ":"), 3, lambda: gradient_agreement(_DISTANCE), ("mean3",)
    ),
    "clip": _by_example(
        Line("clip, at the median norm", "tab:green", "-", "o"), _weighted(lambda: cg.clip_quantile(_HALF))
    ),
    "agreement": _by_example(
        Line("agreement, half of the batch", "tab:olive", "-.", "s"), _weighted(lambda: cg.agreement(_HALF))
    ),
    "clip_agreement": _by_example(
        Line("clip + agreement, composed", "tab:red", "-", "^"),
        _weighted(lambda: cg.compose(cg.clip_quantile(0.25), cg.agreement(_MOST))),
        *("clip", "agreement"),
    ),
    "geomed": _by_example(
        Line("geometric median, 4 iterations", "tab:purple", "-", "x"), _weighted(lambda: cg.geometric_median(4))
    ),
    "trim_loss": _by_example(
        Line("smallest losses, 70% of the batch", "tab:pink", "--", "D"), _weighted(lambda: cg.trim_loss(_MOST))
    ),
    "winsorized": _by_example(Line("winsorised mean, a quarter per side", "goldenrod", ":"), _winsorized)._replace(
        models=("mlp",), dear=True
    ),
    **PER_SIDE,
}


def check_method(name: str, model: str | None = None, *, batch_norm: bool = False) -> None:
    """ValueError where the entry of a method does not fit the others, or a model."""
    method = METHODS[name]
    if method.groups < 1 or EPOCH_UNIT % method.groups:
        raise ValueError(f"Expected groups of {name} to divide {EPOCH_UNIT}, got groups={method.groups}.")
    unknown = [rival for rival in method.rivals if rival not in METHODS]
    if unknown:
        raise ValueError(f"Expected rivals of {name} in {(*METHODS,)}, got {unknown}.")
    if batch_norm and method.average is not None:
        what = f"a model without BatchNorm for {name}, which takes the gradient of every example"
        raise ValueError(f"Expected {what}, got model={model}.")
    if model is not None and method.models is not None and model not in method.models:
        raise ValueError(f"Expected model in {method.models} for {name}, got model={model}.")
