"""Data sets that fit the memory of every device."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import cg_jax as cg

from . import data
from .configs import Config
from .devices import devices
from .examples import Guesses, coherence_of
from .train import Keys, predict, rows_from

# What keys are folded with, so that these draws are none of those that every run makes.
_RARE, _VALIDATION = 1, 2


class InMemory:
    """A data set in the memory of the host."""

    def __init__(self, config: Config) -> None:
        loaded = data.load(config.data, folder=config.data_dir, num_train=config.num_train, num_test=config.num_test)
        self._config, self._data = config, loaded
        self.num_train, self.num_classes = len(loaded.train_labels), loaded.num_classes
        self.image_shape = loaded.train_images.shape[1:]
        self.measured = {"train": self.num_train, "test": len(loaded.test_labels)}

    @functools.cached_property
    def _images(self) -> tuple[jax.Array, jax.Array]:
        """Training and test images on all devices, once for all seeds."""
        return devices().replicate((self._data.train_images, self._data.test_images))

    def noisy(self, keys: Keys, noise: data.Noise) -> "OnDevices":
        """Copies on all devices; images that all examples keep are shared by all seeds."""
        loaded = self._data
        shared, test_images = self._images
        images, true = loaded.train_images, loaded.train_labels
        if noise.rows is not None:
            images, true = images[list(noise.rows)], true[list(noise.rows)]
        if noise.rare < 1:
            rows = data.without_most_of(jax.random.fold_in(keys.noise, _RARE), true, noise.rare)
            images, true = images[rows], true[rows]
        labels = data.corrupt(keys.noise, true, noise.train, self.num_classes, noise.kind)
        test_labels = data.corrupt(keys.test_noise, loaded.test_labels, noise.test, self.num_classes, noise.kind)
        samples = {
            "train": (shared if images is loaded.train_images else images, labels, true),
            "test": (test_images, test_labels, loaded.test_labels),
        }
        if noise.validation:
            parts = data.held_out(jax.random.fold_in(keys.noise, _VALIDATION), true.size, noise.validation)
            for sample, rows in zip(("train", "valid"), parts, strict=True):
                samples[sample] = images[rows], labels[rows], true[rows]
        return OnDevices(self._config, keys, samples)


class OnDevices:
    """All examples on every device; a step picks its rows."""

    def __init__(self, config: Config, keys: Keys, samples: dict[str, tuple[Any, np.ndarray, np.ndarray]]) -> None:
        self._config, self._keys = config, keys
        self._labels = {name: (labels, true) for name, (_, labels, true) in samples.items()}
        self._there = {name: devices().replicate((images, labels)) for name, (images, labels, _) in samples.items()}
        self.first, self.num_train = np.asarray(samples["train"][0][:1]), len(samples["train"][1])

    def _batch_size(self, sample: str) -> int:
        return min(self._config.measure_batch_size, len(self._labels[sample][0]))

    def rows(self, step: int, rows_per_step: int) -> Iterator[np.ndarray]:
        """The rows [groups, B] of each step from `step` on."""
        batch_size = self._config.batch_size
        for rows in rows_from(self._keys.order, step, self.num_train, rows_per_step, batch_size):
            yield rows.reshape(-1, batch_size)

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """All images and labels, and the rows [groups, B] of each step from `step` on."""
        for rows in self.rows(step, rows_per_step):
            yield *self._there["train"], devices().spread(rows, 1)

    def arrays(self, sample: str) -> tuple[jax.Array, jax.Array]:
        """Images and labels, as trained on, of the whole sample."""
        return self._there[sample]

    def guess(self, sample: str, model: nn.Module, params: Any) -> Guesses:
        """Predictions on the whole sample."""
        return Guesses(predict(model, params, self._there[sample][0], self._batch_size(sample)), *self._labels[sample])

    def measure(self, sample: str, model: nn.Module, params: Any) -> tuple[cg.Coherence, Guesses]:
        """Coherence of the whole sample, and predictions on it."""
        batch_size = self._batch_size(sample)
        coherence = coherence_of(self._config, model, params, self._there[sample], batch_size=batch_size)
        return coherence, self.guess(sample, model, params)
