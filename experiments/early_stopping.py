"""Whose gradients training follows before and after the epoch at which it had better stop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pandas as pd

from . import figures, loop
from .claims import Claim, Result, with_spread
from .configs import Hidden
from .examples import Examples
from .experiment import Experiment
from .learning import (
    LearningConfig,
    accuracy,
    by_run,
    crossing,
    effective_number,
    part_of,
    per_example,
    rounded,
    share_of,
)
from .line import Line
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

# Examples by their label and by whether they are predicted as labelled.
_GROUPS = {
    "pristine_unfitted": Line("pristine, unfitted", "tab:blue"),
    "pristine_fitted": Line("pristine, fitted", "tab:cyan", ":"),
    "corrupt_unfitted": Line("corrupt, unfitted", "tab:red", "--"),
    "corrupt_fitted": Line("corrupt, fitted", "tab:orange", "-."),
}
# The unfitted are few where so many examples, or more, are fitted.
_FITTED = 0.9


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig(LearningConfig):
    """Whose gradients training follows before and after the epoch at which it had better stop.

    `early-stopping`: mnist5k with half of the labels redrawn, MLP 784-256-256-10, until test accuracy has long fallen;
    about 2 minutes on one CPU core for five seeds.
    """

    name: Hidden = "early-stopping"

    epochs: int = 100
    noise: float = 0.5
    """Share of the training labels that are redrawn."""

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        if not 0 < self.noise < 1:
            raise ValueError(f"Expected 0 < noise < 1, got noise={self.noise}.")
        super().check()

    def check_size(self, num_train: int) -> None:
        """ValueError where not one label would be changed."""
        if not round(self.noise * num_train):
            raise ValueError(f"Expected noise to be a label or more of {num_train}, got noise={self.noise}.")


def measure(config: EarlyStoppingConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train seed by seed, and look at every example on the way."""
    trainings = [
        loop.Training(
            f"{config.name} · seed {seed}",
            {"seed": seed},
            "sgd",
            (config.noise, 0.0),
            _measurement,
            lambda row: {"loss": f"{row['loss']:.3f}", "test": f"{row['test']:.3f}"},
        )
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    loop.train_all(config, problem, folder, trainings)


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Shares of Q = ‖Σ g‖², of S = Σ ‖g‖² and of the number of examples, by group."""
    each = per_example(examples, model, params)
    label, fit = (~each.corrupt, each.corrupt), (~each.fitted, each.fitted)
    groups = dict(zip(_GROUPS, (a & b for a in label for b in fit), strict=True))
    return rounded(
        {
            "count": {name: share_of(group) for name, group in groups.items()},
            "S": {name: part_of(each.sq_norms, group) for name, group in groups.items()},
            "Q": {name: part_of(each.along, group) for name, group in groups.items()},
            "effective_S": effective_number(each.sq_norms),
            "effective_Q": effective_number(each.along),
            "alpha": each.alpha,
            "loss": float(each.losses.mean()),
            "test": accuracy(examples, model, params),
        }
    )


def with_sums(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the shares of all corrupt, pristine and unfitted examples, as columns such as Q/corrupt."""
    out = table.copy()
    for what in ("count", "S", "Q"):
        for label in ("pristine", "corrupt"):
            out[f"{what}/{label}"] = table[f"{what}/{label}_unfitted"] + table[f"{what}/{label}_fitted"]
        out[f"{what}/unfitted"] = table[f"{what}/pristine_unfitted"] + table[f"{what}/corrupt_unfitted"]
    for label in ("pristine", "corrupt"):
        out[f"fitted_{label}"] = table[f"count/{label}_fitted"] / out[f"count/{label}"]
    return out


def peak(run: pd.DataFrame) -> pd.Series:
    """The line of one training at the first of its highest test accuracies."""
    return run.iloc[int(run["test"].to_numpy().argmax())]


def _crossing(run: pd.DataFrame, index: str = "step") -> float:
    """Where the corrupt examples' share of ‖Σ g‖² passes that of the pristine, in steps or in epochs."""
    steps = crossing(run, "Q/corrupt")
    return float(np.interp(steps, run["step"].to_numpy(float), run[index].to_numpy(float)))


def _of_few(run: pd.DataFrame) -> float:
    """The share of S of the unfitted, at the first measured step with 90% fitted; NaN where there is none."""
    few = run[run["count/unfitted"] <= 1 - _FITTED]
    return float(few["S/unfitted"].iloc[0]) if len(few) else float("nan")


_STATED = (
    Claim(
        "Test accuracy peaks before corrupt examples make up more of the average gradient than pristine ones.",
        "step of the highest test accuracy, over the step, after the first epoch, at which the corrupt share of ‖ḡ‖² "
        "passes the pristine one",
        "×",
        -1,
        "ratio",
    ),
    Claim(
        "Fewer examples carry the gradients at the end than at the test peak.",
        "effective number of examples (Σ‖g‖²)² / Σ‖g‖⁴, last step over test peak",
        "×",
        -1,
        "ratio",
    ),
    Claim(
        "Once 90% of the examples are fitted, the few that are not carry most of the squared gradient norms.",
        "share of Σ‖g‖² of the unfitted, at the first measured step where they are a tenth or less, less one half",
        "of Σ‖g‖²",
        1,
    ),
    Claim(
        "Coherence is lower at the end than at the test peak.",
        "α of the training sample, last step over test peak",
        "×",
        -1,
        "ratio",
    ),
)


def claims(table: pd.DataFrame) -> tuple[Result, ...]:
    """Four, of a table with sums."""
    before, fewer, few, lower = _STATED

    def at_peak(column: str) -> pd.Series:
        return by_run(table, lambda run: float(peak(run)[column]))

    def at_end(column: str) -> pd.Series:
        return by_run(table, lambda run: float(run[column].iloc[-1]))

    shares = by_run(table, _of_few)
    return (
        before.compared(at_peak("step"), by_run(table, _crossing)),
        fewer.compared(at_end("effective_S"), at_peak("effective_S"), "{:.0f}"),
        few.compared(shares, shares * 0 + 0.5),
        lower.compared(at_end("alpha"), at_peak("alpha")),
    )


def _table(table: pd.DataFrame) -> Table:
    """What holds at the test peak, at the crossing and at the end."""
    moments = (lambda run: peak(run)["step"], _crossing, lambda run: run["step"].iloc[-1])

    def cell(where: Callable[[pd.DataFrame], float], column: str, form: str) -> str:
        lines = [run[run["step"] <= where(run)] for _, run in table.groupby("seed")]
        if not all(map(len, lines)):
            return "–"
        return with_spread(pd.Series([float(line[column].iloc[-1]) for line in lines]), form)

    shown = {
        "epoch": ("epoch", "{:.1f}"),
        "test accuracy": ("test", "{:.3f}"),
        "training loss [nats]": ("loss", "{:.3f}"),
        "α": ("alpha", "{:.2g}"),
        "effective number, of Σ‖g‖²": ("effective_S", "{:.0f}"),
        "corrupt share of ‖Σ g‖²": ("Q/corrupt", "{:.2f}"),
        "corrupt share of Σ‖g‖²": ("S/corrupt", "{:.2f}"),
        "unfitted share of Σ‖g‖²": ("S/unfitted", "{:.2f}"),
        "unfitted share of the examples": ("count/unfitted", "{:.2f}"),
    }
    rows = tuple((name, *(cell(where, *column) for where in moments)) for name, column in shown.items())
    note = "At the crossing: the last measured step before it. ± one deviation over seeds; a dash: not in every run."
    return Table("At the test peak, at the crossing and at the end", ("", "test peak", "crossing", "end"), rows, note)


_LABELS = {"pristine": Line("pristine", "tab:blue"), "corrupt": Line("corrupt", "tab:red", "--")}
_FEW = {
    "S/unfitted": Line("of Σ‖g‖²", "tab:purple"),
    "Q/unfitted": Line("of ‖Σ g‖²", "tab:brown", "-."),
    "count/unfitted": Line("of the examples", "black", ":"),
}
_EFFECTIVE = {
    "effective_S": Line("of ‖g‖²", "tab:purple"),
    "effective_Q": Line("of ⟨g, ḡ⟩", "tab:brown", "-."),
}
_ACCURACY = {
    "test": Line("test", "black", "-."),
    **{f"fitted_{label}": line._replace(label=f"{line.label}, as labelled") for label, line in _LABELS.items()},
}
_PANELS = (
    ("test", "accuracy", _ACCURACY),
    ("cut", "share of ‖ḡ‖²", {f"Q/{label}": line for label, line in _LABELS.items()}),
    ("log", "α", {"alpha": Line("α of the training sample", "tab:green")}),
    ("percent", "share of Σ‖g‖²", {f"S/{name}": line for name, line in _GROUPS.items()}),
    ("cut", "share of the unfitted", _FEW),
    ("log", "effective number of examples", _EFFECTIVE),
)


def _draw(table: pd.DataFrame, path: Path) -> None:
    """Six panels against epochs, with the test peak and the crossing in each."""
    figure, axes = figures.grid(2, 3, (13, 7.6))
    marks = {
        "test peak": (by_run(table, lambda run: float(peak(run)["epoch"])), ":"),
        "crossing": (by_run(table, lambda run: _crossing(run, "epoch")), (0, (5, 1))),
    }
    for ax, (kind, label, lines) in zip(axes.flat, _PANELS, strict=True):
        for column, line in lines.items():
            figures.band(ax, curve(table, column, log=kind == "log"), line)
        for name, (epochs, style) in marks.items():
            if epochs.notna().any():
                ax.axvline(epochs.mean(), color="0.35", linestyle=style, linewidth=1.2, label=name)
        figures.epoch_axis(ax, table["epoch"].to_numpy(float))
        ax.set_xlim(0, table["epoch"].max())
        ax.set_ylabel(label)
        if kind == "log":
            figures.log_axis(ax)
        else:
            figures.percent_axis(ax)
            ax.set_ylim(*((-0.6, 1.6) if kind == "cut" else (0, 1.02)))
        figures.legend_above(ax)
    figures.save(figure, path)


def section(config: EarlyStoppingConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    title = "Early stopping: who is left to learn from"
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size, "noise": config.noise}
    text = tuple(part.format(**values) for part in _TEXT)
    if not rows:
        return Section(config.name, title, text, (), (), ())
    table = with_sums(frame(rows))
    _draw(table, folder / "early_stopping.png")
    picture = Figure("early_stopping.png", _CAPTION.format(seeds=config.seeds))
    return Section(config.name, title, text, claims(table), (_table(table),), (picture,))


_CAPTION = (
    "Against epochs: accuracy on the test set, on pristine and on corrupt training examples; the shares of ‖ḡ‖², the "
    "squared average gradient, that come from either (outside 0 and 1 where they pull against each other; the axis is "
    "cut); α of the training sample; the shares of the sum of squared gradient norms by label and by whether the "
    "example is predicted as labelled; what the unfitted examples have of either sum, beside their number; and the "
    "number of examples that carry the gradients, (Σv)² / Σv². Lines are means over {seeds} seed(s), of α and of "
    "numbers geometric ones, bands their 95% intervals; the vertical lines are the mean epochs of the highest test "
    "accuracy and of the crossing of the shares of ‖ḡ‖²."
)
_TEXT = (
    "A share of {noise:.0%} of the training labels ({data}) is redrawn uniformly, and a network is trained by SGD "
    "(learning rate {lr}, mini-batches of {batch}) for long after its test accuracy is highest. An example is corrupt "
    "where its label really changed, and fitted where it is predicted as it is labelled.",
    "The theory explains early stopping by who is left to learn from: the examples that agree are fitted first and "
    "stop contributing, and the gradient is then that of the few unfitted ones, which have little in common. So the "
    "test peak should lie before the step at which corrupt examples make up more of the squared average gradient ‖ḡ‖² "
    "than pristine ones. Their shares come from the exact inner product of every example's gradient g with ḡ, and the "
    "shares of Σ‖g‖² from its norm. The effective number (Σ‖g‖²)² / Σ‖g‖⁴ is the number of examples where all norms "
    "are equal, and 1 where one example has all of them.",
)

EXPERIMENT = Experiment(EarlyStoppingConfig(), measure, section)
