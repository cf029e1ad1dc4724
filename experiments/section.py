"""What an experiment has to say: claims, tables and figures, and the arithmetic over seeds that they share."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the theory, and whether the data just measured bear it out."""

    text: str
    holds: bool | None  # None: not enough was measured to say
    detail: str

    @property
    def verdict(self) -> str:
        """yes, no, or not measured."""
        return {True: "yes", False: "no", None: "not measured"}[self.holds]


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
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """The seeds that occur, in order."""
    return sorted({row["seed"] for row in rows})


def select(rows: Iterable[Row], **where: Any) -> list[Row]:
    """The rows whose fields equal those given, in the order of steps."""
    found = [row for row in rows if all(row[name] == value for name, value in where.items())]
    return sorted(found, key=lambda row: row["step"])


def number(row: Row, path: str | tuple[str, ...]) -> float:
    """The number at a path such as "train/r" or ("train", "r"); NaN where it was not finite."""
    value: Any = row
    for part in path.split("/") if isinstance(path, str) else path:
        value = value[part]
    return float("nan") if value is None else float(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; 0 for one seed."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0


def curve(rows: Iterable[Row], path: str | tuple[str, ...], **where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(epochs, means, standard deviations over seeds) of a quantity, at the checkpoints that all seeds reached."""
    runs = [select(rows, seed=seed, **where) for seed in seeds_of(select(rows, **where))]
    length = min((len(run) for run in runs), default=0)
    values = np.array([[number(row, path) for row in run[:length]] for run in runs]).reshape(len(runs), length)
    epochs = np.array([row["epoch"] for row in runs[0][:length]]) if runs else np.zeros(0)
    deviation = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(length)
    return epochs, values.mean(0) if runs else np.zeros(0), deviation


def with_spread(values: Sequence[float], form: str = "{:.3g}") -> str:
    """The mean ± the deviation, or the one value, as text."""
    mean, deviation = spread(values)
    text = form.format(mean)
    return f"{text} ± {form.format(deviation)}" if len(values) > 1 else text
