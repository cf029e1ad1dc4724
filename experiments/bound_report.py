"""Theorem 1 from what was measured: the bound along every run, claims, a table and a figure."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import cg_jax as cg

from . import figures
from .claims import Claim, Result, with_spread
from .configs import Config, described
from .line import Line
from .section import Curve, Figure, Row, Section, Table, curve, frame


class Labels(NamedTuple):
    """A kind of labels: the share of them, in training and test alike, that is drawn at random."""

    share: float
    line: Line


LABELS = {
    "real": Labels(0.0, Line("real labels", "tab:blue")),
    "half": Labels(0.5, Line("50% random labels", "tab:purple", "-.")),
    "random": Labels(1.0, Line("random labels", "tab:red", "--")),
}


def log10_bounds(
    steps: np.ndarray, alphas: np.ndarray, rate: float, *, lipschitz: float, smoothness: float, size: int
) -> np.ndarray:
    """log₁₀ of the bound of Theorem 1 at every measured step; −∞ at step 0.

    α between two measured steps is interpolated linearly. The sum over the steps of an interval is that of
    `cg.generalization_bound`; what was summed before it grows by (1 + ηβ) at each of its steps. In logarithms, since
    the bound leaves the range of float64.
    """
    total, growth, out = -np.inf, np.log1p(rate * smoothness), [-np.inf]
    of_theorem = functools.partial(
        cg.generalization_bound, learning_rates=rate, lipschitz=lipschitz, smoothness=smoothness, num_examples=size
    )
    for i in range(1, len(steps)):
        alpha = np.interp(np.arange(steps[i - 1], steps[i]), steps, np.clip(alphas, 0, 1))
        with np.errstate(divide="ignore"):
            added = np.log(of_theorem(alpha))
        total = np.logaddexp(total + len(alpha) * growth, added)
        out.append(total)
    return np.array(out) / np.log(10)


def with_bounds(table: pd.DataFrame, rate: float) -> pd.DataFrame:
    """The table with the gap and with log₁₀ of the bound along every run, twice.

    "bound": with L and β the largest of that run. "bound_common": with the largest of the runs of that seed and size,
    whatever the labels, so that labels tell by α alone.
    """
    table = table.assign(gap=table["test/loss"] - table["train/loss"])
    for name, keys in (("bound", ["size", "seed", "labels"]), ("bound_common", ["size", "seed"])):
        largest = table.groupby(keys)[["lipschitz", "smoothness"]].transform("max")
        for _, run in table.groupby(["size", "seed", "labels"]):
            size, constants = int(run["size"].iloc[0]), largest.loc[run.index[0]].to_dict()
            steps, alphas = run["step"].to_numpy(), run["train/alpha_unbiased"].to_numpy(float)
            table.loc[run.index, name] = log10_bounds(steps, alphas, rate, size=size, **constants)
    return table


def _last(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column at the last step [seed, (size, labels)]."""
    last = table[table["step"] == table["step"].max()]
    return last.pivot(index="seed", columns=["size", "labels"], values=column).astype(float)


def _ordered(values: pd.DataFrame) -> pd.Series:
    """The lesser of random less half and half less real, of each seed."""
    return pd.concat([values["random"] - values["half"], values["half"] - values["real"]], axis=1).min(axis=1)


def _at_equal_loss(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """log₁₀ of the bound, random and real, of each seed at the least training loss that its random run has reached."""
    random, real = {}, {}
    for seed, runs in table.groupby("seed"):
        one, other = (runs[runs["labels"] == labels] for labels in ("random", "real"))
        lowest = int(one["train/loss"].to_numpy(float).argmin())
        random[seed] = float(one["bound_common"].iloc[lowest])
        real[seed] = _at_loss(other, float(one["train/loss"].iloc[lowest]))
    return pd.Series(random), pd.Series(real)


def _at_loss(run: pd.DataFrame, loss: float) -> float:
    """log₁₀ of the bound when the training loss first falls to `loss`, interpolated; NaN if it does not get there."""
    losses, bounds = run["train/loss"].to_numpy(float), run["bound_common"].to_numpy(float)
    reached = np.flatnonzero(losses <= loss)
    if not reached.size or reached[0] == 0:
        return float("nan")
    i = reached[0]
    part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(bounds[i] if i == 1 else bounds[i - 1] + part * (bounds[i] - bounds[i - 1]))


_ORDERS = "orders of magnitude"


def claims(table: pd.DataFrame) -> list[Result]:
    """What Theorem 1 says of data, of m and of the gap."""
    sizes = sorted(int(size) for size in table["size"].unique())
    common, own, gap = (_last(table, column) for column in ("bound_common", "bound", "gap"))
    at_equal_loss = _at_equal_loss(table[table["size"] == sizes[0]])
    return [
        *_of_labels(sizes[0], sizes[-1], common, own, gap, at_equal_loss),
        *_of_sizes(sizes[0], sizes[-1], own, gap),
    ]


def _of_labels(
    least: int,
    most: int,
    common: Any,
    own: Any,
    gap: Any,
    at_equal_loss: tuple[pd.Series, pd.Series],
) -> list[Result]:
    """Random labels against real ones; every table is [seed, (size, labels)] at the last step."""
    return [
        Claim(
            f"At equal step (the last) and equal L and β, the bound of random labels is above that of half random ones,"
            f" and that above real ones', at m = {most}: data enter by α.",
            "least ratio of the bound, random over half random and half random over real",
            "×",
            1,
            "ratio",
        ).judged(10.0 ** _ordered(common[most])),
        Claim(
            f"The same with L and β of each run: random labels against real ones, at m = {most}.",
            "log₁₀ of the bound, random less real",
            _ORDERS,
            1,
        ).compared(own[most]["random"], own[most]["real"]),
        Claim(
            "At equal training loss (the least of the random run) and equal L and β, the bound of random labels is "
            f"above that of real ones, at m = {least}, where random labels are fitted furthest.",
            "log₁₀ of the bound, random less real",
            _ORDERS,
            1,
        ).compared(*at_equal_loss),
        Claim(
            f"The measured gap has the order of the bound at the last step: random above half random above real, at "
            f"m = {most}.",
            "lesser difference of the gap in loss, random less half random and half random less real",
            "nats",
            1,
        ).judged(_ordered(gap[most]), _in_words(gap[most])),
    ]


def _of_sizes(least: int, most: int, own: Any, gap: Any) -> list[Result]:
    """The smallest training set against the largest, and the bound against the gap."""
    return [
        Claim(
            f"The bound at the last step falls from m = {least} to m = {most}, for all three kinds of labels, with L "
            "and β of each run.",
            f"least difference of log₁₀ of the bound over kinds of labels, m = {least} less m = {most}",
            _ORDERS,
            1,
            paper=f"{np.log10(most / least):.3g} at equal α, L and β",
        ).judged((own[least] - own[most]).min(axis=1)),
        Claim(
            f"So does the measured gap in loss, from m = {least} to m = {most}.",
            f"least difference of the gap over kinds of labels, m = {least} less m = {most}",
            "nats",
            1,
        ).judged((gap[least] - gap[most]).min(axis=1)),
        Claim(
            "The bound, with L and β of each run, is above the measured gap at the last step, at every m and for all "
            "kinds of labels.",
            "least of log₁₀(bound / |gap|) over m and kinds of labels",
            _ORDERS,
            1,
        ).judged((own - np.log10(gap.abs())).min(axis=1)),
    ]


def _in_words(values: pd.DataFrame) -> str:
    return ", ".join(f"{labels} {with_spread(values[labels])}" for labels in LABELS)


def _table(table: pd.DataFrame) -> Table:
    """The constants, the bound and the gap of every size and kind of labels."""
    largest = table.groupby(["size", "labels", "seed"])[["lipschitz", "smoothness"]].max().sort_index()
    last = table[table["step"] == table["step"].max()].set_index(["size", "labels", "seed"]).sort_index()
    lines: list[tuple[str, ...]] = []
    for size in sorted(table["size"].unique()):
        for labels in LABELS:
            one, end = largest.loc[size, labels], last.loc[(size, labels)]
            columns = [one["lipschitz"], one["smoothness"], end["train/alpha_unbiased"], end["test/alpha_unbiased"]]
            columns += [end[name] for name in ("train/loss", "test/loss", "gap", "bound", "bound_common")]
            columns.append(end["bound"] - np.log10(end["gap"].abs()))
            lines.append((f"{size}, {labels}", *(with_spread(column) for column in columns)))
    heads = ("L", "β", "α, training", "α, test", "training loss", "test loss", "gap")
    bounds = ("log₁₀ bound", "log₁₀ bound, common L, β", "log₁₀ bound/|gap|")
    note = (
        f"At step {table['step'].max()}; losses and gap in nats. L and β are the largest of the whole run, "
        "estimated along its path; α is unbiased. ± one deviation over seeds."
    )
    return Table("The bound and the gap", ("m, labels", *heads, *bounds), tuple(lines), note)


def _over(table: pd.DataFrame, index: str, column: str) -> Curve:
    """A column against `index`, which stands where epochs stand."""
    return curve(table.assign(epoch=table[index]), column)


def _draw(table: pd.DataFrame, path: Path) -> None:
    """α, L, β, the loss, the gap and the bound against steps; and the last two against m."""
    most, end = table["size"].max(), table["step"].max()
    panels = (
        ("train/alpha_unbiased", f"coherence α, training\nsample, m = {most}"),
        ("lipschitz", "largest norm of an example's\ngradient [nats/unit], estimates L"),
        ("smoothness", "largest eigenvalue of an example's\nHessian [nats/unit²], estimates β"),
        ("train/loss", f"training loss [nats],\nm = {most}"),
        ("gap", f"gap in loss, test − training\n[nats], m = {most}"),
        ("bound", f"log₁₀ of the bound [nats],\nL and β of the run, m = {most}"),
        ("gap", f"gap in loss at step {end}\n[nats]"),
        ("bound", f"log₁₀ of the bound [nats]\nat step {end}"),
    )
    figure, axes = figures.grid(2, 4, (15, 7))
    for i, (ax, (column, name)) in enumerate(zip(axes.flat, panels, strict=True)):
        against_m = i >= 6
        for labels, (_, line) in LABELS.items():
            own = table[table["labels"] == labels]
            own = own[own["step"] == end] if against_m else own[own["size"] == most]
            if own.empty:
                continue
            along = _over(own[np.isfinite(own[column])], "size" if against_m else "step", column)
            figures.band(ax, along, line)
            if not against_m:
                figures.epoch_axis(ax, along.epoch)
        if against_m:
            sizes = sorted(table["size"].unique())
            ax.set_xscale("log")
            ax.set_xticks(sizes, [str(size) for size in sizes])
            ax.minorticks_off()
        ax.set_xlabel("training examples m" if against_m else "step")
        ax.set_ylabel(name)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: Config, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    pictures: tuple[Figure, ...] = ()
    results: tuple[Result, ...] = ()
    tables: tuple[Table, ...] = ()
    if rows:
        table = with_bounds(frame(rows), config.learning_rate)
        _draw(table, folder / "bound.png")
        pictures = (Figure("bound.png", _CAPTION.format(seeds=config.seeds)),)
        ended = table[table["step"] == table["step"].max()].groupby("seed").size()
        if (ended == table["size"].nunique() * len(LABELS)).all() and table["size"].nunique() > 1:
            results, tables = tuple(claims(table)), (_table(table),)
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size}
    text = tuple(part.format(**values) for part in (*_TEXT, described(config)))
    return Section(config.name, "The stability bound of Theorem 1", text, results, tables, pictures)


_CAPTION = (
    "Along the runs on the largest training set: coherence α, the largest gradient norm of a single example, the "
    "largest eigenvalue of a single example's Hessian, the training loss, the gap in loss and log₁₀ of the bound, "
    "against steps; last, the gap and the bound at the end against m. Lines are means over {seeds} seed(s), bands "
    "their 95% intervals."
)
_TEXT = (
    "Theorem 1 bounds the difference of expected test and training loss after T steps by "
    "(L²/m) Σ_t [Π_(k>t) (1 + η β)] η √(2 (1 − α_t)), for losses of single examples that are L-Lipschitz and β-smooth. "
    "L, β, η, m and T do not know what labels mean: by the theorem, data make a difference by α. The same small "
    "network is trained with real labels, with half of the labels drawn at random and with all of them so "
    "({data}; SGD with the constant step size {lr}, mini-batches of {batch}); the labels of the test set are drawn the"
    " same way, so that it is a sample of what is trained on. Nested training sets are trained on for as many steps.",
    "A mini-batch holds an example with probability B/m and then weighs it by 1/B; so in the mean over the order a "
    "step of SGD adds to the sum what a step on the whole training set adds.",
    "L is the largest norm of the gradient of a training example, exact, at all measured steps of a run. β is the "
    "largest absolute eigenvalue of the Hessian of the loss of one example, by 20 power iterations on Hessian-vector "
    "products of each of the first 32 training examples, at the same steps. Both are estimates along the path and no "
    "global constants: the theorem asks for bounds at all weights that two neighbouring runs can reach, which are "
    "larger, and a network of ReLUs has no β where a unit switches. Power iteration estimates from below. α is "
    "that of the training sample, exact and without bias, clipped to [0, 1]; the theorem's is that of the population "
    "at the weights before each step. Between measured steps it is interpolated linearly in steps.",
    "As a number the bound is vacuous: it grows by the factor 1 + η β at every step, and the last claim says by how "
    "many orders of magnitude it is above the gap. What can be tested is its order: over kinds of labels, over m.",
)
