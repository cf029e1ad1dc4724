"""What a training needs of a data set: noisy labels, mini-batches from any step on, samples to measure on."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np

import cg_jax as cg

from . import models
from .configs import Config
from .data import Noise
from .devices import devices
from .train import Keys


class Guesses(NamedTuple):
    """What a network says of the examples of a sample, beside what is so; each [m]."""

    guess: np.ndarray  # predicted classes
    labels: np.ndarray  # as trained on
    true: np.ndarray


class Examples(Protocol):
    """A data set whose labels are noisy in the way of one seed."""

    @property
    def first(self) -> np.ndarray:
        """One image [1, height, width, channels], for its shape."""
        ...

    @property
    def num_train(self) -> int:
        """How many examples are trained on."""
        ...

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[Any, Any, Any]]:
        """(images, labels, rows) of each step from `step` on, rows [mini-batches, B], each divided over the devices.

        rows is None where images and labels are only those, [mini-batches, B, …].
        """
        ...

    def guess(self, sample: str, model: nn.Module, params: Any) -> Guesses:
        """Predictions on the sample, "train" or "test", or "valid" where one is held out."""
        ...

    def measure(self, sample: str, model: nn.Module, params: Any) -> tuple[cg.Coherence, Guesses]:
        """Coherence of the sample, and predictions on it."""
        ...


class Data(Protocol):
    """A data set."""

    num_train: int
    num_classes: int
    measured: dict[str, int]  # how many examples of the samples "train" and "test" are measured on

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        ...

    def noisy(self, keys: Keys, noise: Noise) -> Examples:
        """It with labels changed, and examples left out, as `noise` says."""
        ...


def coherence_of(config: Config, model: nn.Module, params: Any, sample: Any, *, batch_size: int) -> cg.Coherence:
    """Coherence of a sample by the estimator that the config names, on the host."""
    loss_fn = models.loss_of(model) if config.by_example else models.mean_loss_of(model)
    trained, state = models.with_state(params)
    measure = functools.partial(cg.measure_coherence, mesh=devices().mesh, estimator=config.estimator)
    return jax.device_get(measure(loss_fn, trained, sample, state=state, batch_size=batch_size))
