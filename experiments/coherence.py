"""Coherence while a network trains on real and on random labels."""

import itertools
from typing import Any

import flax.linen as nn
import numpy as np

from experiments import figures, loop
from experiments.configs import CoherenceConfig, how_measured
from experiments.run import RunFolder
from experiments.section import Claim, Figure, Row, Section, Table, number, seeds_of, select, with_spread
from experiments.source import Examples

LABELS = {"real": "real labels", "random": "random labels"}
SAMPLES = {"train": "training sample", "test": "test sample"}
# Training losses, in nats, at which real and random labels are compared.
_LOSSES = (
    6.75,
    6.5,
    6.0,
    5.0,
    4.0,
    3.0,
    2.5,
    2.25,
    2.2,
    2.1,
    2.0,
    1.75,
    1.5,
    1.25,
    1.0,
    0.75,
    0.5,
    0.25,
    0.1,
    0.05,
    0.02,
    0.01,
)


def measure(config: CoherenceConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on real and on random labels, seed by seed, and measure on the way."""
    seeds = range(config.seed, config.seed + config.seeds)
    trainings = [_training(labels, seed) for seed in seeds for labels in LABELS]
    loop.run(config, problem, folder, trainings)


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
        found, seen = examples.measure(name, model, params)
        row[name] = {
            "alpha": float(found.alpha),
            "r": float(found.m_coherence),
            "alpha_unbiased": float(found.alpha_unbiased),
            "noise_scale": float(found.noise_scale),
            "loss": float(found.loss),
            "accuracy": float((seen.guess == seen.labels).mean()),
            "count": int(found.count),
        }
        if name == "train":
            tensors = found.per_tensor.items()
            row["per_tensor"] = {
                tensor.removeprefix("params/"): {
                    "alpha": float(part.alpha),
                    "r": float(part.m_coherence),
                    "share": float(part.share),
                }
                for tensor, part in tensors
            }
    return row


def r_at_loss(rows: list[Row], sample: str, loss: float) -> float | None:
    """r when the training loss first falls through `loss`, log r interpolated; None if it does not get there."""
    losses = [number(row, "train/loss") for row in rows]
    for i, (before, after) in enumerate(itertools.pairwise(losses)):
        if after <= loss <= before and after < before:
            part = (before - loss) / (before - after)
            low, high = (np.log(number(rows[j], f"{sample}/r")) for j in (i, i + 1))
            return float(np.exp(low + part * (high - low)))
    return None


def at_equal_loss(rows: list[Row], sample: str) -> dict[float, dict[str, list[float]]]:
    """r by training loss and labels, one value for each seed, where every run reached that loss."""
    found: dict[float, dict[str, list[float]]] = {}
    for loss in _LOSSES:
        by_labels = {
            labels: [r_at_loss(select(rows, labels=labels, seed=seed), sample, loss) for seed in seeds_of(rows)]
            for labels in LABELS
        }
        complete = {labels: [r for r in values if r is not None] for labels, values in by_labels.items()}
        if all(len(values) == len(seeds_of(rows)) for values in complete.values()):
            found[loss] = complete
    return found


def at_equal_epoch(rows: list[Row], sample: str) -> dict[float, dict[str, list[float]]]:
    """r by epoch and labels, one value for each seed, where every run was measured."""
    found: dict[float, dict[str, list[float]]] = {}
    for epoch in sorted({row["epoch"] for row in rows}):
        by_labels = {
            labels: [number(row, f"{sample}/r") for row in rows if row["labels"] == labels and row["epoch"] == epoch]
            for labels in LABELS
        }
        if all(len(values) == len(seeds_of(rows)) for values in by_labels.values()):
            found[epoch] = by_labels
    return found


def _ratios(values: dict[str, list[float]]) -> list[float]:
    return [real / random for real, random in zip(values["real"], values["random"], strict=True)]


def _claim(sample: str, against: str, found: dict[float, dict[str, list[float]]], descending: bool) -> Claim:
    """Whether r of real labels is above that of random ones at every point, in every seed; if not, up to where."""
    text = f"On the {SAMPLES[sample]}, r of real labels is above r of random ones at every common {against}."
    points = sorted(found, reverse=descending)
    if not points:
        return Claim(text, None, f"The runs have no {against} in common.")
    ratios = [_ratios(found[point]) for point in points]
    until = next((i for i, values in enumerate(ratios) if min(values) <= 1), len(points))
    side = "down to" if descending else "up to"
    if until == len(points):
        return Claim(text, True, f"From {points[0]:.3g} {side} {points[-1]:.3g} {_range(ratios)}.")
    fails = f"at {points[until]:.3g} it fails in {_failing(ratios[until])}"
    rest = f"From there on the mean ratio is {min(map(np.mean, ratios[until:])):.2f} at the least"
    if until == 0:
        return Claim(text, False, f"Already {fails}. {rest}.")
    holds = (
        f"It holds in every seed from {points[0]:.3g} {side} {points[until - 1]:.3g}, where {_range(ratios[:until])}"
    )
    return Claim(text, False, f"{holds}; {fails}. {rest}.")


def _range(ratios: list[list[float]]) -> str:
    means = [float(np.mean(values)) for values in ratios]
    return f"the mean ratio is {min(means):.2f} to {max(means):.2f}"


def _failing(values: list[float]) -> str:
    number = sum(value <= 1 for value in values)
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{number} of {len(values)} seed(s) (ratio {low if low == high else f'{low} to {high}'})"


def _start(rows: list[Row], sample: str) -> Claim:
    found = at_equal_epoch(rows, sample).get(0.0)
    text = f"At the start, before any training, r of real labels is above r of random ones on the {SAMPLES[sample]}."
    if found is None:
        return Claim(text, None, "No run was measured at its start.")
    ratios = _ratios(found)
    return Claim(text, min(ratios) > 1, f"r = {with_spread(found['real'])} against {with_spread(found['random'])}.")


def _table(rows: list[Row]) -> Table:
    parts = {sample: at_equal_loss(rows, sample) for sample in SAMPLES}
    lines = []
    for loss in parts["train"]:
        line = [f"{loss:.2f}"]
        for sample in SAMPLES:
            values = parts[sample][loss]
            line += [with_spread(values["real"]), with_spread(values["random"]), with_spread(_ratios(values), "{:.2f}")]
        lines.append(tuple(line))
    heads = [f"{sample}: {column}" for sample in SAMPLES for column in ("r real", "r random", "ratio")]
    note = "r when the training loss first falls through the value, interpolated between checkpoints."
    return Table("r at equal training loss", ("training loss [nats]", *heads), tuple(lines), note)


def section(config: CoherenceConfig, folder: RunFolder) -> Section:
    """The claims, the table and the figures that follow from what was measured."""
    rows = folder.rows
    counts = {sample: rows[0][sample]["count"] for sample in SAMPLES} if rows else dict.fromkeys(SAMPLES, 0)
    claims, pictures = [], []
    if {row["labels"] for row in rows} == set(LABELS):
        for sample in SAMPLES:
            claims += [
                _start(rows, sample),
                _claim(sample, "training loss", at_equal_loss(rows, sample), descending=True),
                _claim(sample, "epoch", at_equal_epoch(rows, sample), descending=False),
            ]
    if rows:
        figures.coherence(rows, counts, folder.figures / "coherence.png")
        figures.per_tensor(rows, folder.figures / "per_tensor.png")
        pictures = [
            Figure("coherence.png", _CAPTION.format(**counts, seeds=config.seeds)),
            Figure("per_tensor.png", "r of each parameter tensor, or module, on the training sample, mean over seeds."),
        ]
    text = tuple(
        part.format(data=config.data, model=config.model, lr=config.learning_rate, batch=config.batch_size, **counts)
        for part in (*_TEXT, how_measured(config))
    )
    return Section(
        "coherence",
        "Real against random labels",
        text,
        tuple(claims),
        (_table(rows),) if claims else (),
        tuple(pictures),
    )


_CAPTION = (
    "m-coherence r of the whole training sample (m = {train}) and of a held-out test sample (m = {test}), against"
    " epochs and against training loss, with the accuracy on the same sample beside it. Lines are means over "
    "{seeds} seed(s), bands one standard deviation. The dashed line at r = 1 is the orthogonal limit: examples "
    "that do not help each other. Values of r for different m must not be compared."
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
