"""Whether the examples that are reliably learnt early have more in common than the others."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from . import figures, loop
from .arrays import OnDevices
from .claims import Claim, Result, with_spread
from .configs import Hidden
from .data import Noise, load
from .examples import Examples, coherence_of
from .experiment import Experiment
from .halves import as_row, correlations, learnt_ranks, split
from .label_order import r_at_loss
from .learning import LearningConfig, accuracy, rounded, share_of
from .line import Line
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

# What is trained on once halves are known, and how the halves are drawn.
LINES = {"early": Line("early half", "tab:blue"), "late": Line("late half", "tab:red", "--")}
# Losses of a half, in nats, at which α of the halves is compared.
_LOSSES = (2.0, 1.5, 1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


@dataclasses.dataclass(frozen=True)
class EasyHardConfig(LearningConfig):
    """Whether the examples that are reliably learnt early have more in common than the others.

    `easy-hard`: mnist5k, MLP 784-256-256-10, trained on all examples, again with halves measured, and on either half;
    about 3 minutes on one CPU core for five seeds.
    """

    name: Hidden = "easy-hard"

    epochs: int = 40
    validation: float = 0.2
    """Share of a half that is held out where the half is trained on alone, to measure the gap on its own kind."""

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        if self.seeds < 2:
            what = "seeds >= 2, as the other seeds' runs choose the halves"
            raise ValueError(f"Expected {what}, got seeds={self.seeds}.")
        if not 0 < self.validation < 1:
            raise ValueError(f"Expected 0 < validation < 1, got validation={self.validation}.")
        super().check()


def measure(config: EasyHardConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on all examples; then, with halves by the other seeds, on all again, and on either half alone."""
    seeds = range(config.seed, config.seed + config.seeds)

    def training(arm: str, seed: int, noise: Noise, measurement: Any) -> loop.Training:
        marks = {"arm": arm, "seed": seed}
        return loop.Training(f"{config.name} · {arm} · seed {seed}", marks, "sgd", noise, measurement, _shown)

    def later(rows: Sequence[Row]) -> list[loop.Training]:
        ranks = learnt_ranks(rows)
        labels = load(config.data, folder=config.data_dir, num_train=config.num_train).train_labels
        halves = {seed: split(ranks.drop(columns=seed).mean(axis=1).to_numpy(), labels) for seed in seeds}
        both = [
            training("halves", seed, Noise(), functools.partial(_of_halves, config, halves[seed])) for seed in seeds
        ]
        return both + [
            training(half, seed, Noise(validation=config.validation, rows=halves[seed][half]), _alone)
            for half in LINES
            for seed in seeds
        ]

    loop.train_all(config, problem, folder, [training("all", seed, Noise(), _learnt) for seed in seeds], later)


def _shown(row: Row) -> dict[str, str]:
    return {"test": f"{row['test']:.3f}"}


def _learnt(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Which examples are predicted as labelled, as bits in hexadecimal digits."""
    seen = examples.guess("train", model, params)
    learnt = seen.guess == seen.labels
    return rounded(as_row(learnt) | {"train": share_of(learnt), "test": accuracy(examples, model, params)})


def _of_halves(
    config: EasyHardConfig, halves: dict[str, tuple[int, ...]], examples: Examples, model: nn.Module, params: Any
) -> Row:
    """Coherence and accuracy of either half of the training sample."""
    images, labels = cast(OnDevices, examples).arrays("train")
    seen, out = examples.guess("train", model, params), {}
    for half, members in halves.items():
        rows = np.array(members)
        size = min(config.measure_batch_size, rows.size)
        coherence = coherence_of(config, model, params, (images[rows], labels[rows]), batch_size=size)
        right = share_of((seen.guess == seen.labels)[rows])
        out[half] = {"alpha": float(coherence.alpha), "loss": float(coherence.loss), "train": right}
    return rounded({**out, "test": accuracy(examples, model, params)})


def _alone(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Coherence of the half that is trained on, and accuracy on it, on its held-out examples and on the test set."""
    coherence, seen = examples.measure("train", model, params)
    row = {"alpha": float(coherence.alpha), "loss": float(coherence.loss), "train": share_of(seen.guess == seen.labels)}
    return rounded(row | {name: accuracy(examples, model, params, name) for name in ("valid", "test")})


def alpha_at_losses(table: pd.DataFrame, half: str, *, alone: bool) -> pd.DataFrame:
    """α of a half when its own training loss first falls through each of the losses, [loss, seed], log interpolated."""
    part = "" if alone else f"{half}/"
    runs = table[table["arm"] == (half if alone else "halves")]
    runs = runs[["seed", f"{part}alpha", f"{part}loss"]].set_axis(["seed", "train/r", "train/loss"], axis=1)
    return pd.DataFrame(
        {seed: [r_at_loss(run, "train", loss) for loss in _LOSSES] for seed, run in runs.groupby("seed")},
        index=pd.Index(_LOSSES, name="loss"),
    )


def _mean_ratio(table: pd.DataFrame, *, alone: bool) -> pd.Series:
    """α of the early over the late half for each seed: the geometric mean over the losses that both of them reach."""
    early, late = (alpha_at_losses(table, half, alone=alone) for half in LINES)
    return np.exp(np.log(early / late).mean())


_STATED = (
    Claim(
        "Networks that differ in initialisation and order learn the same examples early.",
        "Spearman's rank correlation of the first-learnt step with that of the other seeds, their mean",
        "rank correlation",
        1,
    ),
    Claim(
        "When all examples are trained on, those that other seeds learn early have more in common than the others.",
        "α of the early half over α of the late half, each at equal loss of its own, geometric mean over the losses",
        "×",
        1,
        "ratio",
    ),
    Claim(
        "Trained on alone, the early half has more in common than the late half.",
        "α of the early half over α of the late half at equal training loss, geometric mean over the losses",
        "×",
        1,
        "ratio",
    ),
    Claim(
        "Trained on alone, the early half generalises better to examples of its own kind.",
        "gap at the last step, accuracy on the half less that on its held-out examples, early half less late half",
        "points",
        -1,
    ),
)


def _last(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The last line of each seed's training."""
    return table[table["arm"] == arm].groupby("seed").tail(1).set_index("seed")


def claims(table: pd.DataFrame, ranks: pd.DataFrame) -> tuple[Result, ...]:
    """Four, of all trainings and of the ranks of the first-learnt steps."""
    same, common, alone, gap = _STATED
    pairs = correlations(ranks)
    early, late = (100 * (last["train"] - last["valid"]) for last in (_last(table, half) for half in LINES))
    return (
        same.judged(pairs, with_spread(pairs)),
        common.judged(_mean_ratio(table, alone=False)),
        alone.judged(_mean_ratio(table, alone=True)),
        gap.compared(early, late, "{:.1f}%"),
    )


def _tables(table: pd.DataFrame) -> tuple[Table, Table]:
    """α at equal loss, and accuracies at the end."""
    parts = [alpha_at_losses(table, half, alone=alone).T for alone in (False, True) for half in LINES]
    lines = [
        (f"{loss:g}", *("–" if part[loss].isna().any() else with_spread(part[loss], "{:.2g}") for part in parts))
        for loss in _LOSSES
    ]
    heads = [f"{where}: α of the {half} half" for where in ("all trained on", "alone") for half in LINES]
    note = "α when the loss of the half first falls through the value, interpolated; a dash: not in every run."
    at_loss = Table("α at equal loss", ("loss of the half [nats]", *heads), tuple(lines), note)
    names = {"train": "on the half", "valid": "held out, of its kind", "test": "test"}
    ends = [(LINES[half].label, *(with_spread(_last(table, half)[name], "{:.3f}") for name in names)) for half in LINES]
    return at_loss, Table("Accuracy at the end, trained on a half alone", ("", *names.values()), tuple(ends))


def _draw(table: pd.DataFrame, path: Path) -> None:
    """How fast either half is learnt, α against its loss, and accuracies of networks trained on one half."""
    figure, axes = figures.grid(2, 2, (11, 8))
    both = table[table["arm"] == "halves"]
    for half, line in LINES.items():
        alone = table[table["arm"] == half]
        figures.band(axes[0, 0], curve(both, f"{half}/train"), line)
        figures.against(axes[0, 1], curve(both, f"{half}/loss"), curve(both, f"{half}/alpha", log=True), line)
        figures.against(axes[1, 0], curve(alone, "loss"), curve(alone, "alpha", log=True), line)
        figures.band(axes[1, 1], curve(alone, "valid"), line._replace(label=f"{line.label}, held out of its kind"))
        test = Line(f"{line.label}, test set", line.color, ":" if half == "early" else "-.")
        figures.band(axes[1, 1], curve(alone, "test"), test)
    for ax, label in (
        (axes[0, 0], "accuracy on either half,\nall examples trained on"),
        (axes[1, 1], "accuracy,\na half trained on alone"),
    ):
        figures.epoch_axis(ax, table["epoch"].to_numpy(float))
        figures.percent_axis(ax)
        ax.set_xlim(0, table["epoch"].max())
        ax.set_ylim(0, 1.02)
        ax.set_ylabel(label)
    for ax, where in ((axes[0, 1], "all examples trained on"), (axes[1, 0], "the half trained on alone")):
        losses, alphas = (np.concatenate([each.get_data()[i] for each in ax.lines]) for i in (0, 1))
        ax.set_xscale("log")
        ax.set_xlim(0.8 * np.nanmin(losses), 1.2 * np.nanmax(losses))
        ax.set_ylim(0.5 * np.nanmin(alphas), 2 * np.nanmax(alphas))
        figures.log_axis(ax)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("loss of the half [nats] (training goes to the right)")
        ax.invert_xaxis()
        ax.set_ylabel(f"α of the half,\n{where}")
    for ax in axes.flat:
        figures.legend_above(ax)
    figures.save(figure, path)


def section(config: EasyHardConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figure that follow from what was measured."""
    title = "Easy and hard examples"
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size, "held": config.validation}
    text = tuple(part.format(**values) for part in _TEXT)
    seeds = range(config.seed, config.seed + config.seeds)
    wanted = {(arm, seed) for arm in ("all", "halves", *LINES) for seed in seeds}
    if not {(row["arm"], row["seed"]) for row in rows} >= wanted:
        return Section(config.name, title, text, (), (), ())
    table = frame([{name: value for name, value in row.items() if name != "learnt"} for row in rows])
    _draw(table, folder / "easy_hard.png")
    picture = Figure("easy_hard.png", _CAPTION.format(seeds=config.seeds))
    results = claims(table, learnt_ranks(rows))
    return Section(config.name, title, text, results, _tables(table), (picture,))


_CAPTION = (
    "Above: where all examples are trained on, the share of either half that is predicted as labelled, against epochs, "
    "and α of the half against its own loss. Below: where only one half is trained on, α of it against its loss, and "
    "accuracy on held-out examples of its own kind and on the test set. Lines are means over {seeds} seed(s), of α "
    "geometric ones; bands and bars are their 95% intervals, which may leave the axes."
)
_TEXT = (
    "A network is trained by SGD (learning rate {lr}, mini-batches of {batch}) on the same examples ({data}) from "
    "other initialisations and in other orders, one for each seed. The first-learnt step of an example is the first "
    "measured one at which, as at the next measured one, it is predicted as labelled.",
    "The theory says that an example is learnt early because others help it: their gradients have something in common. "
    "For each seed the examples of every class are halved by the mean rank of their first-learnt steps in the runs of "
    "the other seeds, so that neither the run that is measured nor the mix of classes chooses the halves. Training is "
    "then repeated with α of both halves measured on the way, and once more on either half alone, of which {held:.0%} "
    "is held out. α changes as the loss falls, so it is compared where the halves have the same loss, each its own.",
)

EXPERIMENT = Experiment(EasyHardConfig(), measure, section)
