"""The pictures of winsorised SGD."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import figures
from .claims import interval
from .data import DATASETS
from .line import Line
from .section import curve


def draw_epochs(
    table: pd.DataFrame, sets: Iterable[str], quantities: Mapping[str, str], lines: Mapping[str, Line], path: Path
) -> None:
    """Accuracies against epochs, a row of panels for each data set."""
    sets, keys = [data for data in sets if data in set(table["data"])], ("pristine", "corrupt", "test")
    figure, axes = figures.grid(len(sets), len(keys), (12, 3.4 * len(sets) + 0.6))
    for data, row in zip(sets, axes, strict=True):
        for ax, key in zip(row, keys, strict=True):
            for method, line in lines.items():
                runs = table[(table["data"] == data) & (table["method"] == method)]
                if len(runs):
                    figures.band(ax, curve(runs, key), line)
            ax.set_xlabel("epoch")
            _labelled(ax, data, quantities[key])
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def draw_shares(
    table: pd.DataFrame, sets: Iterable[str], quantities: Mapping[str, str], lines: Mapping[str, Line], path: Path
) -> None:
    """Accuracies after the last epoch against the share of random labels, a row of panels for each data set."""
    sets, keys = [data for data in sets if data in set(table["data"])], ("train", "corrupt", "test")
    figure, axes = figures.grid(len(sets), len(keys), (12, 3.4 * len(sets) + 0.6))
    last = table.groupby(["data", "share", "method", "seed"], as_index=False).tail(1)
    for data, row in zip(sets, axes, strict=True):
        for ax, key in zip(row, keys, strict=True):
            for place, (method, line) in enumerate(lines.items()):
                runs = last[(last["data"] == data) & (last["method"] == method)].dropna(subset=[key])
                shares = sorted(set(runs["share"]))
                if shares:
                    ends = [interval(runs[runs["share"] == share][key].to_numpy(float)) for share in shares]
                    mean, low, high = (np.array(each, float) for each in zip(*ends, strict=True))
                    at = np.array(shares) + 0.006 * (place - len(lines) / 2)  # bars beside each other
                    style = {"color": line.color, "linestyle": line.style, "linewidth": 1.3, "marker": line.marker}
                    ax.errorbar(at, mean, (mean - low, high - mean), label=line.label, capsize=2, **style)
            ax.set_xlabel("share of random labels")
            figures.percent_axis(ax, x=True)
            _labelled(ax, data, quantities[key])
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def _labelled(ax: Any, data: str, label: str) -> None:
    ax.set_ylabel(label)
    ax.set_title(DATASETS[data].line.label if data in DATASETS else data, fontsize=10)
    ax.set_ylim(0, 1.02)
    figures.percent_axis(ax)
