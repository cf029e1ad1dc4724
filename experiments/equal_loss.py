"""What several experiments measure of a training, and its values where the training loss is the same."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import pandas as pd

from .claims import interval
from .examples import Examples, Guesses
from .section import Curve, Row


def trained(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Coherence, loss and accuracy of the training sample, and the accuracy on the test sample, each to six digits."""
    coherence, seen = examples.measure("train", model, params)
    return _rounded(
        r=coherence.m_coherence,
        alpha=coherence.alpha,
        loss=coherence.loss,
        accuracy=_accuracy(seen),
        test_accuracy=_accuracy(examples.guess("test", model, params)),
    )


def measured(examples: Examples, model: nn.Module, params: Any) -> Row:
    """The same and the loss on the test sample."""
    held_out, _ = examples.measure("test", model, params)
    return trained(examples, model, params) | _rounded(test_loss=held_out.loss)


def _accuracy(seen: Guesses) -> float:
    return float((seen.guess == seen.labels).mean())


def _rounded(**values: Any) -> Row:
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def shown(row: Row) -> dict[str, str]:
    """What the progress bar says of what was measured."""
    return {"loss": f"{row['loss']:.3f}", "r": f"{row['r']:.1f}"}


def with_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The same with the generalisation gaps in accuracy, training less test, and in loss, test less training."""
    gaps = {"gap": table["accuracy"] - table["test_accuracy"]}
    if "test_loss" in table:
        gaps["loss_gap"] = table["test_loss"] - table["loss"]
    return table.assign(**gaps)


def at_losses(run: pd.DataFrame, column: str, losses: Sequence[float], *, log: bool = False) -> list[float]:
    """A column where the training loss first falls through each of `losses`; NaN where it does not.

    Interpolated between measurements, or its logarithm is.
    """
    values, falling = run[column].to_numpy(float), run["loss"].to_numpy(float)
    with np.errstate(all="ignore"):
        values = np.log(values) if log else values
    found = [_crossing(falling, values, loss) for loss in losses]
    return np.exp(found).tolist() if log else found


def _crossing(falling: np.ndarray, values: np.ndarray, loss: float) -> float:
    before, after = falling[:-1], falling[1:]
    (through,) = np.nonzero((after <= loss) & (loss <= before) & (after < before))
    if not through.size:
        return float("nan")
    i = through[0]
    return float(values[i] + (before[i] - loss) / (before[i] - after[i]) * (values[i + 1] - values[i]))


def by_seed_at(table: pd.DataFrame, column: str, losses: Sequence[float], *, log: bool = False) -> pd.DataFrame:
    """The same for the run of each seed, [losses, seed]."""
    runs = table.groupby("seed") if len(table) else ()
    return pd.DataFrame({seed: at_losses(run, column, losses, log=log) for seed, run in runs}, index=[*losses])


def curve_of(values: pd.DataFrame, *, log: bool = False) -> Curve:
    """Means with intervals of values [x, seed], along the x that every seed has; geometric ones with `log`."""
    values = values.dropna()
    each = values.to_numpy(float).T
    ends = interval(np.log(each) if log else each)
    return Curve(values.index.to_numpy(float), *(np.exp(end) if log else end for end in ends))
