"""What a run of `robust` has to say: claims, tables and figures of every cell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from . import figures
from .claims import Result, interval
from .comparison import BY_EXAMPLE, SELECTED, TUNED, ComparisonConfig, reported
from .configs import described
from .methods import METHODS
from .moments import claims, in_percent, moments, of_method
from .seconds import seconds_of
from .section import Figure, Row, Section, Table, curve, frame

_SIZE = (14.0, 8.0)
_COLUMNS = 4


def section(config: ComparisonConfig, labels: Mapping[str, str], rows: list[Row], folder: Path) -> Section:
    """The claims, tables and figures of the cells, by their labels, from the trainings that were finished."""
    cells = {cell: _finished(config, cell, rows) for cell in labels}
    cells = {cell: table for cell, table in cells.items() if len(table)}
    results: list[Result] = []
    tables = [_rates(config, rows)] if any(row.get("tuning") for row in rows) else []
    for when, title in _AGAINST.items() if cells else ():
        tables.append(_against_control(labels, cells, when, title))
    seconds = seconds_of(folder.parent)
    for cell, table in cells.items():
        results += claims(table, f"{labels[cell].capitalize()}: ")
        tables.append(_table(labels[cell], config.methods, table, seconds))
    pictures: tuple[Figure, ...] = ()
    if cells:
        _draw_dots(labels, cells, _ACCURACIES, folder / "accuracy.png")
        _draw_curves(labels, cells, folder / "curves.png")
        pictures = (Figure("accuracy.png", _ACCURACY), Figure("curves.png", _CURVES))
        if _panels(cells, _LOSSES):
            _draw_dots(labels, cells, _LOSSES, folder / "memorised.png")
            pictures = (pictures[0], Figure("memorised.png", _MEMORISED), pictures[1])
    return Section(config.name, "Robust averages under label noise", _text(config), (*results,), (*tables,), pictures)


def _finished(config: ComparisonConfig, cell: str, rows: Sequence[Row]) -> pd.DataFrame:
    """The rows of a cell's finished trainings, of the seeds for which all methods of ordinary cost have finished."""
    table = frame(row for row in reported(rows) if row["cell"] == cell)
    if table.empty:
        return table
    last = table.groupby(["method", "seed"])["epoch"].max()
    done = set(last[last >= config.epochs].index)
    wanted = [method for method in config.methods if not METHODS[method].dear] or config.methods
    seeds = {seed for _, seed in done if all((method, seed) in done for method in wanted)}
    kept = [run in done and run[1] in seeds for run in zip(table["method"], table["seed"], strict=True)]
    return pd.DataFrame(table[kept])


def _text(config: ComparisonConfig) -> tuple[str, ...]:
    return (
        f"The network {config.model} is trained on {config.data} by every method, from the same start and in the same "
        f"order of examples, in mini-batches of {config.batch_size}. {config.validation:.0%} of the training examples "
        f"are held out. {SELECTED}",
        "Labels are redrawn uniformly from all classes, which leaves nine tenths of the redrawn wrong where there are "
        "ten classes; or those of each class become those of one other, on a cycle through all classes that is drawn "
        "with the seed. Where a class is rare, most training examples of class 0 were left out.",
        TUNED.format(rates=", ".join(f"{rate:g}" for rate in config.learning_rates))
        + " That is done without wrong labels, for settings that have none, and with 40% redrawn, for the rest.",
        BY_EXAMPLE.format(batch=3 * config.batch_size),
        "Many claims are judged here, each by its own 95% interval: of forty without any effect, two would still show "
        "one.",
        described(config),
    )


def _rates(config: ComparisonConfig, rows: list[Row]) -> Table:
    """Validation accuracy of every learning rate, at its best epoch."""
    table = frame(row for row in rows if row.get("tuning"))
    lines = []
    for (cell, method), part in table.groupby(["cell", "method"], sort=False):
        best = part.groupby("learning_rate")["valid"].max().reindex(list(config.learning_rates))
        chosen = best.idxmax() if best.notna().any() else None
        cells = (f"{100 * value:.1f}{' *' if rate == chosen else ''}" for rate, value in best.items())
        lines.append((f"{cell}: {METHODS[str(method)].label}", *cells))
    heads = ("chosen on", *(f"{rate:g}" for rate in config.learning_rates))
    note = "Accuracy on the validation examples [%] at the best epoch, one seed that is not reported; * is chosen."
    return Table("Learning rates", heads, tuple(lines), note)


_AGAINST = {"selected": "At the selected epoch", "last": "At the last epoch"}
_CONTROL = "mean3"


def _against_control(labels: Mapping[str, str], cells: Mapping[str, pd.DataFrame], when: str, title: str) -> Table:
    """Test accuracy less that of the mean of the same batch, by method and cell."""
    lines = []
    for method in METHODS:
        texts = [_difference(table, method, when) for table in cells.values()]
        if method != _CONTROL and any(texts):
            lines.append((METHODS[method].label, *(text or "not measured" for text in texts)))
    note = f"Test accuracy less that of {METHODS[_CONTROL].label} [points], paired over seeds, with its 95% interval."
    return Table(f"{title}: against the control", ("method", *(labels[cell] for cell in cells)), tuple(lines), note)


def _difference(table: pd.DataFrame, method: str, when: str) -> str:
    at_moment, seeds = moments(table, when), table["seed"].nunique()
    mine, theirs = (of_method(each, at_moment, seeds) for each in (method, _CONTROL))
    if mine is None or theirs is None:
        return ""
    ends = interval(100 * (mine["test"] - theirs["test"]).to_numpy(float))
    return f"{ends.mean:+.1f}" + (f" [{ends.low:.1f}, {ends.high:.1f}]" if np.isfinite(ends.low) else "")


def _table(label: str, methods: Sequence[str], table: pd.DataFrame, seconds: Mapping[str, float]) -> Table:
    """Every method in one cell: what it took and what it got."""
    seeds, at = table["seed"].nunique(), {when: moments(table, when) for when in ("selected", "last", "learnt")}
    columns = [("selected", "test"), ("last", "test")]
    columns += [("last", "corrupt"), ("learnt", "corrupt")] if table["corrupt"].notna().any() else []
    columns += [("selected", "rare"), ("last", "rare")] if "rare" in table else []
    lines = []
    for method in methods:
        selected = of_method(method, at["selected"], seeds)
        if selected is None:
            lines.append((METHODS[method].label, "not measured", *("" for _ in range(len(columns) + 2))))
            continue
        cells = [of_method(method, at[when], seeds) for when, _ in columns]
        texts = [
            "not reached" if part is None else in_percent(part[key])
            for part, (_, key) in zip(cells, columns, strict=True)
        ]
        spent = f"{seconds[method]:.1f}" if method in seconds else ""
        rate, epoch = f"{selected['learning_rate'].iloc[0]:g}", f"{selected['epoch'].mean():.1f}"
        lines.append((METHODS[method].label, rate, spent, epoch, *texts))
    heads = ("method", "learning rate", "training [s]", "selected epoch", *(_HEADS[column] for column in columns))
    note = f"Means ± one deviation over {seeds} seed(s); seconds of the fastest training of the method in any setting."
    return Table(label.capitalize(), heads, tuple(lines), note)


_HEADS = {
    ("selected", "test"): "test, selected [%]",
    ("last", "test"): "test, last [%]",
    ("last", "corrupt"): "memorised, last [%]",
    ("learnt", "corrupt"): "memorised, 90% learnt [%]",
    ("selected", "rare"): "rare class, selected [%]",
    ("last", "rare"): "rare class, last [%]",
}

# What a moment is called and drawn as: a marker, filled or not.
_MOMENTS = {
    "selected": ("selected epoch", "o", True),
    "last": ("last epoch", "o", False),
    "learnt": ("90% of the right labels learnt", "D", True),
}
# (quantity, the axis, moments) of figures of points.
_Points = tuple[str, str, tuple[str, ...]]
_ACCURACIES: tuple[_Points, ...] = (("test", "test accuracy", ("selected", "last")),)
_LOSSES: tuple[_Points, ...] = (
    ("corrupt", "wrong labels memorised", ("learnt", "last")),
    ("rare", "accuracy on the rare class", ("selected", "last")),
)


class _Panel(NamedTuple):
    cell: str
    key: str
    axis: str
    moments: tuple[str, ...]


def _panels(cells: Mapping[str, pd.DataFrame], points: Sequence[_Points]) -> list[_Panel]:
    """All that have something to show."""
    return [
        _Panel(cell, *each)
        for each in points
        for cell, table in cells.items()
        if each[0] in table and table[each[0]].notna().any()
    ]


def _draw_dots(
    labels: Mapping[str, str], cells: Mapping[str, pd.DataFrame], points: Sequence[_Points], path: Path
) -> None:
    """A panel for each cell and quantity, a line for each method."""
    panels = _panels(cells, points)
    methods = [method for method in METHODS if any(method in set(table["method"]) for table in cells.values())]
    rows = -(-len(panels) // _COLUMNS)
    size = (_SIZE[0], 0.8 + _SIZE[1] / 2 * rows)
    figure, axes = figures.grid(rows, min(len(panels), _COLUMNS), size, share_y=True)
    for ax, panel in zip(axes.flat, panels, strict=False):
        for number, moment in enumerate(panel.moments):
            up = 0.3 * (number - (len(panel.moments) - 1) / 2)
            _dots(ax, cells[panel.cell], methods, panel.key, moment, up)
        ax.set_title(labels[panel.cell], fontsize=10)
        ax.set_xlabel(panel.axis)
        low, high = ax.get_xlim()  # an interval may leave what a share can be
        ax.set_xlim(max(low, -0.03), min(high, 1.03))
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.tick_params(axis="y", labelsize=9)
        figures.percent_axis(ax, x=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    axes[0, 0].set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    for word, marker, filled in [
        _MOMENTS[each] for each in dict.fromkeys(m for panel in panels for m in panel.moments)
    ]:
        axes[0, 0].plot([], [], marker, color="black", markerfacecolor="black" if filled else "none", label=word)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def _dots(ax: Any, table: pd.DataFrame, methods: Sequence[str], key: str, moment: str, up: float) -> None:
    """Mean and 95% interval of every method that reached a moment with every seed."""
    at_moment, seeds = moments(table, moment), table["seed"].nunique()
    _, marker, filled = _MOMENTS[moment]
    for y, method in enumerate(methods):
        lines = of_method(method, at_moment, seeds)
        if lines is None:
            continue
        ends, color = interval(lines[key].to_numpy(float)), METHODS[method].line.color
        if np.isfinite(ends.low):
            ax.plot([ends.low, ends.high], [y + up, y + up], color=color, linewidth=1, alpha=0.6)
        ax.plot(ends.mean, y + up, marker, color=color, markersize=5, markerfacecolor=color if filled else "white")


def _draw_curves(labels: Mapping[str, str], cells: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Test accuracy against epochs, a panel for each cell; the legend has a panel of its own."""
    rows = -(-(len(cells) + 1) // _COLUMNS)
    size = (_SIZE[0], 0.8 + _SIZE[1] / 2 * rows)
    figure, axes = figures.grid(rows, min(len(cells) + 1, _COLUMNS), size)
    for ax, (cell, table) in zip(axes.flat, cells.items(), strict=False):
        for method in [name for name in METHODS if name in set(table["method"])]:
            along, line = curve(table[table["method"] == method], "test"), METHODS[method].line
            ax.plot(along.epoch, along.mean, label=line.label, **figures.style(line))
        ax.set_title(labels[cell], fontsize=10)
        ax.set_xlabel("epoch")
        best = max(curve(table[table["method"] == method], "test").mean.max() for method in table["method"].unique())
        ax.set_ylim(max(0.0, best - 0.4), best + 0.02)
        figures.percent_axis(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy")
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    widest = max(axes.flat[: len(cells)], key=lambda ax: len(ax.get_lines()))
    axes.flat[len(cells)].legend(*widest.get_legend_handles_labels(), loc="center left", fontsize=9, frameon=False)
    figures.save(figure, path)


_ACCURACY = (
    "Test accuracy by method, a panel for each way to spoil the training set: at the epoch that the validation examples"
    " select (filled) and at the last (hollow). Points are means over seeds, bars their 95% intervals."
)
_MEMORISED = (
    "The share of the wrong labels that the network has memorised, at the last epoch (hollow) and where 90% of the "
    "right ones are learnt (diamonds; none where not every seed got there); and the accuracy on test examples of the "
    "class of which most training examples were left out. Points are means over seeds, bars their 95% intervals."
)
_CURVES = "Test accuracy against epochs, means over seeds. Each panel shows the 42 points below the best."
