"""What an experiment has to say: claims, tables and figures; and its measurements as a table."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .claims import Result, interval

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under column heads."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture in the run's figures folder."""

    file: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """One experiment's part of a report."""

    name: str
    title: str
    paragraphs: tuple[str, ...]
    claims: tuple[Result, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line for each measurement in the order of steps, columns such as "train/r"; NaN where none was finite."""
    table = pd.json_normalize([*rows], sep="/")
    return table.sort_values("step", kind="stable", ignore_index=True) if len(table) else table


def by_seed(table: pd.DataFrame, column: str, index: str = "epoch") -> pd.DataFrame:
    """A column as [index, seed], at the values of `index` that all seeds reached; of one training for each seed."""
    complete = table.groupby(index)["seed"].nunique() == table["seed"].nunique()
    wide = table.pivot(index=index, columns="seed", values=column).astype(float)
    return wide[complete]


class Curve(NamedTuple):
    """A mean over seeds along training, with the ends of its 95% interval (NaN for one seed)."""

    epoch: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(table: pd.DataFrame, column: str, *, log: bool = False) -> Curve:
    """The curve of a column; with `log` a geometric mean and the interval of the logarithms, for logarithmic axes."""
    wide = by_seed(table, column)
    values = wide.to_numpy().T
    with np.errstate(all="ignore"):
        ends = interval(np.log(values) if log else values)
        return Curve(wide.index.to_numpy(float), *(np.exp(end) if log else end for end in ends))
