"""The pictures of the reports."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from experiments.section import Row, curve, number

_STYLE = {
    "real": ("tab:blue", "real labels"),
    "random": ("tab:red", "random labels"),
    "sgd": ("black", "SGD"),
    "mean3": ("tab:gray", "mean of 3 (control)"),
    "m3": ("tab:blue", "M3, median of 3"),
    "rm3": ("tab:cyan", "RM3, rolling median"),
    "ra3": ("tab:orange", "RA3, rolling mean"),
}
# The most tensors that have a line each.
_MOST_LINES = 20
_DASHES = {"mean3": "--", "ra3": "--"}


def _band(ax: Any, x: np.ndarray, mean: np.ndarray, deviation: np.ndarray, key: str) -> None:
    """A line and, where there is a spread, its band of one standard deviation."""
    color, label = _STYLE[key]
    ax.plot(x, mean, color=color, label=label, linestyle=_DASHES.get(key, "-"), marker=".", markersize=3, linewidth=1.3)
    if deviation.any():
        ax.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)


def _epoch_axis(ax: Any, epochs: np.ndarray) -> None:
    """Epochs on a logarithmic axis that has 0 as well."""
    positive = epochs[epochs > 0]
    if positive.size:
        least, most = float(positive.min()), float(positive.max())
        ax.set_xscale("symlog", linthresh=least, linscale=0.5)
        ax.set_xticks([0, *10.0 ** np.arange(np.ceil(np.log10(least)), np.log10(most) + 1e-9)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("epoch")


def _log_axis(ax: Any) -> None:
    """A logarithmic axis of plain numbers, those between decades too where it is about one decade long."""
    ax.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _orthogonal(ax: Any) -> None:
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.annotate("orthogonal limit", (0.02, 1), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)


def _bottom(values: Iterable[float]) -> float:
    """A lower end for an axis of r that shows the orthogonal limit."""
    return 0.7 * min(1.0, *values)


def coherence(rows: list[Row], counts: dict[str, int], path: Path) -> None:
    """r against epoch and against training loss, and accuracy, for the training and the test sample."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.8), layout="constrained")
    for (sample, name), line in zip((("train", "training"), ("test", "test")), axes, strict=True):
        lowest = [1.0]
        for labels in sorted({row["labels"] for row in rows}):
            epochs, r, spread = curve(rows, f"{sample}/r", labels=labels)
            _, loss, loss_spread = curve(rows, "train/loss", labels=labels)
            _, accuracy, accuracy_spread = curve(rows, f"{sample}/accuracy", labels=labels)
            lowest += r.tolist()
            _band(line[0], epochs, r, np.minimum(spread, 0.9 * r), labels)
            _band(line[1], loss, r, np.zeros_like(r), labels)
            if spread.any():
                color = _STYLE[labels][0]
                low = np.minimum(spread, 0.9 * r)
                line[1].errorbar(
                    loss, r, yerr=(low, spread), xerr=loss_spread, fmt="none", ecolor=color, alpha=0.35, linewidth=1
                )
            _band(line[2], epochs, accuracy, accuracy_spread, labels)
            for ax in (line[0], line[2]):
                _epoch_axis(ax, epochs)
        for ax in line[:2]:
            ax.set_yscale("log")
            ax.set_ylim(bottom=_bottom(lowest))
            _log_axis(ax)
            ax.set_ylabel(f"m-coherence r, {name} sample\n(m = {counts[sample]}) [examples]")
            _orthogonal(ax)
        line[1].set_xlabel("training loss [nats] (training goes to the right)")
        line[1].invert_xaxis()
        line[2].set_ylabel(f"accuracy, {name} sample\n(labels as given)")
        line[2].yaxis.set_major_formatter(PercentFormatter(1))
        line[2].set_ylim(0, 1.02)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    axes[0, 0].legend(loc="upper right", fontsize=9)
    _save(figure, path)


def _by_module(row: Row) -> Row:
    """The same with tensors of one module taken together: α = Σ share · α / Σ share, where there are gradients."""
    shares: dict[str, float] = {}
    parts: dict[str, float] = {}
    for tensor in row["per_tensor"]:
        module = tensor.split("/")[0]
        share, alpha = (number(row, ("per_tensor", tensor, name)) for name in ("share", "alpha"))
        shares[module] = shares.get(module, 0.0) + share
        parts[module] = parts.get(module, 0.0) + (0.0 if share == 0 else share * alpha)
    count = row["train"]["count"]
    r = {module: count * parts[module] / share if share else float("nan") for module, share in shares.items()}
    return row | {"per_tensor": {module: {"r": value} for module, value in r.items()}}


def per_tensor(rows: list[Row], path: Path) -> None:
    """r of every tensor, or of every module where those are many, against epochs, real labels beside random ones."""
    if len(rows[0]["per_tensor"]) > _MOST_LINES:
        rows = [_by_module(row) for row in rows]
    kinds = sorted({row["labels"] for row in rows}, reverse=True)
    tensors = list(rows[0]["per_tensor"])
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.5 * len(kinds), 4), layout="constrained", sharey=True, squeeze=False
    )
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(tensors)))
    for ax, labels in zip(axes[0], kinds, strict=True):
        for tensor, color in zip(tensors, colors, strict=True):
            epochs, r, _ = curve(rows, ("per_tensor", tensor, "r"), labels=labels)
            ax.plot(epochs, r, color=color, label=tensor, marker=".", markersize=3, linewidth=1.2)
            _epoch_axis(ax, epochs)
        _log_axis(ax)
        _orthogonal(ax)
        ax.set_title(_STYLE[labels][1], fontsize=10)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("m-coherence r of the part,\ntraining sample [examples]")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    _save(figure, path)


def noise(rows: list[Row], path: Path) -> None:
    """Accuracies and the gap against epochs, one line for each method."""
    panels = (
        ("pristine", "accuracy on pristine examples"),
        ("corrupt", "accuracy on corrupt examples,\nas labelled (memorised)"),
        ("corrupt_true", "accuracy on corrupt examples,\ntrue label"),
        ("test", "test accuracy"),
        ("gap", "generalisation gap\n(training as labelled − test)"),
        ("loss", "training loss [nats]"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.8), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for ax, (key, label) in zip(axes.flat, panels, strict=True):
        for method in methods:
            _band(ax, *curve(rows, key, method=method), key=method)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
        if key != "loss":
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        if key not in ("loss", "gap"):
            chance = rows[0]["chance"]
            ax.axhline(chance, color="black", linestyle="--", linewidth=1)
            ax.annotate("chance", (0.98, chance + 0.01), xycoords=("axes fraction", "data"), ha="right", fontsize=8)
            ax.set_ylim(0, 1.02)
    axes[0, 0].legend(fontsize=8, loc="center right")
    _save(figure, path)
