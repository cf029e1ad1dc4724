"""Coherence with BatchNorm: the paper's estimator from batches against exact measurement, on the same network."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pandas as pd

import cg_jax as cg

from . import figures, loop, models
from .claims import Claim, Result
from .configs import TFDS, Config, Hidden
from .experiment import Experiment
from .label_order import SHARES
from .line import Line
from .models import MODELS
from .run_folder import RunFolder
from .section import Figure, Row, Section, by_seed, curve, frame

LINES = {
    "exact": Line("exact, running averages", "tab:blue"),
    "control": Line("mean gradients of batches, running averages (control)", "tab:gray", "-."),
    "batch": Line("mean gradients of batches, each normalised by itself (paper)", "tab:red", "--"),
}
_LABELS = {"real": "real labels", "random": "random labels"}


@dataclasses.dataclass(frozen=True)
class BatchNormConfig(Config):
    """The paper's estimator of coherence against exact measurement, on one network with BatchNorm.

    `coherence-batchnorm`: one part of coherence-networks.
    """

    name: Hidden = "coherence-batchnorm"

    @property
    def samples(self) -> tuple[str, ...]:
        """The training sample."""
        return ("train",)

    def smaller(self) -> "BatchNormConfig":
        """The same for a smoke test."""
        return dataclasses.replace(self, log_grid=2)

    def check(self) -> None:
        """ValueError where the network has no BatchNorm, or the estimators cannot be compared."""
        if not MODELS[self.model].batch_norm or self.data.startswith(TFDS):
            what = f"model={self.model} and data={self.data}"
            raise ValueError(f"Expected a model with BatchNorm on data in memory, got {what}.")
        if self.estimator != "exact":
            raise ValueError(f"Expected estimator=exact, since both are measured, got estimator={self.estimator}.")

    def check_size(self, num_train: int) -> None:
        """ValueError where there are no two batches."""
        if num_train < 2 * self.measure_batch_size:
            what = f"2 batches of measure_batch_size={self.measure_batch_size}"
            raise ValueError(f"Expected at least {what}, got {num_train} training examples.")


def measure(config: BatchNormConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on real and on random labels, seed by seed, and measure by all estimators on the way."""
    trainings = [
        loop.Training(
            f"{config.name} · {labels} · seed {seed}",
            {"labels": labels, "seed": seed},
            "sgd",
            (SHARES[labels], SHARES[labels]),
            lambda examples, model, params: estimates(
                model, params, examples.arrays("train"), config.measure_batch_size
            ),
            lambda row: {"loss": f"{row['loss']:.3f}", "exact": f"{row['exact']:.1f}", "batch": f"{row['batch']:.1f}"},
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for labels in _LABELS
    ]
    loop.train_all(config, problem, folder, trainings)


@functools.cache
def _control(model: nn.Module) -> Callable[..., jax.Array]:
    """(params, batch, state) → mean loss of a batch, normalised by the running averages."""
    loss_fn = models.loss_of(model)
    return lambda params, batch, state: jax.vmap(loss_fn, in_axes=(None, 0, None))(params, batch, state).mean()


def estimates(model: nn.Module, params: Any, sample: Any, batch_size: int) -> Row:
    """m-coherence r of a sample by each estimator on the same parameters, and the exact mean loss; and m."""
    trained, state = models.with_state(params)
    losses = {"exact": models.loss_of(model), "control": _control(model), "batch": models.mean_loss_of(model)}
    found = {
        name: cg.measure_coherence(
            loss, trained, sample, state=state, batch_size=batch_size, estimator="exact" if name == "exact" else "batch"
        )
        for name, loss in losses.items()
    }
    numbers = {name: each.m_coherence for name, each in found.items()} | {"loss": found["exact"].loss}
    return {name: float(f"{float(value):.6g}") for name, value in numbers.items()} | {
        "count": int(found["exact"].count)
    }


def claims(table: pd.DataFrame) -> list[Result]:
    """Both estimators order real and random labels alike; what parts them is the normalisation."""
    trained = table[table["step"] > 0]
    out: list[Result] = []
    for name, by in (("exact", "exact measurement on running averages"), ("batch", "the estimator from batches")):
        real, random = (by_seed(trained[trained["labels"] == labels], name) for labels in _LABELS)
        claim = Claim(
            f"With BatchNorm, by {by}, r of real labels is above r of random ones after every measured step.",
            "least ratio of m-coherence r, real labels over random ones, over the measurements after the start",
            "×",
            1,
            "ratio",
        )
        out.append(claim.judged((real / random).min()))
    with np.errstate(all="ignore"):
        off = {name: (trained[name] / trained["exact"]).map(np.log).abs() for name in ("control", "batch")}
    by_name = {name: part.groupby(trained["seed"]).mean() for name, part in off.items()}
    claim = Claim(
        "With BatchNorm, the estimator from batches is nearer to exact measurement where both use running averages "
        "than where each batch is normalised by itself.",
        "mean |log of r from batches over exact r| after the start, by running averages less by the batch",
        "nats",
        -1,
    )
    return [*out, claim.compared(by_name["control"], by_name["batch"])]


def _draw(table: pd.DataFrame, path: Path) -> None:
    """r by each estimator against epochs; a panel for each kind of labels."""
    kinds = [labels for labels in _LABELS if labels in set(table["labels"])]
    figure, axes = figures.grid(1, len(kinds), (12, 4.4), share_y=True)
    means = list[float]()
    for ax, labels in zip(axes[0], kinds, strict=True):
        for name, line in LINES.items():
            along = curve(table[table["labels"] == labels], name, log=True)
            means += along.mean.tolist()
            figures.band(ax, along, line)
            figures.epoch_axis(ax, along.epoch)
        ax.set_title(_LABELS[labels], fontsize=10)
    for ax in axes[0]:
        figures.coherence_axis(ax, "training sample", means)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: BatchNormConfig, rows: list[Row], folder: Path) -> Section:
    """The claims and the figure that follow from what was measured."""
    table = frame(rows)
    pictures: tuple[Figure, ...] = ()
    if rows:
        _draw(table, folder / "estimators.png")
        pictures = (Figure("estimators.png", _CAPTION.format(m=rows[0]["count"], seeds=config.seeds)),)
    results = tuple(claims(table)) if rows and set(table["labels"]) == set(_LABELS) else ()
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size}
    values |= {"model": MODELS[config.model].line.label, "k": config.measure_batch_size}
    text = tuple(part.format(**values) for part in _TEXT)
    return Section(config.name, "BatchNorm: estimated from batches against exact", text, results, (), pictures)


_CAPTION = (
    "m-coherence r of the training sample (m = {m}) by three estimators on the same parameters of a network with "
    "BatchNorm, against epochs, for real and for random labels. Lines are geometric means over {seeds} seed(s), bands "
    "their 95% intervals. The dotted line at r = 1 is the orthogonal limit."
)
_TEXT = (
    "With BatchNorm in training, an example's loss depends on the rest of its batch, so that it has no gradient of its "
    "own. The paper estimates coherence from the mean gradients of batches, each normalised by itself as in training. "
    "Exact measurement holds the running averages fixed: then every example has its own gradient.",
    "One network ({model}) is trained on {data} (learning rate {lr}, mini-batches of {batch}), once with real and once "
    "with random labels, and both are measured on the same parameters; batches hold {k} examples. A control takes the "
    "mean gradients of the same batches, but by running averages: it shares the estimator with the one and the "
    "normalisation with the other. At the start the running averages are not yet those of the data (mean 0, variance "
    "1), so claims leave the start out.",
)

# Batches of 50, in training and in both estimators from batches.
EXPERIMENT = Experiment(
    BatchNormConfig(
        data="fashion_mnist",
        num_train=10_000,
        model="cnn_bn",
        width=8,
        batch_size=50,
        measure_batch_size=50,
        epochs=3,
        log_grid=4,
        seeds=3,
    ),
    measure,
    section,
)
