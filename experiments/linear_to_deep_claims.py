"""What is claimed of models that learn real and random labels, by mini-batches and by the full batch."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .claims import Claim, Result, with_spread
from .equal_loss import by_seed_at
from .line import Line
from .models import MODELS

LABELS = {"real": (0.0, 0.0), "random": (1.0, 1.0)}
# How steps are made: one mini-batch, or all examples.
BATCHES = {"mini": "SGD", "full": "full batch"}
LINES = {
    ("real", "mini"): Line("real labels, SGD", "tab:blue"),
    ("real", "full"): Line("real labels, full batch", "tab:cyan", "--"),
    ("random", "mini"): Line("random labels, SGD", "tab:red", "-."),
    ("random", "full"): Line("random labels, full batch", "tab:orange", ":"),
}
# Training losses at which runs are compared, where all of a model's runs reached them.
_LOSSES = (
    *(2.5, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6),
    *(0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1),
)


# A column by (labels, batches), each [losses, seed], at the losses that all runs of a model reached.
AtLosses = dict[tuple[str, str], pd.DataFrame]


def at_losses(table: pd.DataFrame, kind: str, column: str) -> AtLosses:
    """A column at equal training loss."""
    mine = table[table["kind"] == kind]
    values: AtLosses = {}
    for labels, batches in LINES:
        runs = mine[(mine["labels"] == labels) & (mine["batches"] == batches)]
        values[labels, batches] = by_seed_at(runs, column, _LOSSES, log=column != "gap")
    reached = np.all([each.notna().all(axis=1) for each in values.values()], axis=0)
    return {key: each[reached] for key, each in values.items()}


def log_ratio(r: AtLosses, batches: str) -> pd.Series:
    """Mean log ratio of r, real over random labels, over the common losses, by seed; NaN where there are none."""
    ratios = np.log(r["real", batches] / r["random", batches])
    return pd.Series(ratios.mean(), dtype=float)


def difference(gap: AtLosses, batches: str) -> pd.Series:
    """The gap of real labels less that of random ones at the least common loss, in points, by seed."""
    points = 100 * (gap["real", batches] - gap["random", batches])
    return points.iloc[-1] if len(points) else pd.Series(points.mean(), dtype=float)


def _judged(claim: Claim, by_kind: Mapping[str, pd.Series]) -> Result:
    """By the effect of each seed that all models have, in the model where it is least as predicted."""
    least = np.min if claim.sign > 0 else np.max  # NaN of one model is NaN
    seeds = sorted(set.intersection(*({*values.index} for values in by_kind.values())))
    effects = {seed: least([values[seed] for values in by_kind.values()]) for seed in seeds}
    models = "; ".join(f"{MODELS[kind].line.label} {with_spread(values)}" for kind, values in by_kind.items())
    return claim.judged(pd.Series(effects, dtype=float), detail=f"By model: {models}.")


_HALF = Claim(
    "In every model the full batch behaves as SGD does: the logarithm of the ratio of r, real over random labels, is "
    "more than half of SGD's.",
    "least over models: log ratio by the full batch less half of that by SGD, at equal training loss",
    "nats",
    1,
)


def _claims_of(batches: str) -> tuple[Claim, Claim]:
    """Of r and of the gap."""
    label = BATCHES[batches]
    return (
        Claim(
            f"In every model, by {label}, real labels are more coherent than random ones at equal training loss.",
            f"least over models: r, real over random labels, {label}, geometric mean over the common training losses",
            "×",
            1,
            "ratio",
        ),
        Claim(
            f"In every model, by {label}, real labels have the smaller generalisation gap at equal training loss.",
            f"largest over models: accuracy, training less test, real less random labels, {label}, at the least common "
            "training loss",
            "points",
            -1,
        ),
    )


def claims(kinds: Sequence[str], table: pd.DataFrame) -> list[Result]:
    """What must be so of every model, by the model of which it is least so."""
    r, gaps = ({kind: at_losses(table, kind, column) for kind in kinds} for column in ("r", "gap"))
    ratios = {batches: {kind: log_ratio(r[kind], batches) for kind in kinds} for batches in BATCHES}
    out = list[Result]()
    for batches in BATCHES:
        of_r, of_gap = _claims_of(batches)
        out.append(_judged(of_r, {kind: ratio.map(np.exp) for kind, ratio in ratios[batches].items()}))
        out.append(_judged(of_gap, {kind: difference(gaps[kind], batches) for kind in kinds}))
    excess = {kind: ratios["full"][kind] - ratios["mini"][kind] / 2 for kind in kinds}
    return [*out, _judged(_HALF, excess)]
