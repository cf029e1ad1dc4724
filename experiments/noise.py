"""SGD against medians of mini-batches when a part of the labels is wrong."""

from typing import Any

import flax.linen as nn
import numpy as np

from experiments import figures, loop
from experiments.configs import NoiseConfig, how_measured
from experiments.run import RunFolder
from experiments.section import Claim, Figure, Row, Section, Table, number, seeds_of, select, with_spread
from experiments.source import Examples
from experiments.train import METHODS

# What is measured, and how it is called. Each is a share of examples.
QUANTITIES = {
    "pristine": "pristine examples",
    "corrupt": "corrupt examples, as labelled",
    "corrupt_true": "corrupt examples, true label",
    "test": "test examples",
    "gap": "generalisation gap",
}
_LEARNT = 0.9


def measure(config: NoiseConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train by every method, seed by seed, and measure on the way."""
    seeds = range(config.seed, config.seed + config.seeds)
    trainings = [_training(method, seed, config.noise) for seed in seeds for method in config.methods]
    loop.run(config, problem, folder, trainings)


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
    (found, train), test = examples.measure("train", model, params), examples.guess("test", model, params)
    row: Row = {"test": float((test.guess == test.labels).mean())}
    row |= _shares(train.guess, train.labels, train.true)
    row |= {"loss": float(found.loss), "r": float(found.m_coherence)}
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


def moment(run: list[Row], when: str) -> Row | None:
    """The row of one run at its best test epoch, its last, or the first with 90% of the pristine learnt, if any."""
    if when == "best":
        return max(run, key=lambda row: row["test"])
    if when == "last":
        return run[-1]
    return next((row for row in run if row["pristine"] >= _LEARNT), None)


def _moments(rows: list[Row], method: str, when: str) -> list[Row] | None:
    """One row for each seed, or None unless every seed has one."""
    runs = [select(rows, method=method, seed=seed) for seed in seeds_of(rows)]
    found = [moment(run, when) for run in runs if run]
    complete = [row for row in found if row is not None]
    return complete if len(complete) == len(runs) else None


_WHEN = {
    "best": "At the epoch of the best test accuracy",
    "last": "At the last epoch",
    "learnt": "At the first epoch with 90% of the pristine examples learnt",
}


def _table(rows: list[Row], when: str) -> Table:
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        method = METHODS[name]
        found = _moments(rows, name, when)
        if found is None:
            lines.append((method.label, "not reached", *("" for _ in range(len(QUANTITIES) + 1))))
            continue
        epochs = with_spread([row["epoch"] for row in found], "{:.1f}")
        cells = [with_spread([100 * number(row, key) for row in found], "{:.1f}") for key in QUANTITIES]
        lines.append((method.label, epochs, with_spread([row["loss"] for row in found], "{:.2f}"), *cells))
    note = "The epoch is chosen by test accuracy: an upper bound that no practitioner has." if when == "best" else ""
    heads = ("method", "epoch", "training loss [nats]", *(f"{text} [%]" for text in QUANTITIES.values()))
    return Table(_WHEN[when], heads, tuple(lines), note)


_PAIRS = (("m3", "sgd"), ("m3", "mean3"), ("rm3", "sgd"), ("rm3", "ra3"))
# When, which quantity, whether less of it is better, and how it is said.
_COMPARISONS = (
    ("learnt", "corrupt", True, "With 90% of the pristine learnt, {a} has memorised fewer corrupt examples than {b}."),
    ("last", "test", False, "At the last epoch {a} has a higher test accuracy than {b}."),
    ("best", "test", False, "At its best epoch {a} has a higher test accuracy than {b}."),
)


def _claims(rows: list[Row]) -> list[Claim]:
    """Whether each robust method is better than its rivals, in every seed."""
    claims = []
    methods = {row["method"] for row in rows}
    for robust, other in (pair for pair in _PAIRS if methods.issuperset(pair)):
        for when, key, lower, template in _COMPARISONS:
            text = template.format(a=robust.upper(), b=METHODS[other].label)
            mine, theirs = _moments(rows, robust, when), _moments(rows, other, when)
            if mine is None or theirs is None:
                claims.append(Claim(text, None, "Not every run reached that point."))
                continue
            pairs = [(100 * number(a, key), 100 * number(b, key)) for a, b in zip(mine, theirs, strict=True)]
            wins = sum(a < b if lower else a > b for a, b in pairs)
            a, b = (with_spread(values, "{:.1f}") for values in zip(*pairs, strict=True))
            claims.append(Claim(text, wins == len(pairs), f"{a}% against {b}%; so in {wins} of {len(pairs)} seed(s)."))
    return claims


def section(config: NoiseConfig, folder: RunFolder) -> Section:
    """The claims, the tables and the figures that follow from what was measured."""
    rows = folder.rows
    complete = {(row["method"], row["seed"]) for row in rows} >= {
        (m, s) for m in config.methods for s in seeds_of(rows)
    }
    share = rows[0]["corrupt_share"] if rows else float("nan")
    pictures = ()
    if rows:
        figures.noise(rows, folder.figures / "noise.png")
        pictures = (Figure("noise.png", _CAPTION.format(seeds=config.seeds)),)
    text = tuple(
        part.format(
            data=config.data,
            model=config.model,
            noise=config.noise,
            share=share,
            lr=config.learning_rate,
            batch=config.batch_size,
        )
        for part in (*_TEXT, how_measured(config))
    )
    claims = tuple(_claims(rows)) if rows and complete else ()
    tables = tuple(_table(rows, when) for when in _WHEN) if claims else ()
    return Section("noise", "SGD against medians under label noise", text, claims, tables, pictures)


_CAPTION = (
    "Accuracy against epochs: on training examples whose label is right (pristine), on those whose label was "
    "changed (corrupt), counted by the wrong label they carry and by the true one, and on the test set; and the "
    "generalisation gap, training accuracy as labelled less test accuracy. A good method is high on pristine, "
    "true and test, and low on corrupt as labelled. Lines are means over {seeds} seed(s), bands one standard "
    "deviation; the dashed line is chance."
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
