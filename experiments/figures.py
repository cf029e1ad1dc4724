"""What the pictures of the reports have in common: lines with intervals, axes, panels."""

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .line import Line
from .section import Curve, Row, curve, frame

# The most tensors that have a line each.
_MOST_LINES = 20
_SIZE = (12, 6.8)  # inches
_INTERVALS = "95% interval over seeds"
_STYLES, _SHAPES = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "X", "P")


def grid(
    rows: int, columns: int, size: tuple[float, float] = _SIZE, *, share_y: bool | Literal["row"] = False
) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], each with a light grid."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout=_layout(), squeeze=False, sharey=share_y)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    return figure, axes


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)  # inches


def save(figure: Any, path: Path) -> None:
    """Write a PNG whose bytes depend on nothing but the figure, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def legend(figure: Any, *axes: Any, columns: int = 6) -> None:
    """One legend above all panels, of the lines of some of them, each label once, and what their bands are."""
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if any(len(path.vertices) for ax in axes for part in ax.collections for path in part.get_paths()):
        entries[_INTERVALS] = Patch(color="black", alpha=0.2, linewidth=0)
    rows = -(-len(entries) // columns)
    columns = -(-len(entries) // max(rows, 1))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns, fontsize=9)


def legend_above(ax: Any) -> None:
    """A legend of one panel's own lines above it; two in a row."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)


def style(line: Line) -> dict[str, Any]:
    """How `plot` draws a line: its markers are a part of the picture's width apart, however many points there are."""
    look = {"color": line.color, "linestyle": line.style, "marker": line.shape}
    size = 7 if line.shape == "*" else 4
    return look | {"markersize": size, "markeredgewidth": 0, "markevery": 0.06, "linewidth": 1.3}


def series(labels: Iterable[str]) -> list[Line]:
    """Lines of an ordered quantity, such as widths: from dark to light, each with a style and a marker."""
    names = list(labels)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.88, len(names)))
    looks = zip(names, shades, itertools.cycle(_STYLES), itertools.cycle(_SHAPES), strict=False)
    return [Line(label, to_hex(shade), dashes, marker) for label, shade, dashes, marker in looks]


def band(ax: Any, along: Curve, line: Line) -> None:
    """A mean against epochs and, where there are several seeds, the band of its 95% interval."""
    ax.plot(along.epoch, along.mean, label=line.label, **style(line))
    if np.isfinite(along.low).any():
        ax.fill_between(along.epoch, along.low, along.high, color=line.color, alpha=0.2, linewidth=0)


def against(ax: Any, x: Curve, y: Curve, line: Line) -> None:
    """A mean against another mean, with bars of both 95% intervals."""
    ax.plot(x.mean, y.mean, label=line.label, **style(line))
    if np.isfinite(y.low).any():
        errors = {name: (c.mean - c.low, c.high - c.mean) for name, c in (("xerr", x), ("yerr", y))}
        ax.errorbar(x.mean, y.mean, **errors, fmt="none", ecolor=line.color, alpha=0.3, linewidth=0.8)


def epoch_axis(ax: Any, epochs: np.ndarray) -> None:
    """Epochs on a logarithmic axis that has 0 as well."""
    positive = epochs[epochs > 0]
    if positive.size:
        least, most = float(positive.min()), float(positive.max())
        ax.set_xscale("symlog", linthresh=least, linscale=0.5)
        ax.set_xticks([0, *10.0 ** np.arange(np.ceil(np.log10(least)), np.log10(most) + 1e-9)])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("epoch")


def _plain(value: float, _: int = 0) -> str:
    """A number as it is written; very large and very small ones as powers of ten."""
    if value and not 1e-4 <= abs(value) < 1e7:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = round(value / 10.0**power, 3)
        return rf"$10^{{{power}}}$" if factor == 1 else rf"${factor:g}\cdot10^{{{power}}}$"
    return f"{value:,.10g}".replace("-", "−")


def log_axis(ax: Any, *, x: bool = False) -> None:
    """A logarithmic axis, that of y or that of x, of plain numbers; those between decades too where it is short."""
    (ax.set_xscale if x else ax.set_yscale)("log")
    plain, axis = FuncFormatter(_plain), ax.xaxis if x else ax.yaxis
    low, high = ax.get_xlim() if x else ax.get_ylim()
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain if max(low, high) < 20 * min(low, high) else NullFormatter())


def coherence_axis(ax: Any, sample: str, means: Iterable[float]) -> None:
    """A logarithmic axis of r that shows the orthogonal limit and every mean; intervals may leave it."""
    shown = [value for value in means if np.isfinite(value) and value > 0]
    ax.set_yscale("log")
    ax.set_ylim(0.7 * min(1.0, *shown), 1.5 * max(1.0, *shown))
    log_axis(ax)
    ax.set_ylabel(f"m-coherence r, {sample} [examples]")
    _orthogonal(ax)


def percent_axis(ax: Any, *, x: bool = False) -> None:
    """An axis of shares, the one of y or that of x, in per cent."""
    percent = FuncFormatter(lambda value, _: f"{_plain(round(100 * value, 6))}%")
    (ax.xaxis if x else ax.yaxis).set_major_formatter(percent)


def chance(ax: Any, level: float) -> None:
    """An axis of accuracies from 0 to 1, with the level of guessing."""
    ax.axhline(level, color="black", linestyle=":", linewidth=1, label="chance")
    ax.set_ylim(0, 1.02)


def _orthogonal(ax: Any) -> None:
    ax.axhline(1, color="black", linestyle=":", linewidth=1, label="orthogonal limit")


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _by_module(row: Row) -> Row:
    """The same with tensors of one module taken together: α = Σ share · α / Σ share, where there are gradients."""
    shares: dict[str, float] = {}
    parts: dict[str, float] = {}
    for tensor in row["per_tensor"]:
        module = tensor.split("/")[0]
        share, alpha = (_number(row["per_tensor"][tensor][name]) for name in ("share", "alpha"))
        shares[module] = shares.get(module, 0.0) + share
        parts[module] = parts.get(module, 0.0) + (0.0 if share == 0 else share * alpha)
    count = row["train"]["count"]
    r = {module: count * parts[module] / share if share else float("nan") for module, share in shares.items()}
    return row | {"per_tensor": {module: {"r": value} for module, value in r.items()}}


def per_tensor(rows: list[Row], key: str, lines: Mapping[str, Line], path: Path) -> None:
    """r of every tensor, or of every module where those are many, against epochs; a panel for each value of `key`."""
    if len(rows[0]["per_tensor"]) > _MOST_LINES:
        rows = [_by_module(row) for row in rows]
    table, tensors = frame(rows), list(rows[0]["per_tensor"])
    kinds = [kind for kind in lines if kind in set(table[key])]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.5 * len(kinds), 4), layout=_layout(), sharey=True, squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        for line in series(tensors):
            along = curve(table[table[key] == kind], f"per_tensor/{line.label}/r", log=True)
            ax.plot(along.epoch, along.mean, label=line.label, **style(line))
            epoch_axis(ax, along.epoch)
        log_axis(ax)
        _orthogonal(ax)
        ax.set_title(lines[kind].label, fontsize=10)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("m-coherence r of the part,\ntraining sample [examples]")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save(figure, path)
