"""Where the examples of a run come from: labels with noise, mini-batches from any step on, samples to measure on."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np

import cg_jax as cg
from experiments import data, models
from experiments.configs import Config
from experiments.devices import devices
from experiments.train import Keys, predict, rows_from


class Guesses(NamedTuple):
    """What a network says of the examples of a sample, beside what is so."""

    guess: np.ndarray  # [m] predicted classes
    labels: np.ndarray  # [m] as trained on
    true: np.ndarray  # [m]


class Examples(Protocol):
    """A data set whose labels are noisy in the way of one seed."""

    @property
    def first(self) -> Any:
        """One image [1, height, width, channels], for its shape."""
        ...

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[Any, Any, Any]]:
        """(images, labels, rows) of each step from `step` on; rows is None where images hold only those."""
        ...

    def guess(self, sample: str, model: nn.Module, params: Any) -> Guesses:
        """Predictions on the sample, "train" or "test"."""
        ...

    def measure(self, sample: str, model: nn.Module, params: Any) -> tuple[cg.Coherence, Guesses]:
        """Coherence of the sample, and predictions on it."""
        ...


class Source(Protocol):
    """A data set."""

    num_train: int
    num_classes: int

    def noisy(self, keys: Keys, train: float, test: float) -> Examples:
        """It with shares `train` and `test` of the labels redrawn."""
        ...


def load(config: Config) -> Source:
    """The data set that the config names."""
    return InMemory(config)


class InMemory:
    """A data set that fits the memory of every device."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._data = data.load(
            config.data, folder=config.data_dir, num_train=config.num_train, num_test=config.num_test
        )
        self.num_train = len(self._data.train_labels)
        self.num_classes = self._data.num_classes

    def noisy(self, keys: Keys, train: float, test: float) -> "OnDevices":
        """Copies on all devices."""
        part = self._data
        return OnDevices(
            self._config,
            keys,
            {"train": (part.train_images, part.train_labels), "test": (part.test_images, part.test_labels)},
            {
                "train": data.corrupt(keys.noise, part.train_labels, train, self.num_classes),
                "test": data.corrupt(keys.test_noise, part.test_labels, test, self.num_classes),
            },
        )


class OnDevices:
    """All examples on every device; a step picks its rows."""

    def __init__(
        self, config: Config, keys: Keys, true: dict[str, tuple[np.ndarray, np.ndarray]], labels: dict[str, np.ndarray]
    ) -> None:
        self._config, self._keys, self._true, self._labels = config, keys, true, labels
        self._there = {name: devices().replicate((images, labels[name])) for name, (images, _) in true.items()}
        self.first = true["train"][0][:1]

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """All images and labels, and the rows of each step from `step` on."""
        size = len(self._labels["train"])
        for rows in rows_from(self._keys.order, step, size, rows_per_step, self._config.batch_size):
            yield (*self._there["train"], devices().spread(rows))

    def guess(self, sample: str, model: nn.Module, params: Any) -> Guesses:
        """Predictions on the whole sample."""
        images, labels = self._there[sample]
        guess = predict(model, params, images, min(self._config.measure_batch_size, len(labels)))
        return Guesses(guess, self._labels[sample], self._true[sample][1])

    def measure(self, sample: str, model: nn.Module, params: Any) -> tuple[cg.Coherence, Guesses]:
        """Coherence of the whole sample, and predictions on it."""
        there, loss_fn = self._there[sample], models.loss_of(model)
        batch_size = min(self._config.measure_batch_size, len(there[1]))
        found = cg.measure_coherence(loss_fn, params, there, batch_size=batch_size, mesh=devices().mesh)
        return jax.device_get(found), self.guess(sample, model, params)
