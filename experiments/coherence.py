"""Coherence while a network trains on real and on random labels."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import pandas as pd
from matplotlib.ticker import PercentFormatter

import cg_jax as cg

from . import figures, loop
from .configs import Config, Hidden, described
from .examples import Examples, Guesses
from .experiment import Experiment
from .label_order import LINES, LOSSES, SAMPLES, SHARES, Labels, claims, equal_loss_table
from .run_folder import RunFolder
from .section import Figure, Row, Section, curve, frame


@dataclasses.dataclass(frozen=True)
class CoherenceConfig(Config):
    """Coherence while a network trains on real and on random labels.

    `coherence`: mnist5k, MLP 784-512-512-10; about 2 minutes on 2 CPU cores for one seed. Expect r of real labels some
    ten times that of random ones in the first epochs, and random labels to rise late, while they are memorised.
    """

    name: Hidden = "coherence"

    early: int = 9
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""
    labels: tuple[Labels, ...] = ("real", "random")
    """Train with each of these. real: the labels as they are. half: half of them drawn at random. random: all of them
    drawn at random. Test labels are drawn in the same way."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Training losses, in nats, at which the kinds of labels are compared."""
        return LOSSES

    def check(self) -> None:
        """ValueError where the labels are none, or one of them comes twice."""
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"Expected labels to be different ones, at least one, got labels={self.labels}.")


def measure(config: CoherenceConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on each kind of labels, seed by seed, and measure on the way."""
    loop.train_all(config, problem, folder, trainings(config, lambda _: _measurement))


def trainings(config: CoherenceConfig, measurement: Callable[[int], Any]) -> list[loop.Training]:
    """One for each seed and each kind of labels; `measurement` says, of a seed, what is measured."""
    return [
        loop.Training(
            f"{config.name} · {labels} · seed {seed}",
            {"labels": labels, "seed": seed},
            "sgd",
            (SHARES[labels], SHARES[labels]),
            measurement(seed),
            lambda row: {"loss": f"{row['train']['loss']:.3f}", "r": f"{row['train']['r']:.1f}"},
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for labels in config.labels
    ]


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    return row_of(*(examples.measure(name, model, params) for name in SAMPLES))


def row_of(train: tuple[cg.Coherence, Guesses], test: tuple[cg.Coherence, Guesses]) -> Row:
    """Coherence and accuracy on both samples; the parts of each tensor on the training sample."""
    row: Row = {}
    for name, (coherence, seen) in zip(SAMPLES, (train, test), strict=True):
        row[name] = {
            "alpha": float(coherence.alpha),
            "r": float(coherence.m_coherence),
            "alpha_unbiased": float(coherence.alpha_unbiased),
            "noise_scale": float(coherence.noise_scale),
            "loss": float(coherence.loss),
            "accuracy": float((seen.guess == seen.labels).mean()),
            "count": int(coherence.count),
        }
        if name == "train":
            row["per_tensor"] = {
                tensor.removeprefix("params/"): {
                    "alpha": float(part.alpha),
                    "r": float(part.m_coherence),
                    "share": float(part.share),
                }
                for tensor, part in coherence.per_tensor.items()
            }
    return row


def _draw(table: pd.DataFrame, counts: dict[str, int], path: Path) -> None:
    """r against epoch and against training loss, and accuracy, for the training and the test sample."""
    figure, axes = figures.grid(2, 3)
    for (sample, name), line in zip((("train", "training"), ("test", "test")), axes, strict=True):
        means = list[float]()
        for labels, style in LINES.items():
            rows = table[table["labels"] == labels]
            if rows.empty:
                continue
            r, loss = curve(rows, f"{sample}/r", log=True), curve(rows, "train/loss")
            means += r.mean.tolist()
            figures.band(line[0], r, style)
            figures.against(line[1], loss, r, style)
            figures.band(line[2], curve(rows, f"{sample}/accuracy"), style)
            for ax in (line[0], line[2]):
                figures.epoch_axis(ax, r.epoch)
        for ax in line[:2]:
            figures.coherence_axis(ax, f"{name} sample\n(m = {counts[sample]})", means)
        line[1].set_xlabel("training loss [nats] (training goes to the right)")
        line[1].invert_xaxis()
        line[2].set_ylabel(f"accuracy, {name} sample\n(labels as given)")
        line[2].yaxis.set_major_formatter(PercentFormatter(1))
        line[2].set_ylim(0, 1.02)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: CoherenceConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figures that follow from what was measured."""
    table = frame(rows)
    counts = {sample: rows[0][sample]["count"] if rows else 0 for sample in SAMPLES}
    every = bool(rows) and len(config.labels) > 1 and set(table["labels"]) == set(config.labels)
    pictures: tuple[Figure, ...] = ()
    if rows:
        _draw(table, counts, folder / "coherence.png")
        figures.per_tensor(rows, "labels", LINES, folder / "per_tensor.png")
        pictures = (
            Figure("coherence.png", _CAPTION.format(**counts, seeds=config.seeds)),
            Figure("per_tensor.png", "r of each tensor, or module, on the training sample; geometric mean over seeds."),
        )
    values = {"data": config.data, "model": config.model, "lr": config.learning_rate, "batch": config.batch_size}
    values |= {"times": _TIMES[len(config.labels) - 1]}
    values |= {"kinds": ", ".join(_TRAINED[labels] for labels in LINES if labels in config.labels)}
    text = tuple(part.format(**values, **counts) for part in (*_TEXT, described(config)))
    both = {"real", "random"} <= set(config.labels)
    results = tuple(claims(table, config.losses)) if every else ()
    tables = (equal_loss_table(table, config.losses),) if every and both else ()
    return Section(config.name, "Real against random labels", text, results, tables, pictures)


_CAPTION = (
    "m-coherence r of the whole training sample (m = {train}) and of a held-out test sample (m = {test}), against"
    " epochs and against training loss, with the accuracy on the same sample beside it. Lines are means over "
    "{seeds} seed(s), of r geometric ones; bands and bars are their 95% intervals. The dotted line at r = 1 is the "
    "orthogonal limit: examples that do not help each other. Values of r for different m must not be compared."
)
_TIMES = ("once", "twice", "three times")
_TRAINED = {
    "real": "once with the real labels",
    "half": "once with labels of which half are drawn at random, those of the test sample too",
    "random": "once with labels drawn at random, which can only be memorised one by one",
}
_TEXT = (
    "The same network ({model}) is trained {times} on the same images ({data}) by plain SGD (learning rate {lr}, "
    "mini-batches of {batch}): {kinds}.",
    "Coherence asks how much the gradients of single examples agree. With g the gradient of one example's loss, r"
    " = ‖Σ g‖² / Σ ‖g‖² says how many examples of the sample one example's gradient helps: 1 where gradients are "
    "orthogonal, m (here {train} in training, {test} in testing) where all are equal. The theory of coherent "
    "gradients says that real labels, which generalise, have high r, and random ones low r. In the run with "
    "random labels those of the test sample are random too.",
)

EXPERIMENT = Experiment(CoherenceConfig(), measure, section)
