"""What the experiments on the learning of single examples have in common: numbers of every example, and their sums."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import flax.linen as nn
import jax
import numpy as np
import pandas as pd

import cg_jax as cg

from . import models
from .arrays import OnDevices
from .configs import TFDS, Config
from .examples import Examples
from .section import Row

# Significant digits of the numbers in a row.
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class LearningConfig(Config):
    """Options of experiments that look at every training example."""

    seeds: int = 5
    width: int | None = 256
    early: int = 12
    every: int = 2

    @property
    def samples(self) -> tuple[str, ...]:
        """The training sample."""
        return ("train",)

    def smaller(self) -> Self:
        """Measured at few steps."""
        return dataclasses.replace(self, early=3)

    def check(self) -> None:
        """ValueError where single examples cannot be looked at."""
        if self.data.startswith(TFDS):
            raise ValueError(f"Expected data that fits the memory, not {TFDS}NAME, got data={self.data}.")
        if models.MODELS[self.model].batch_norm or not self.by_example:
            what = f"model={self.model} and estimator={self.estimator}"
            raise ValueError(f"Expected a model without BatchNorm and estimator exact, got {what}.")


class PerExample(NamedTuple):
    """Numbers of every example of a sample at given parameters, each [m]; gᵢ is the gradient of one example's loss."""

    losses: np.ndarray  # nats
    sq_norms: np.ndarray  # ‖gᵢ‖²
    along: np.ndarray  # gᵢ · Σⱼ gⱼ, which adds up to ‖Σ g‖²
    fitted: np.ndarray  # whether it is predicted as it is labelled
    corrupt: np.ndarray  # whether its label is wrong

    @property
    def alpha(self) -> float:
        """α = ‖Σ g‖² / (m Σ ‖g‖²)."""
        return float(self.along.sum() / (self.along.size * self.sq_norms.sum()))


def _along_the_sum(statistics: cg.ExampleStatistics) -> jax.Array:
    return statistics.alignments()


@functools.cache
def _numbers(model: nn.Module) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted function (params, batch) → (losses, squared norms, inner products with the sum), each [m].

    One forward and one backward pass: the inner products are what a weighting of the library sees.
    """
    grads = cg.weighted_grads(models.loss_of(model), _along_the_sum)

    def numbers(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, info = grads(params, batch)
        return info.losses, info.sq_norms, info.weights

    return jax.jit(numbers)


def per_example(examples: Examples, model: nn.Module, params: Any, sample: str = "train") -> PerExample:
    """The numbers of every example of a sample that is in the memory of the devices."""
    images, labels = cast(OnDevices, examples).arrays(sample)
    numbers = jax.device_get(_numbers(model)(params, (images, labels)))
    seen = examples.guess(sample, model, params)
    losses, sq_norms, along = (np.asarray(part, float) for part in numbers)
    return PerExample(losses, sq_norms, along, seen.guess == seen.labels, seen.labels != seen.true)


def part_of(values: np.ndarray, mask: np.ndarray) -> float:
    """The share of the sum of `values` that the examples of a mask have; outside [0, 1] where signs differ.

    >>> part_of(np.array([3.0, 2.0, -1.0]), np.array([True, False, False]))
    0.75
    """
    return float(values[mask].sum() / values.sum())


def effective_number(values: np.ndarray) -> float:
    """(Σ v)² / Σ v²: how many equal values have as much spread; m where all are equal, 1 where one is all.

    >>> effective_number(np.array([1.0, 1.0, 0.0]))
    2.0
    """
    return float(values.sum() ** 2 / (values**2).sum())


def share_of(mask: np.ndarray) -> float:
    """The share of examples that are in a mask; NaN of none."""
    return float(mask.mean()) if mask.size else float("nan")


def accuracy(examples: Examples, model: nn.Module, params: Any, sample: str = "test") -> float:
    """The share of a sample that is predicted as it is labelled."""
    seen = examples.guess(sample, model, params)
    return share_of(seen.guess == seen.labels)


def rounded(row: Row) -> Row:
    """The same with five digits of each real number, in rows inside it too."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return rounded(value)
        return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in row.items()}


def reached(run: pd.DataFrame, column: str, level: float) -> float:
    """The step at which a column of one training first reaches `level` from below, interpolated; NaN if it does not."""
    steps, values = (run[name].to_numpy(float) for name in ("step", column))
    above = np.flatnonzero(values >= level)
    if not above.size:
        return float("nan")
    i = above[0]
    if i == 0:
        return float(steps[0])
    return float(np.interp(level, values[i - 1 : i + 1], steps[i - 1 : i + 1]))


def crossing(run: pd.DataFrame, corrupt: str) -> float:
    """The step, from the end of the first epoch on, at which the corrupt examples' share first reaches one half."""
    return reached(run[run["epoch"] >= 1], corrupt, 0.5)


def by_run(table: pd.DataFrame, number: Callable[[pd.DataFrame], float]) -> pd.Series:
    """One number of the training of each seed."""
    return pd.Series({seed: number(run) for seed, run in table.groupby("seed")}, dtype=float)
