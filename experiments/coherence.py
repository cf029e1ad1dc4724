"""Coherence while a network trains on real and on random labels."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from . import figures, loop
from .claims import Claim, Result, with_spread
from .configs import Config, Hidden, described
from .examples import Examples
from .experiment import Experiment
from .line import Line
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, by_seed, curve, frame

LINES = {"real": Line("real labels", "tab:blue"), "random": Line("random labels", "tab:red", "--")}
SAMPLES = {"train": "training sample", "test": "test sample"}
# Training losses, in nats, at which real and random labels are compared.
_LOSSES = (
    *(6.75, 6.5, 6.0, 5.0, 4.0, 3.0, 2.5, 2.25, 2.2, 2.1, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75),
    *(0.5, 0.25, 0.1, 0.05, 0.02, 0.01),
)


@dataclasses.dataclass(frozen=True)
class CoherenceConfig(Config):
    """Coherence while a network trains on real and on random labels.

    `coherence`: mnist5k, MLP 784-512-512-10; about 2 minutes on 2 CPU cores for one seed. Expect r of real labels some
    ten times that of random ones in the first epochs, and random labels to rise late, while they are memorised.
    """

    name: Hidden = "coherence"

    early: int = 9
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""


def measure(config: CoherenceConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on real and on random labels, seed by seed, and measure on the way."""
    seeds = range(config.seed, config.seed + config.seeds)
    trainings = [_training(labels, seed) for seed in seeds for labels in LINES]
    loop.train_all(config, problem, folder, trainings)


def _training(labels: str, seed: int) -> loop.Training:
    share = 1.0 if labels == "random" else 0.0
    return loop.Training(
        f"coherence · {labels} · seed {seed}",
        {"labels": labels, "seed": seed},
        "sgd",
        (share, share),
        _measurement,
        lambda row: {"loss": f"{row['train']['loss']:.3f}", "r": f"{row['train']['r']:.1f}"},
    )


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Coherence and accuracy on both samples; the parts of each tensor on the training sample."""
    row: Row = {}
    for name in SAMPLES:
        coherence, seen = examples.measure(name, model, params)
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
            tensors = coherence.per_tensor.items()
            row["per_tensor"] = {
                tensor.removeprefix("params/"): {
                    "alpha": float(part.alpha),
                    "r": float(part.m_coherence),
                    "share": float(part.share),
                }
                for tensor, part in tensors
            }
    return row


def r_at_loss(run: pd.DataFrame, sample: str, loss: float) -> float:
    """r when the training loss first falls through `loss`, log r interpolated; NaN if it does not get there."""
    r = run[f"{sample}/r"].to_numpy(float)
    for i, (before, after) in enumerate(itertools.pairwise(run["train/loss"].to_numpy(float))):
        if after <= loss <= before and after < before:
            part = (before - loss) / (before - after)
            return float(np.exp(np.log(r[i]) + part * (np.log(r[i + 1]) - np.log(r[i]))))
    return float("nan")


# r by labels, each [losses or epochs, seed], where every run was measured.
ByLabels = dict[str, pd.DataFrame]


def at_equal_loss(table: pd.DataFrame, sample: str) -> ByLabels:
    """r at the training losses that every run reached."""
    r = {
        labels: pd.DataFrame(
            {
                seed: [r_at_loss(run, sample, loss) for loss in _LOSSES]
                for seed, run in table[table["labels"] == labels].groupby("seed")
            },
            index=pd.Index(_LOSSES, name="loss"),
        )
        for labels in LINES
    }
    return _common(r)


def at_equal_epoch(table: pd.DataFrame, sample: str) -> ByLabels:
    """r at the epochs where every run was measured."""
    return _common({labels: by_seed(table[table["labels"] == labels], f"{sample}/r") for labels in LINES})


def _common(r: ByLabels) -> ByLabels:
    """The seeds that both kinds of labels have, at the points where none of them lacks a number."""
    seeds = r["real"].columns.intersection(r["random"].columns)
    both = pd.concat({labels: part[seeds] for labels, part in r.items()}, axis=1, join="inner").dropna()
    return {labels: pd.DataFrame(both[labels]) for labels in r}


def _start(sample: str, r: ByLabels) -> Result:
    claim = Claim(
        f"At the start, before any training, r of real labels is above r of random ones on the {SAMPLES[sample]}.",
        f"m-coherence r of the {SAMPLES[sample]} at epoch 0, real labels over random ones",
        "×",
        1,
        "ratio",
    )
    if 0.0 not in r["real"].index:
        return claim.judged(pd.Series(dtype=float), detail="No run was measured at its start.")
    return claim.compared(r["real"].T[0.0], r["random"].T[0.0])


def _throughout(sample: str, against: str, r: ByLabels) -> Result:
    """Whether r of real labels is above that of random ones at every point: by the least ratio of each seed."""
    claim = Claim(
        f"On the {SAMPLES[sample]}, r of real labels is above r of random ones at every common {against}.",
        f"least ratio of m-coherence r, real labels over random ones, over the common values of the {against}",
        "×",
        1,
        "ratio",
    )
    ratios = r["real"] / r["random"]
    if ratios.empty:
        return claim.judged(pd.Series(dtype=float), detail=f"The runs have no {against} in common.")
    return claim.judged(ratios.min(), detail=_where(ratios))


def _where(ratios: pd.DataFrame) -> str:
    """Up to which point the ratios of all seeds are above 1, and how the first that is not fails."""
    points, least = ratios.index, ratios.min(axis=1)
    side = "down to" if points[0] > points[-1] else "up to"
    below = np.flatnonzero(least.to_numpy() <= 1)
    if not below.size:
        return f"Above 1 in every seed from {points[0]:.3g} {side} {points[-1]:.3g}; {_range(ratios)}."
    first = below[0]
    failing = ratios.iloc[first]
    low, high = f"{failing.min():.2f}", f"{failing.max():.2f}"
    fails = (
        f"at {points[first]:.3g} it is not in {(failing <= 1).sum()} of {len(failing)} seed(s) "
        f"(ratio {low if low == high else f'{low} to {high}'})"
    )
    rest = f"From there on the mean ratio is {ratios.iloc[first:].mean(axis=1).min():.2f} at the least"
    if not first:
        return f"Above 1 in every seed at no {points.name}: {fails}. {rest}."
    until = f"from {points[0]:.3g} {side} {points[first - 1]:.3g}"
    return f"Above 1 in every seed {until}, where {_range(ratios.iloc[:first])}; {fails}. {rest}."


def _range(ratios: pd.DataFrame) -> str:
    means = ratios.mean(axis=1)
    return f"the mean ratio is {means.min():.2f} to {means.max():.2f}"


def claims(table: pd.DataFrame) -> list[Result]:
    """Three for each sample."""
    out: list[Result] = []
    for sample in SAMPLES:
        by_epoch = at_equal_epoch(table, sample)
        out += [
            _start(sample, by_epoch),
            _throughout(sample, "training loss", at_equal_loss(table, sample)),
            _throughout(sample, "epoch", by_epoch),
        ]
    return out


def _table(table: pd.DataFrame) -> Table:
    parts = {sample: at_equal_loss(table, sample) for sample in SAMPLES}
    lines: list[tuple[str, ...]] = []
    for loss in parts["train"]["real"].index:
        line = [f"{loss:.2f}"]
        for sample in SAMPLES:
            real, random = (parts[sample][labels].T[loss] for labels in LINES)
            line += [with_spread(real), with_spread(random), with_spread(real / random, "{:.2f}")]
        lines.append(tuple(line))
    heads = [f"{sample}: {column}" for sample in SAMPLES for column in ("r real", "r random", "ratio")]
    note = "r when the training loss first falls through the value, interpolated between checkpoints; ± one deviation."
    return Table("r at equal training loss", ("training loss [nats]", *heads), tuple(lines), note)


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
    both = bool(rows) and set(table["labels"]) == set(LINES)
    pictures: tuple[Figure, ...] = ()
    if rows:
        _draw(table, counts, folder / "coherence.png")
        figures.per_tensor(rows, "labels", LINES, folder / "per_tensor.png")
        pictures = (
            Figure("coherence.png", _CAPTION.format(**counts, seeds=config.seeds)),
            Figure("per_tensor.png", "r of each tensor, or module, on the training sample; geometric mean over seeds."),
        )
    values = {"data": config.data, "model": config.model, "lr": config.learning_rate, "batch": config.batch_size}
    text = tuple(part.format(**values, **counts) for part in (*_TEXT, described(config)))
    results, tables = (tuple(claims(table)), (_table(table),)) if both else ((), ())
    return Section(config.name, "Real against random labels", text, results, tables, pictures)


_CAPTION = (
    "m-coherence r of the whole training sample (m = {train}) and of a held-out test sample (m = {test}), against"
    " epochs and against training loss, with the accuracy on the same sample beside it. Lines are means over "
    "{seeds} seed(s), of r geometric ones; bands and bars are their 95% intervals. The dotted line at r = 1 is the "
    "orthogonal limit: examples that do not help each other. Values of r for different m must not be compared."
)
_TEXT = (
    "The same network ({model}) is trained twice on the same images ({data}) by plain SGD (learning rate {lr}, "
    "mini-batches of {batch}): once with the real labels, once with labels drawn at random, which can only be "
    "memorised one by one.",
    "Coherence asks how much the gradients of single examples agree. With g the gradient of one example's loss, r"
    " = ‖Σ g‖² / Σ ‖g‖² says how many examples of the sample one example's gradient helps: 1 where gradients are "
    "orthogonal, m (here {train} in training, {test} in testing) where all are equal. The theory of coherent "
    "gradients says that real labels, which generalise, have high r, and random ones low r. In the run with "
    "random labels those of the test sample are random too.",
)

EXPERIMENT = Experiment(CoherenceConfig(), measure, section)
