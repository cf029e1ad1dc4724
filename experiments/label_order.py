"""r of several kinds of labels, from real to random, in the order that the theory predicts: claims and a table."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from .claims import Claim, Result, with_spread
from .line import Line
from .section import Table, by_seed

Labels = Literal["real", "half", "random"]
LINES = {
    "real": Line("real labels", "tab:blue"),
    "half": Line("50% random labels", "tab:green", "-."),
    "random": Line("random labels", "tab:red", "--"),
}
SHARES = {"real": 0.0, "half": 0.5, "random": 1.0}  # of the labels that are drawn at random
_NAMES = {"real": "real labels", "half": "50% random ones", "random": "random ones"}
SAMPLES = {"train": "training sample", "test": "test sample"}
# Training losses, in nats, at which real and random labels are compared.
LOSSES = (
    *(6.75, 6.5, 6.0, 5.0, 4.0, 3.0, 2.5, 2.25, 2.2, 2.1, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75),
    *(0.5, 0.25, 0.1, 0.05, 0.02, 0.01),
)


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


def kinds(table: pd.DataFrame) -> list[str]:
    """The kinds of labels that were trained on, those that the theory calls the most coherent first."""
    return [labels for labels in LINES if labels in set(table["labels"])]


def at_equal_loss(table: pd.DataFrame, sample: str, losses: Sequence[float] = LOSSES) -> ByLabels:
    """r at the training losses that every run reached."""
    r = {
        labels: pd.DataFrame(
            {
                seed: [r_at_loss(run, sample, loss) for loss in losses]
                for seed, run in table[table["labels"] == labels].groupby("seed")
            },
            index=pd.Index(losses, name="loss"),
        )
        for labels in kinds(table)
    }
    return _common(r)


def at_equal_epoch(table: pd.DataFrame, sample: str) -> ByLabels:
    """r at the epochs where every run was measured."""
    return _common({labels: by_seed(table[table["labels"] == labels], f"{sample}/r") for labels in kinds(table)})


def _common(r: ByLabels) -> ByLabels:
    """The seeds that all kinds of labels have, at the points where none of them lacks a number."""
    whole = pd.concat(r, axis=1, join="inner")
    seeds = [seed for seed in next(iter(r.values())).columns if all(seed in part for part in r.values())]
    whole = whole.loc[:, [(labels, seed) for labels in r for seed in seeds]].dropna()
    return {labels: pd.DataFrame(whole[labels]) for labels in r}


# Of each kind of labels and the next, which is more random: the ratio of r, [losses or epochs, seed].
Ratios = dict[tuple[str, str], pd.DataFrame]


def _ratios(table: pd.DataFrame, of: Callable[[pd.DataFrame], ByLabels]) -> Ratios:
    pairs = itertools.pairwise(kinds(table))
    found = {pair: of(table[table["labels"].isin(pair)]) for pair in pairs}
    return {pair: r[pair[0]] / r[pair[1]] for pair, r in found.items()}


def _order(ratios: Ratios) -> tuple[str, str]:
    """What is claimed of r of all kinds of labels, and of which ratios it is claimed, as text."""
    first, *others = dict.fromkeys(itertools.chain(*ratios))
    above = ", and that above r of ".join(_NAMES[labels] for labels in others)
    return f"r of {_NAMES[first]} is above r of {above}", " and ".join(map(_over, ratios))


def _over(pair: tuple[str, str]) -> str:
    return f"{_NAMES[pair[0]]} over {_NAMES[pair[1]]}"


def _start(sample: str, table: pd.DataFrame, ratios: Ratios) -> Result:
    order, over = _order(ratios)
    claim = Claim(
        f"At the start, before any training, {order} on the {SAMPLES[sample]}.",
        f"{'least ratio of ' * (len(ratios) > 1)}m-coherence r of the {SAMPLES[sample]} at epoch 0, {over}",
        "×",
        1,
        "ratio",
    )
    if any(0.0 not in part.index for part in ratios.values()):
        return claim.judged(pd.Series(dtype=float), detail="No run was measured at its start.")
    if len(ratios) == 1:
        first, second = at_equal_epoch(table, sample).values()
        return claim.compared(first.T[0.0], second.T[0.0])
    starts = {pair: part.T[0.0] for pair, part in ratios.items()}
    ours = "; ".join(f"{_over(pair)}: {with_spread(part, '{:.2f}')}" for pair, part in starts.items())
    return claim.judged(pd.DataFrame(starts).dropna().min(axis=1), ours)


def _throughout(sample: str, against: str, ratios: Ratios) -> Result:
    """Whether r of each kind of labels is above that of the next at every point: by the least ratio of each seed."""
    order, over = _order(ratios)
    claim = Claim(
        f"On the {SAMPLES[sample]}, {order} at every common {against}.",
        f"least ratio of m-coherence r, {over}, over the common values of the {against}",
        "×",
        1,
        "ratio",
    )
    if any(part.empty for part in ratios.values()):
        return claim.judged(pd.Series(dtype=float), detail=f"The runs have no {against} in common.")
    least = pd.DataFrame({pair: part.min() for pair, part in ratios.items()}).dropna().min(axis=1)
    if len(ratios) == 1:
        return claim.judged(least, detail=_where(*ratios.values()))
    return claim.judged(least, detail=" ".join(f"{_over(pair)}: {_where(part)}" for pair, part in ratios.items()))


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


def claims(table: pd.DataFrame, losses: Sequence[float] = LOSSES) -> list[Result]:
    """Three for each sample."""
    out: list[Result] = []
    for sample in SAMPLES:
        by_epoch = _ratios(table, lambda part, sample=sample: at_equal_epoch(part, sample))
        by_loss = _ratios(table, lambda part, sample=sample: at_equal_loss(part, sample, losses))
        out += [
            _start(sample, table, by_epoch),
            _throughout(sample, "training loss", by_loss),
            _throughout(sample, "epoch", by_epoch),
        ]
    return out


def equal_loss_table(table: pd.DataFrame, losses: Sequence[float]) -> Table:
    """r of every kind of labels at equal training loss, on both samples."""
    parts = {sample: at_equal_loss(table, sample, losses) for sample in SAMPLES}
    names, lines = kinds(table), list[tuple[str, ...]]()
    for loss in parts["train"]["real"].index:
        line = [f"{loss:.2f}"]
        for sample in SAMPLES:
            r = [parts[sample][labels].T[loss] for labels in names]
            line += [*map(with_spread, r), with_spread(r[0] / r[-1], "{:.2f}")]
        lines.append(tuple(line))
    columns = (*(f"r {labels}" for labels in names), "ratio")
    heads = [f"{sample}: {column}" for sample in SAMPLES for column in columns]
    note = "r when the training loss first falls through the value, interpolated between checkpoints; ± one deviation."
    return Table("r at equal training loss", ("training loss [nats]", *heads), tuple(lines), note)
