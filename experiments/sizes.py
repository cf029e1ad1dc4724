"""Networks of several sizes at equal training loss: claims, a table and figures."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from . import figures
from .claims import Claim, Result, with_spread
from .equal_loss import by_seed_at, curve_of
from .line import Line
from .section import Table, curve

# Training losses in nats: where r, and shares, are compared, and where gaps are.
_MIDDLE, _FITTED = 0.5, 0.1
_OF_LOSSES = {
    1.0: Line("training loss 1", "tab:green", "-."),
    _MIDDLE: Line("training loss 0.5", "tab:blue"),
    _FITTED: Line("training loss 0.1", "tab:orange", "--"),
}
_OF_LABELS = {"real": Line("real labels", "tab:blue"), "random": Line("random labels", "tab:red", "--")}
_OF_DEPTHS = (("tab:gray", ":"), ("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", "-."))
# Where real labels are compared with random ones, whose loss falls slowly.
RANDOM_LOSS = 1.5


class Sweep(NamedTuple):
    """Networks that differ in one size alone, with real labels."""

    model: str
    size: str  # width or depth
    sizes: tuple[int, ...]
    other: int  # the size that they have in common
    where: str  # how claims begin


Sweeps = tuple[Sweep, Sweep, Sweep]  # by width, by depth, and by the depth of linear networks


def at_sizes(table: pd.DataFrame, sweep: Sweep, column: str, loss: float, labels: str = "real") -> pd.DataFrame:
    """A column [size, seed] when the training loss falls through `loss`."""
    other = "depth" if sweep.size == "width" else "width"
    mine = table[(table["model"] == sweep.model) & (table["labels"] == labels) & (table[other] == sweep.other)]
    log = column == "r"
    columns = {
        size: by_seed_at(mine[mine[sweep.size] == size], column, [loss], log=log).T[loss]
        for size in sorted(sweep.sizes)
    }
    return pd.DataFrame(columns).T


def claims(sweeps: Sweeps, table: pd.DataFrame) -> list[Result]:
    """The largest network of each sweep against the smallest, at equal training loss."""
    wide, deep, linear = sweeps
    out: list[Result] = []
    for sweep, more in ((wide, "the wider network"), (deep, "the deeper network")):
        out += [
            _claim(table, sweep, "r", f"{more} is more coherent"),
            _claim(table, sweep, "gap", f"{more} has the smaller generalisation gap"),
        ]
    out += [
        _claim(table, linear, "share", "depth amplifies the strongest common direction over the weaker ones"),
        _claim(table, linear, "r", "the deeper network is more coherent"),
    ]
    return out


class _Compared(NamedTuple):
    """How a column is compared."""

    loss: float
    unit: str
    sign: int
    scale: float
    text: str


_COMPARED = {
    "r": _Compared(_MIDDLE, "×", 1, 1, "m-coherence r of the training sample"),
    "gap": _Compared(_FITTED, "points", -1, 100, "accuracy, training less test,"),
    "share": _Compared(_MIDDLE, "points", 1, 100, "share of the strongest direction in what was learnt"),
}


def _claim(table: pd.DataFrame, sweep: Sweep, column: str, what: str) -> Result:
    how = _COMPARED[column]
    most, least = max(sweep.sizes), min(sweep.sizes)
    ratio = how.unit == "×"
    claim = Claim(
        f"{sweep.where}, at equal training loss, {what}.",
        f"{how.text} at training loss {how.loss}, {sweep.size} {most} {'over' if ratio else 'less'} {least}",
        how.unit,
        1 if how.sign > 0 else -1,
        "ratio" if ratio else "difference",
    )
    values = how.scale * at_sizes(table, sweep, column, how.loss).T
    return claim.compared(values[most], values[least])


def table_of(sweeps: Sweeps, table: pd.DataFrame) -> Table:
    """r, gaps and shares of every network at equal training loss."""
    lines: list[tuple[str, ...]] = []
    for sweep in sweeps:
        columns = [
            at_sizes(table, sweep, *column)
            for column in (("r", _MIDDLE), ("gap", _FITTED), ("loss_gap", _FITTED), ("share", _MIDDLE))
        ]
        for size in columns[0].index:
            r, gap, loss_gap, share = (column.loc[size] for column in columns)
            cells = (r, 100 * gap, loss_gap, 100 * share)
            label = f"{'deep linear, ' if sweep.model == 'deep_linear' else ''}{sweep.size} {size}"
            lines.append((label, *("–" if cell.isna().any() or cell.empty else with_spread(cell) for cell in cells)))
    heads = ("network", f"r at {_MIDDLE}", f"gap in accuracy at {_FITTED} [points]", f"gap in loss at {_FITTED} [nats]")
    note = "At equal training loss, in nats, interpolated between measurements; ± one deviation. A dash: not reached."
    share = f"share of the strongest direction at {_MIDDLE} [%]"
    return Table("Width and depth at equal training loss", (*heads, share), tuple(lines), note)


def _size_axis(ax: Any, sweep: Sweep) -> None:
    sizes = sorted(sweep.sizes)
    ax.set_xscale("log")
    ax.set_xlim(0.8 * sizes[0], 1.25 * sizes[-1])
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(f"{'units of a hidden layer' if sweep.size == 'width' else 'hidden layers'} (log axis)")


def _r_axis(ax: Any) -> None:
    ax.set_ylabel("m-coherence r,\ntraining sample [examples]")
    if any(np.isfinite(line.get_ydata()).any() for line in ax.lines):  # else no run reached the loss
        figures.log_axis(ax)


def draw_sizes(sweeps: Sweeps, table: pd.DataFrame, path: Path) -> None:
    """r and both gaps against width and against depth, at equal training losses."""
    figure, axes = figures.grid(2, 3)
    for sweep, line in zip(sweeps[:2], axes, strict=True):
        for ax, column in zip(line, ("r", "gap", "loss_gap"), strict=True):
            for loss, style in _OF_LOSSES.items():
                values = at_sizes(table, sweep, column, loss)
                figures.band(ax, curve_of(values, log=column == "r"), style)
            _size_axis(ax, sweep)
        _r_axis(line[0])
        figures.percent_axis(line[1])
        line[1].set_ylabel("gap in accuracy\n(training − test)")
        line[2].set_ylabel("gap in loss\n(test − training) [nats]")
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def draw_linear(sweeps: Sweeps, table: pd.DataFrame, path: Path) -> None:
    """Shares and r of linear networks against training loss, and r of real and random labels against width."""
    figure, axes = figures.grid(1, 3, (12, 4))
    wide, _, linear = sweeps
    mine = table[table["model"] == "deep_linear"]
    for depth, (color, style) in zip(sorted(linear.sizes), itertools.cycle(_OF_DEPTHS)):
        rows = mine[mine["depth"] == depth]
        loss, line = curve(rows, "loss"), Line(f"no ReLU, {depth} hidden layers", color, style)
        learnt = rows[rows["step"] > 0]
        figures.against(axes[0, 0], curve(learnt, "loss"), curve(learnt, "share"), line)
        figures.against(axes[0, 1], loss, curve(rows, "r", log=True), line)
    for ax in axes[0, :2]:
        ax.set_xlabel("training loss [nats] (training goes to the right)")
        ax.invert_xaxis()
    axes[0, 0].set_ylim(0, 1)
    figures.percent_axis(axes[0, 0])
    axes[0, 0].set_ylabel("share of the strongest direction\nin what was learnt")
    for labels, line in _OF_LABELS.items():
        values = at_sizes(table, wide, "r", RANDOM_LOSS, labels)
        figures.band(axes[0, 2], curve_of(values, log=True), line)
    _size_axis(axes[0, 2], wide)
    axes[0, 2].legend(fontsize=8, title=f"MLP at training loss {RANDOM_LOSS}", title_fontsize=8)
    for ax in axes[0, 1:]:
        _r_axis(ax)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)
