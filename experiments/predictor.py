"""Whether coherence early in training predicts the generalisation gap, and what else does."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import data, loop, predictor_report
from .arrays import OnDevices
from .configs import TFDS, Config, Hidden, described
from .examples import Examples
from .experiment import Experiment
from .predictors import statistics
from .run_folder import RunFolder
from .section import Row, Section, frame
from .train import Keys, predict

# What the key of the noise is folded with, so that the draw for the validation examples is one of its own.
_VALIDATION = 3
_FACTORS = ("noises", "widths", "learning_rates", "sizes")


@dataclasses.dataclass(frozen=True)
class PredictorConfig(Config):
    """Coherence early in training, and its rivals, against the generalisation gap in the end.

    `predictor`: mnist5k, MLP 784-w-w-10, 54 cells of noise, width, learning rate and number of training examples; about
    11 minutes on one CPU core for 5 seeds. The theory expects a negative rank correlation between early α and the gap.
    """

    name: Hidden = "predictor"

    seeds: int = 5
    """Runs with different initialisation, order and noise; figures show their mean and its 95% interval."""
    noises: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Shares of the labels, of training, validation and test, that are redrawn uniformly from all classes."""
    widths: tuple[int, ...] = (32, 256)
    """Units of a hidden layer."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Step sizes of SGD."""
    sizes: tuple[int, ...] = (900, 1800, 3600)
    """Numbers of training examples, the first of the training set."""
    validation: int = 400
    """Examples of the training set that no cell trains on, those after the largest of sizes; 0 for none."""
    early_loss: float = 1.8
    """Training loss, in nats, that α is also compared at."""
    late_loss: float = 1.0
    """Training loss, in nats, that the gap is also compared at."""
    every: int = 30
    """Measure every so many epochs, and at the start and the end."""
    early: int = 3
    """Measure so many times in the first epoch, on a logarithmic grid of steps whose last is its end."""

    def smaller(self) -> "PredictorConfig":
        """Four cells of digits."""
        cells = {"noises": (0.0, 0.4), "widths": (8,), "learning_rates": (0.1, 0.3), "sizes": (300,)}
        return dataclasses.replace(self, **cells, validation=60)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        for name in _FACTORS:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"Expected {name} to be different ones, at least one, got {name}={values}.")
        if any(not 0 <= noise <= 1 for noise in self.noises):
            raise ValueError(f"Expected noises in [0, 1], got noises={self.noises}.")
        if any(not 0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"Expected learning_rates > 0 and finite, got learning_rates={self.learning_rates}.")
        for name, least in (("widths", 1), ("sizes", 1)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"Expected {name} >= {least}, got {name}={getattr(self, name)}.")
        for name, least in (("validation", 0), ("epochs", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"Expected {name} >= {least}, got {name}={getattr(self, name)}.")
        if self.early < 2 and self.every > 1:
            what = f"early={self.early} and every={self.every}"
            raise ValueError(f"Expected early >= 2 or every=1, to measure after the first epoch, got {what}.")
        if self.model != "mlp" or self.estimator != "exact" or self.data.startswith(TFDS):
            what = f"model={self.model}, estimator={self.estimator} and data={self.data}"
            raise ValueError(f"Expected model=mlp, estimator=exact and data in memory, got {what}.")

    def check_size(self, num_train: int) -> None:
        """ValueError where the training set is too small for the largest cell and the validation examples."""
        least = max(self.sizes) + self.validation
        if num_train < least:
            raise ValueError(f"Expected at least {least} examples for sizes and validation, got {num_train}.")


def measure(config: PredictorConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train every cell, all its seeds together, and measure on the way."""
    loaded = data.load(config.data, folder=config.data_dir, num_train=config.num_train)
    held_out = slice(max(config.sizes), max(config.sizes) + config.validation)
    images, true = jnp.asarray(loaded.train_images[held_out]), loaded.train_labels[held_out]
    trainings = []
    for noise, width, rate, size in itertools.product(*(getattr(config, name) for name in _FACTORS)):
        for seed in range(config.seed, config.seed + config.seeds):
            key = jax.random.fold_in(Keys.of(seed).noise, _VALIDATION)
            labels = data.corrupt(key, true, noise, loaded.num_classes)
            cell = {"noise": noise, "width": width, "rate": rate, "m": size}
            trainings.append(
                loop.Training(
                    " · ".join(("predictor", *(f"{name} {value:g}" for name, value in cell.items()), f"seed {seed}")),
                    {**cell, "seed": seed},
                    "sgd",
                    (noise, noise),
                    functools.partial(_measurement, (images, labels)),
                    lambda row: {"loss": f"{row['loss']:.3f}", "α": f"{row['alpha']:.2g}"},
                    {"width": width, "learning_rate": rate, "num_train": size, "sizes": (size,), "validation": 0},
                )
            )
    loop.train_all(config, problem, folder, trainings)


def _measurement(held_out: tuple[jax.Array, np.ndarray], examples: Examples, model: nn.Module, params: Any) -> Row:
    """Predictors, accuracies as labelled and losses; of the test examples the accuracy by true labels too."""
    coherence, train = examples.measure("train", model, params)
    on_test, test = examples.measure("test", model, params)
    of_grads = statistics(params, *cast(OnDevices, examples).arrays("train"))
    row = {
        "alpha": coherence.alpha,
        "gsnr": of_grads.gsnr,
        "gwa": of_grads.gwa,
        "loss": coherence.loss,
        "train": (train.guess == train.labels).mean(),
        "test": (test.guess == test.labels).mean(),
        "test_true": (test.guess == test.true).mean(),
        "test_loss": on_test.loss,
    }
    if held_out[1].size:
        guess = predict(model, params, held_out[0], held_out[1].size)
        row["valid"] = (guess == held_out[1]).mean()
    return {name: float(f"{float(value):.4g}") for name, value in row.items()}


def section(config: PredictorConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figures that follow from what was measured."""
    runs = predictor_report.runs_of(frame(rows), config.epochs, config.early_loss, config.late_loss)
    cells = math.prod(len(getattr(config, name)) for name in _FACTORS)
    complete = bool(len(runs)) and bool((runs.groupby("seed").size() == cells).all())
    results, tables, pictures = (), (), ()
    if complete:
        results = tuple(predictor_report.claims(runs))
        tables = predictor_report.tables(runs, config.early_loss, config.late_loss)
        pictures = predictor_report.draw(runs, folder)
    values = {"data": config.data, "epochs": config.epochs, "batch": config.batch_size, "cells": cells}
    values |= {"validation": config.validation, "sizes": _listed(config.sizes)}
    values |= {"noises": _listed(100 * noise for noise in config.noises), "widths": _listed(config.widths)}
    text = [part.format(**values, rates=_listed(config.learning_rates)) for part in _TEXT]
    return Section(
        config.name, "What predicts the generalisation gap", (*text, described(config)), results, tables, pictures
    )


def _listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


_TEXT = (
    "A network of two hidden layers is trained by plain SGD ({data}, mini-batches of {batch}, {epochs} epochs) in "
    "{cells} cells: all combinations of noise ({noises}% of the labels redrawn uniformly), width ({widths}), "
    "learning rate ({rates}) and number of training examples m ({sizes}). The theory of coherent gradients says "
    "that a network generalises where the gradients of its examples agree; so a higher coherence α early in "
    "training should go with a smaller generalisation gap in the end.",
    "The predictors are measured after the first epoch, when every training example was seen once; this moment "
    "was chosen before the run. The gap is the training accuracy less the test accuracy after the last epoch, "
    "both as labelled: the test labels are as noisy as those of training, so that a network that memorises "
    "nothing has a gap of about 0 at any noise.",
    "Beside α stand α unbiased, r = m·α, GSNR (the mean over parameters of E[g]² / Var[g], without its bias 1/m; "
    "Liu et al. 2020), GWA (the mean cosine between −g and the weights of the last layer, over the cosines' "
    "excess kurtosis + 1.2; Hölzl et al. 2025), the training loss, and the accuracy on {validation} validation "
    "examples, as noisy, that no cell trains on. All others are of the whole training sample; parameters without "
    "a variance are left out of GSNR. The gradient noise scale tr Σ / ‖G‖² = (1 − α) / α has the rank "
    "correlations of α with the opposite sign.",
    "Kendall's τ-b is computed for each seed: over all cells, and within each line of cells that differ in one "
    "factor alone, averaged over the lines. Intervals are Student's t over seeds.",
)

EXPERIMENT = Experiment(PredictorConfig(), measure, section)
