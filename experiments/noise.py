"""SGD against medians of mini-batches when a part of the labels is wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pandas as pd

from . import figures, loop
from .claims import Claim, Result, with_spread
from .configs import Config, Hidden, MethodNames, described
from .examples import Examples
from .experiment import Experiment
from .methods import METHODS, check_method
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

# What is measured, and what tables call it. Each is a share of examples.
QUANTITIES = {
    "pristine": "pristine examples",
    "corrupt": "corrupt examples, as labelled",
    "corrupt_true": "corrupt examples, true label",
    "test": "test examples",
    "gap": "generalisation gap",
}
_LEARNT = 0.9


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Config):
    """SGD against medians of mini-batches when a part of the labels is wrong.

    `noise`: mnist5k, half of the labels redrawn, MLP 784-512-512-10; about 3 minutes on 2 CPU cores for one seed.
    Expect SGD to memorise nearly all wrong labels, and M3 to learn the right ones first.
    """

    name: Hidden = "noise"
    samples = ("train",)

    noise: float = 0.5
    """Share of the labels that are redrawn uniformly from all classes; some draws hit the true class."""
    methods: MethodNames = ("sgd", "mean3", "m3", "rm3", "ra3")
    """What is compared: sgd; m3, the median of 3 mini-batches, and mean3, its control; rm3, the median of the last 3
    gradients, and ra3, its control."""

    def check(self) -> None:
        """ValueError where noise or methods are wrong."""
        if not 0 < self.noise < 1:
            raise ValueError(f"Expected 0 < noise < 1, got noise={self.noise}.")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"Expected methods to be different ones, at least one, got methods={self.methods}.")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"Expected methods in {(*METHODS,)}, got {method}.")
            check_method(method)

    def check_size(self, num_train: int) -> None:
        """ValueError where not one label would be redrawn."""
        if not round(self.noise * num_train):
            raise ValueError(f"Expected noise to be a label or more of {num_train}, got noise={self.noise}.")


def measure(config: NoiseConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train by every method, seed by seed, and measure on the way."""
    seeds = range(config.seed, config.seed + config.seeds)
    trainings = [_training(method, seed, config.noise) for seed in seeds for method in config.methods]
    loop.train_all(config, problem, folder, trainings)


def _training(method: str, seed: int, noise: float) -> loop.Training:
    return loop.Training(
        f"noise · {method} · seed {seed}",
        {"method": method, "seed": seed},
        method,
        (noise, 0.0),
        _measurement,
        lambda row: {"loss": f"{row['loss']:.3f}", "r": f"{row['r']:.1f}"},
    )


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    (coherence, train), test = examples.measure("train", model, params), examples.guess("test", model, params)
    row: Row = {"test": float((test.guess == test.labels).mean())}
    row |= _shares(train.guess, train.labels, train.true)
    row |= {"loss": float(coherence.loss), "r": float(coherence.m_coherence)}
    return row | {"gap": row["train"] - row["test"], "chance": 1 / model.num_classes}


def _shares(guess: np.ndarray, labels: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy on all training examples as labelled, on pristine ones, and on corrupt ones by either label."""
    corrupt = labels != true
    return {
        "train": float((guess == labels).mean()),
        "pristine": float((guess == true)[~corrupt].mean()),
        "corrupt": float((guess == labels)[corrupt].mean()),
        "corrupt_true": float((guess == true)[corrupt].mean()),
        "corrupt_share": float(corrupt.mean()),
    }


_WHEN = {
    "best": "At the epoch of the best test accuracy",
    "last": "At the last epoch",
    "learnt": "At the first epoch with 90% of the pristine examples learnt",
}


def moments(table: pd.DataFrame, when: str) -> pd.DataFrame:
    """The line of every run at its best test epoch, its last, or the first with 90% of the pristine learnt, if any.

    Indexed by method and seed.
    """
    runs = ["method", "seed"]
    if when == "best":
        rows = table.loc[table.groupby(runs)["test"].idxmax()]
    elif when == "last":
        rows = table.groupby(runs).tail(1)
    else:
        rows = table[table["pristine"] >= _LEARNT].groupby(runs).head(1)
    return rows.set_index(runs)


def _of(method: str, at_moment: pd.DataFrame, seeds: int) -> pd.DataFrame | None:
    """The lines of a method by seed, or None unless every seed has one."""
    if method not in at_moment.index.get_level_values("method"):
        return None
    lines = pd.DataFrame(at_moment.loc[method])
    return lines if len(lines) == seeds else None


def _table(table: pd.DataFrame, when: str) -> Table:
    at_moment, seeds, out = moments(table, when), table["seed"].nunique(), []
    for name in table["method"].unique():
        label, lines = METHODS[name].label, _of(name, at_moment, seeds)
        if lines is None:
            out.append((label, "not reached", *("" for _ in range(len(QUANTITIES) + 1))))
            continue
        cells = [with_spread(100 * lines[key], "{:.1f}") for key in QUANTITIES]
        out.append((label, with_spread(lines["epoch"], "{:.1f}"), with_spread(lines["loss"], "{:.2f}"), *cells))
    note = "The epoch is chosen by test accuracy: an upper bound that no practitioner has." if when == "best" else ""
    heads = ("method", "epoch", "training loss [nats]", *(f"{text} [%]" for text in QUANTITIES.values()))
    return Table(_WHEN[when], heads, tuple(out), note)


# When, which quantity, its predicted sign, and the statement.
_COMPARISONS = (
    ("learnt", "corrupt", -1, "With 90% of the pristine learnt, {a} has memorised fewer corrupt examples than {b}."),
    ("last", "test", 1, "At the last epoch {a} has a higher test accuracy than {b}."),
    ("best", "test", 1, "At its best epoch {a} has a higher test accuracy than {b}."),
)


def claims(table: pd.DataFrame) -> list[Result]:
    """Whether each robust method is better than its rivals."""
    out: list[Result] = []
    seeds, at_moments = table["seed"].nunique(), {when: moments(table, when) for when in _WHEN}
    methods = set(table["method"])
    pairs = [(name, rival) for name, method in METHODS.items() for rival in method.rivals if methods >= {name, rival}]
    for robust, other in pairs:
        for when, key, sign, template in _COMPARISONS:
            statement = template.format(a=METHODS[robust].short, b=METHODS[other].label)
            quantity = f"accuracy on {QUANTITIES[key]}, {robust} less {other}"
            claim = Claim(statement, quantity, "points", 1 if sign > 0 else -1)
            mine, theirs = _of(robust, at_moments[when], seeds), _of(other, at_moments[when], seeds)
            if mine is None or theirs is None:
                out.append(claim.judged(pd.Series(dtype=float), detail="Not every run reached that point."))
                continue
            wins = (sign * (mine[key] - theirs[key]) > 0).sum()
            detail = f"So in {wins} of {seeds} seed(s)."
            out.append(claim.compared(100 * mine[key], 100 * theirs[key], "{:.1f}%", detail))
    return out


_PANELS = (
    ("pristine", "accuracy on pristine examples"),
    ("corrupt", "accuracy on corrupt examples,\nas labelled (memorised)"),
    ("corrupt_true", "accuracy on corrupt examples,\ntrue label"),
    ("test", "test accuracy"),
    ("gap", "generalisation gap\n(training as labelled − test)"),
    ("loss", "training loss [nats]"),
)


def _draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracies and the gap against epochs, one line for each method."""
    figure, axes = figures.grid(2, 3)
    for ax, (key, label) in zip(axes.flat, _PANELS, strict=True):
        for method in table["method"].unique():
            figures.band(ax, curve(table[table["method"] == method], key), METHODS[method].line)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        if key == "loss":
            ax.set_ylim(bottom=0)
        else:
            figures.percent_axis(ax)
        if key not in ("loss", "gap"):
            figures.chance(ax, table["chance"].iloc[0])
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: NoiseConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figures that follow from what was measured."""
    table = frame(rows)
    runs = {(row["method"], row["seed"]) for row in rows}
    complete = runs >= {(method, seed) for method in config.methods for _, seed in runs}
    pictures: tuple[Figure, ...] = ()
    if rows:
        _draw(table, folder / "noise.png")
        pictures = (Figure("noise.png", _CAPTION.format(seeds=config.seeds)),)
    values = {"data": config.data, "model": config.model, "lr": config.learning_rate, "batch": config.batch_size}
    share = rows[0]["corrupt_share"] if rows else float("nan")
    text = tuple(part.format(**values, noise=config.noise, share=share) for part in (*_TEXT, described(config)))
    results, tables = (), ()
    if rows and complete:
        results, tables = tuple(claims(table)), tuple(_table(table, when) for when in _WHEN)
    return Section(config.name, "SGD against medians under label noise", text, results, tables, pictures)


_CAPTION = (
    "Accuracy against epochs: on training examples whose label is right (pristine), on those whose label was "
    "changed (corrupt), counted by the wrong label they carry and by the true one, and on the test set; and the "
    "generalisation gap, training accuracy as labelled less test accuracy. A good method is high on pristine, "
    "true and test, and low on corrupt as labelled. Lines are means over {seeds} seed(s), bands their 95% "
    "intervals; the dotted line is chance."
)
_TEXT = (
    "A share of {noise:.0%} of the training labels ({data}) is replaced by classes drawn uniformly, which leaves "
    "{share:.0%} wrong. A network that fits all of them has memorised those. The same network ({model}) is "
    "trained from the same start and in the same order of examples by every method.",
    "SGD steps along the gradient of one mini-batch of {batch} (learning rate {lr}). M3 takes the gradients of "
    "three mini-batches and, for every coordinate, their median: what only one mini-batch asks for is ignored. "
    "Its control steps along the mean of the same three, so that a difference between the two is the median's and"
    " not the batch size's. RM3 and RA3 take the median and the mean of the last three gradients, at every mini-"
    "batch.",
)

EXPERIMENT = Experiment(NoiseConfig(), measure, section)
