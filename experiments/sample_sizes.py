"""How m-coherence r and α_unbiased depend on the size m of the sample, on the same parameters."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

import cg_jax as cg

from . import figures, models
from .claims import Claim, Result, interval
from .label_order import LINES, kinds
from .section import Curve

# α_unbiased is called constant where its mean ratio over seeds is within this factor.
_MARGIN = 1.25


@functools.cache
def _steps(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The jitted sums over the gradients of one batch, and those added to earlier sums."""
    moments = cg.grad_moments(models.loss_of(model))

    def first(params: Any, images: jax.Array, labels: jax.Array, rows: jax.Array) -> cg.GradMoments:
        return moments(params, (images[rows], labels[rows]))

    def more(before: cg.GradMoments, *arguments: Any) -> cg.GradMoments:
        return cg.merge(before, first(*arguments))

    return jax.jit(first), jax.jit(more)


def coherence_by_size(
    model: nn.Module, params: Any, sample: tuple[jax.Array, jax.Array], sizes: Sequence[int], seed: int, batch_size: int
) -> dict[int, cg.Coherence]:
    """Exact coherence of nested parts of a sample, and of the whole of it, by one pass over its gradients.

    The parts are the first examples of the sample in an order that is drawn from the seed.
    """
    order = np.random.default_rng(seed).permutation(len(sample[1]))
    ends = sorted({*sizes, order.size})
    first, more = _steps(model)
    moments, found = None, dict[int, cg.Coherence]()
    for begin, end in itertools.pairwise([0, *ends]):
        for start in range(begin, end, batch_size):
            arguments = (models.with_state(params)[0], *sample, order[start : min(start + batch_size, end)])
            moments = first(*arguments) if moments is None else more(moments, *arguments)
        assert moments is not None
        found[end] = jax.device_get(cg.coherence(moments))
    return found


def _at(table: pd.DataFrame, epoch: float) -> pd.DataFrame:
    """The rows of the measurement that is nearest to an epoch, in its logarithm; the start is its own."""
    epochs = table["epoch"].unique()
    if epoch > 0:
        epochs = epochs[epochs > 0]
        return table[table["epoch"] == epochs[np.abs(np.log(epochs / epoch)).argmin()]]
    return table[table["epoch"] == 0]


def _by_size(table: pd.DataFrame, quantity: str, sizes: Sequence[int]) -> pd.DataFrame:
    """A quantity [size, seed] of the rows of one measurement."""
    return pd.DataFrame({size: table.set_index("seed")[f"sizes/{size}/{quantity}"] for size in sizes}).astype(float).T


def claims(table: pd.DataFrame, sizes: Sequence[int]) -> list[Result]:
    """Real labels: r grows with m and α_unbiased does not; after about one epoch, and at the end."""
    real = table[table["labels"] == "real"]
    small, large = sizes[0], sizes[-1]
    out: list[Result] = []
    for when, epoch in (("After about one epoch", 1.0), ("At the end", float(real["epoch"].max()))):
        part = _at(real, epoch)
        detail = f"Measured at epoch {part['epoch'].iloc[0]:.3g}."
        r, unbiased = (_by_size(part, quantity, sizes) for quantity in ("r", "alpha_unbiased"))
        with np.errstate(all="ignore"):
            moves = [(each.T[large] / each.T[small]).map(np.log).abs() for each in (r, unbiased)]
        claim = Claim(
            f"{when} on real labels, r moves more with m than α_unbiased does.",
            f"|log of the ratio, m = {large:,} over m = {small:,}| of r less that of α_unbiased",
            "nats",
            1,
        )
        out.append(claim.compared(moves[0], moves[1], detail=detail))
        if epoch == 1.0:
            out += _early(r, unbiased, (small, large), detail)
    return out


def _early(r: pd.DataFrame, unbiased: pd.DataFrame, ends: tuple[int, int], detail: str) -> list[Result]:
    """r grows; α_unbiased stays within a factor on either side."""
    small, large = ends
    over = f"m = {large:,} over m = {small:,}"
    grows = Claim("After about one epoch on real labels, r is larger on more examples.", f"r, {over}", "×", 1, "ratio")
    change = unbiased.T[large] / unbiased.T[small]
    below = Claim(
        f"After about one epoch on real labels, α_unbiased rises with m by less than a factor of {_MARGIN}.",
        f"α_unbiased, {over}, over {_MARGIN}",
        "×",
        -1,
        "ratio",
    )
    above = Claim(
        f"After about one epoch on real labels, α_unbiased falls with m by less than a factor of {_MARGIN}.",
        f"α_unbiased, {over}, times {_MARGIN}",
        "×",
        1,
        "ratio",
    )
    return [
        grows.compared(r.T[large], r.T[small], detail=detail),
        below.judged(change / _MARGIN, detail=detail),
        above.judged(change * _MARGIN, detail=detail),
    ]


_PANELS = (("r", "m-coherence r [examples]"), ("alpha_unbiased", "unbiased coherence\n(r − 1) / (m − 1)"))


def draw(table: pd.DataFrame, sizes: Sequence[int], path: Path) -> None:
    """r and α_unbiased against m: before training, after about one epoch, and at the end."""
    moments = (("start", 0.0), ("about one epoch", 1.0), ("end", float(table["epoch"].max())))
    figure, axes = figures.grid(2, len(moments), (12, 7.4), share_y="row")
    for line, (quantity, label) in zip(axes, _PANELS, strict=True):
        for ax, (when, epoch) in zip(line, moments, strict=True):
            part = _at(table, epoch)
            for labels in kinds(part):
                values = _by_size(part[part["labels"] == labels], quantity, sizes)
                figures.band(ax, _along(values, log=quantity == "r"), LINES[labels])
            ax.set_title(f"{when} (epoch {part['epoch'].iloc[0]:.3g})", fontsize=10)
            _axes(ax, quantity, sizes)
        line[0].set_ylabel(label)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def _along(values: pd.DataFrame, *, log: bool) -> Curve:
    with np.errstate(all="ignore"):
        ends = interval(np.log(values.T.to_numpy()) if log else values.T.to_numpy())
        return Curve(values.index.to_numpy(float), *(np.exp(end) if log else end for end in ends))


def _axes(ax: Any, quantity: str, sizes: Sequence[int]) -> None:
    """Sizes on a logarithmic axis; r on one too; α_unbiased on one that has 0 and what is below."""
    ax.set_xscale("log")
    ax.set_xticks(sizes, labels=[f"{size:,}" for size in sizes], rotation=45)
    ax.minorticks_off()
    ax.set_xlabel("examples m of the training sample")
    if quantity == "r":
        figures.log_axis(ax)
        ax.axhline(1, color="black", linestyle=":", linewidth=1, label="orthogonal limit")
    else:
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.axhline(0, color="black", linestyle=":", linewidth=1)
