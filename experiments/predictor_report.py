"""Claims, tables and figures of what predicts the generalisation gap. Of rows that cells and seeds mark."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import figures
from .claims import Claim, Result, interval
from .predictors import correlations, signs
from .section import Figure, Table

# What makes a cell, and what axes call it.
FACTORS = {"noise": "noise", "width": "width", "rate": "learning rate", "m": "number of examples"}
_NAMES = tuple(FACTORS)


class Predictor(NamedTuple):
    """A number that is measured early."""

    label: str
    sign: Literal[1, -1]  # of the rank correlation with the gap that its theory predicts


PREDICTORS = {
    "alpha": Predictor("α", -1),
    "alpha_unbiased": Predictor("α unbiased", -1),
    "r": Predictor("r = m·α", -1),
    "gsnr": Predictor("GSNR", -1),
    "gwa": Predictor("GWA", -1),
    "loss": Predictor("training loss", 1),
    "valid": Predictor("validation accuracy", -1),
}


def at_loss(run: pd.DataFrame, column: str, loss: float) -> float:
    """A column when the training loss first falls through `loss`, interpolated; NaN if it does not get there."""
    losses, values = run["loss"].to_numpy(float), run[column].to_numpy(float)
    for i in np.flatnonzero((losses[:-1] >= loss) & (losses[1:] <= loss)):
        if losses[i + 1] < losses[i]:
            part = (losses[i] - loss) / (losses[i] - losses[i + 1])
            return float(values[i] + part * (values[i + 1] - values[i]))
    return float("nan")


def runs_of(table: pd.DataFrame, epochs: int, early_loss: float, late_loss: float) -> pd.DataFrame:
    """One line for each run that reached its end: its cell, its predictors after the first epoch, and its gaps."""
    if not len(table):
        return pd.DataFrame()
    table = table.assign(gap=table["train"] - table["test"], r=table["m"] * table["alpha"])
    table["alpha_unbiased"] = (table["r"] - 1) / (table["m"] - 1)
    lines = []
    for key, run in table.groupby([*_NAMES, "seed"]):
        by_epoch = run.set_index("epoch")
        if not {0.0, 1.0, float(epochs)} <= set(by_epoch.index):
            continue
        first, last = by_epoch.loc[1.0], by_epoch.loc[float(epochs)]
        lines.append(
            {
                **dict(zip((*_NAMES, "seed"), key, strict=True)),
                **{name: first[name] for name in PREDICTORS if name in run},
                "alpha_start": by_epoch["alpha"].loc[0.0],
                "alpha_at_loss": at_loss(run, "alpha", early_loss),
                "gap": last["gap"],
                "gap_loss": last["test_loss"] - last["loss"],
                "gap_true": last["train"] - last["test_true"],
                "gap_at_loss": at_loss(run, "gap", late_loss),
            }
        )
    return pd.DataFrame(lines)


def _counted(runs: pd.DataFrame, name: str, factor: str, gap: str = "gap", sign: int = -1) -> tuple[int, int]:
    """In how many lines the means over seeds have the predicted sign, and in how many the opposite."""
    below, above = signs(runs, name, gap, _NAMES, factor)
    return (below, above) if sign < 0 else (above, below)


def _within(runs: pd.DataFrame, name: str, factor: str, paper: str = "") -> Result:
    label = PREDICTORS[name].label
    claim = Claim(
        f"When only the {FACTORS[factor]} varies, a higher {label} after the first epoch goes with a smaller gap.",
        f"mean Kendall's τ of {label} and the final gap within lines that differ in the {FACTORS[factor]} alone",
        "τ",
        -1,
        paper=paper,
    )
    right, wrong = _counted(runs, name, factor)
    ours = f"predicted sign in {right} lines, opposite in {wrong}"
    return claim.judged(correlations(runs, name, "gap", _NAMES, factor), ours)


# Of a public log of 960 runs, where only the learning rate varies.
_LOG = {
    "alpha": "predicted sign in 5 cells, opposite in 6",
    "gwa": "predicted sign in 15 cells, opposite in 1",
    "gsnr": "predicted sign in 11 cells, opposite in 2",
}


def claims(runs: pd.DataFrame) -> list[Result]:
    """Of α over the grid and within each factor; of its rivals where only the learning rate varies."""
    over_all = Claim(
        "Over all cells, a higher α after the first epoch goes with a smaller generalisation gap at the end.",
        "Kendall's τ of α and the final gap over all cells",
        "τ",
        -1,
    )
    better = Claim(
        "Over all cells, α after the first epoch tells more of the final gap than the training loss then does.",
        "Kendall's τ with the final gap, of the predicted sign: of α (−τ) less of the training loss (τ)",
        "τ",
        1,
    )
    alpha, loss = (correlations(runs, name, "gap", _NAMES) for name in ("alpha", "loss"))
    return [
        over_all.judged(alpha),
        *(_within(runs, "alpha", factor, _LOG["alpha"] if factor == "rate" else "") for factor in FACTORS),
        *(_within(runs, name, "rate", _LOG[name]) for name in ("gwa", "gsnr")),
        better.compared(-alpha, loss),
    ]


def _mean(values: pd.Series) -> str:
    """A mean over seeds and its interval; a dash where there is none."""
    if values.isna().any() or not len(values):
        return "–"
    ends = interval(values.to_numpy(float))
    return f"{ends.mean:+.2f}" + (f" [{ends.low:+.2f}, {ends.high:+.2f}]" if len(values) > 1 else "")


def _cells(runs: pd.DataFrame, name: str, gap: str, sign: int) -> Iterable[str]:
    """Over all cells, then within each factor."""
    yield _mean(correlations(runs, name, gap, _NAMES))
    for factor in FACTORS:
        right, wrong = _counted(runs, name, factor, gap, sign)
        yield f"{_mean(correlations(runs, name, gap, _NAMES, factor))}; {right} to {wrong}"


def tables(runs: pd.DataFrame, early_loss: float, late_loss: float) -> tuple[Table, ...]:
    """All predictors by all factors; and α at other moments, and other gaps."""
    heads = ("all cells", *(f"{label} alone" for label in FACTORS.values()))
    rows = tuple(
        (p.label, "+" if p.sign > 0 else "−", *_cells(runs, name, "gap", p.sign))
        for name, p in PREDICTORS.items()
        if name in runs
    )
    others = (
        ("α at the start; final gap in accuracy", "alpha_start", "gap"),
        (f"α when the training loss falls through {early_loss:g}; final gap in accuracy", "alpha_at_loss", "gap"),
        ("α after epoch 1; final gap in loss", "alpha", "gap_loss"),
        ("α after epoch 1; final gap to accuracy on true test labels", "alpha", "gap_true"),
        (f"α after epoch 1; gap when the training loss falls through {late_loss:g}", "alpha", "gap_at_loss"),
    )
    lines = tuple((text, *_cells(runs, early, gap, -1)) for text, early, gap in others)
    title = "Kendall's τ of predictors after the first epoch and the final gap"
    return (
        Table(title, ("predictor", "predicted", *heads), rows, _NOTE),
        Table("Kendall's τ of α at other moments, and of other gaps", ("what", *heads), lines, _NOTE),
    )


_NOTE = (
    "Mean over seeds [95% interval]; of one factor, the mean over the lines of cells that differ in it alone, and "
    "in how many lines the means over seeds have the predicted sign and the opposite one. Runs that do not reach "
    "a loss are left out, and lines where one of the two is constant. A dash: not every seed has a τ."
)


def draw(runs: pd.DataFrame, folder: Path) -> tuple[Figure, ...]:
    """Both pictures."""
    _draw_cells(runs, folder / "cells.png")
    _draw_predictors(runs, folder / "predictors.png")
    return Figure("cells.png", _CELLS), Figure("predictors.png", _PREDICTORS)


_MARKERS = "os^Dv"


def _draw_cells(runs: pd.DataFrame, path: Path) -> None:
    """α against the gap, a point for each cell; the same points in every panel, shaded by another factor."""
    figure, axes = figures.grid(1, 3, (12, 5), share_y=True)
    for ax, shade in zip(axes[0], ("rate", "width", "m"), strict=True):
        levels = sorted(runs[shade].unique())
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(levels)))
        for (noise, level), part in runs.groupby(["noise", shade]):
            marker = _MARKERS[sorted(runs["noise"].unique()).index(noise) % len(_MARKERS)]
            _points(ax, part, marker, colors[levels.index(level)])
        handles = [ax.plot([], [], "s", color=c, label=f"{v:g}")[0] for v, c in zip(levels, colors, strict=True)]
        ax.legend(handles=handles, title=f"shade: {FACTORS[shade]}", loc="upper center", bbox_to_anchor=(0.5, -0.16),
                  ncols=len(levels), fontsize=9, title_fontsize=9)  # fmt: skip
        _log_x(ax)
        ax.set_xlabel("α after the first epoch, training sample")
        figures.percent_axis(ax)
    axes[0, 0].set_ylabel("final generalisation gap\n(training − test accuracy, as labelled)")
    handles = [
        Line2D([], [], color="black", marker=marker, linestyle="", fillstyle="none", label=f"noise {100 * noise:g}%")
        for noise, marker in zip(sorted(runs["noise"].unique()), _MARKERS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)
    figures.save(figure, path)


def _points(ax: Any, part: pd.DataFrame, marker: str, color: Any) -> None:
    """Means over seeds of the cells of a part, with bars of their intervals where there are several seeds."""
    for _, cell in part.groupby([*_NAMES]):
        x, y = (interval(cell[name].to_numpy(float)) for name in ("alpha", "gap"))
        bars = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
        bars = bars if len(cell) > 1 else {}
        ax.errorbar(x.mean, y.mean, **bars, fmt=marker, color=color, markersize=6, fillstyle="none", elinewidth=0.5)


def _log_x(ax: Any) -> None:
    """A logarithmic axis of plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_predictors(runs: pd.DataFrame, path: Path) -> None:
    """The rank correlation of each predictor, times its predicted sign; a panel for each kind of line."""
    figure, axes = figures.grid(1, 1 + len(FACTORS), (12, 3.8), share_y=True)
    shown = [name for name in PREDICTORS if name in runs]
    for ax, factor in zip(axes[0], ("", *FACTORS), strict=True):
        for place, name in enumerate(shown):
            values = PREDICTORS[name].sign * correlations(runs, name, "gap", _NAMES, factor).to_numpy(float)
            ends = interval(values)
            bar = [[ends.mean - ends.low], [ends.high - ends.mean]] if len(values) > 1 else None
            ax.errorbar(ends.mean, place, xerr=bar, fmt="o", color="black", capsize=3, markersize=5)
        ax.axvline(0, color="black", linestyle=":", linewidth=1)
        ax.set_xlim(-1.1, 1.1)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−½", "0", "½", "1"])
        ax.set_title(f"{FACTORS[factor]} alone" if factor else "all cells", fontsize=10)
        ax.set_xlabel("τ × predicted sign")
    axes[0, 0].set_yticks(range(len(shown)), [PREDICTORS[name].label for name in shown])
    axes[0, 0].invert_yaxis()
    figures.save(figure, path)


_CELLS = (
    "Coherence α after the first epoch against the generalisation gap after the last: one point for each cell, "
    "the mean over seeds, bars the 95% intervals. The panels show the same points; the marker says the noise, the "
    "shade one other factor. The theory predicts points that fall to the right."
)
_PREDICTORS = (
    "Kendall's τ between a predictor after the first epoch and the final generalisation gap, times the predicted "
    "sign: right of 0 is as predicted. Dots are means over seeds, bars their 95% intervals. Over all cells, and "
    "within lines of cells that differ in one factor alone. The gradient noise scale would lie where α does."
)
