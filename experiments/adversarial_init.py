"""Whether starting from a network that was trained on random labels hurts, and whether weight decay undoes it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pandas as pd

from . import figures, loop
from .claims import Claim, Result, with_spread
from .configs import TFDS, Config, Hidden, described
from .equal_loss import by_seed_at, shown, trained
from .examples import Examples
from .experiment import Experiment
from .line import Line
from .models import MODELS
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, by_seed, curve, frame
from .train import Keys

STARTS = {"fresh": "a fresh start", "random": "a start on random labels"}
DECAYS = {"none": "no weight decay", "decay": "weight decay"}
_LINES = {
    ("fresh", "none"): Line("fresh", "tab:blue"),
    ("fresh", "decay"): Line("fresh, weight decay", "tab:cyan", "--"),
    ("random", "none"): Line("from random labels", "tab:red", "-."),
    ("random", "decay"): Line("from random labels, weight decay", "tab:orange", ":"),
}
# In nats, where coherence is compared.
_LOSS = 0.5


@dataclasses.dataclass(frozen=True)
class AdversarialInitConfig(Config):
    """Whether starting from a network that was trained on random labels hurts, and whether weight decay undoes it.

    `adversarial-init`: mnist5k, MLP 784-256-256-10; about 13 minutes on one busy CPU core. Expect a lower test
    accuracy from a network that fits random labels of the same images, and most of it regained with weight decay.
    """

    name: Hidden = "adversarial-init"

    width: int | None = 256
    """Units of a hidden layer."""
    epochs: int = 60
    """Passes over the training set with real labels."""
    epochs_random: int = 80
    """Passes over it with random labels, before."""
    decay: float = 0.005
    """The weight decay of the trainings that have one. In 60 epochs of 80 steps of 0.1 it alone shrinks the weights of
    the start to exp(−0.1 · 0.005 · 4800) = 9%."""
    every: int = 3
    """Measure every so many epochs, and at the start and the end."""
    early: int = 6
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""
    seeds: int = 5
    """Runs with different initialisation, order and random labels; figures show their mean and its 95% interval."""

    def smaller(self) -> "AdversarialInitConfig":
        """The same with one hidden layer and two epochs of random labels."""
        return dataclasses.replace(self, depth=1, epochs_random=2, early=0, every=1)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        if self.epochs_random < 1:
            raise ValueError(f"Expected epochs_random >= 1, got epochs_random={self.epochs_random}.")
        if not 0 < self.decay < 1:
            raise ValueError(f"Expected 0 < decay < 1, got decay={self.decay}.")
        if self.weight_decay not in (0.0, self.decay):
            what = f"weight decay as decay={self.decay}"
            raise ValueError(f"Expected {what}, got weight_decay={self.weight_decay}.")
        if MODELS[self.model].batch_norm or self.data.startswith(TFDS):
            what = "a model without BatchNorm and a data set that is held in memory"
            raise ValueError(f"Expected {what}, got model={self.model} and data={self.data}.")


Measure = Callable[[Examples, nn.Module, Any], Row]


def _measurement(seed: int) -> Measure:
    """What is measured of a seed: as of every training, the distance from its fresh start, and the norm of weights."""

    def measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
        moved = jax.tree.map(lambda now, before: now - before, params, _fresh(model, seed, examples.first.shape))
        norms = {"distance": _norm(moved), "norm": _norm(params)}
        return trained(examples, model, params) | {name: float(f"{value:.6g}") for name, value in norms.items()}

    return measurement


@functools.lru_cache(maxsize=16)
def _fresh(model: nn.Module, seed: int, shape: tuple[int, ...]) -> Any:
    """The parameters that a training of this seed begins with, of images of this shape."""
    return jax.device_get(jax.jit(model.init)(Keys.of(seed).init, jnp.zeros(shape)))


def _norm(tree: Any) -> float:
    return float(sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.device_get(tree)))) ** 0.5


def _training(config: AdversarialInitConfig, start: str, decay: str, phase: str, seed: int) -> loop.Training:
    """With random labels ("before"), or with real ones."""
    before = phase == "before"
    changes: dict[str, Any] = {"weight_decay": 0.0 if before or decay == "none" else config.decay}
    changes |= {"epochs": config.epochs_random, "every": 5 * config.every} if before else {}
    return loop.Training(
        f"adversarial-init · {STARTS[start]} · {DECAYS[decay]} · {phase} · seed {seed}",
        {"start": start, "decay": decay, "phase": phase, "seed": seed},
        "sgd",
        (1.0, 0.0) if before else (0.0, 0.0),
        _measurement(seed),
        shown,
        changes,
        continues=start == "random" and not before,
    )


def measure(config: AdversarialInitConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on real labels from both starts, without and with weight decay, and measure on the way.

    Each training that begins from random labels has its own before it, the same for both, as it continues that one.
    """
    trainings = [
        _training(config, start, decay, phase, seed)
        for start in STARTS
        for decay in DECAYS
        for seed in range(config.seed, config.seed + config.seeds)
        for phase in (("before", "real") if start == "random" else ("real",))
    ]
    loop.train_all(config, problem, folder, trainings)


def _of(table: pd.DataFrame, start: str, decay: str) -> pd.DataFrame:
    return table[(table["start"] == start) & (table["decay"] == decay) & (table["phase"] == "real")]


def at_end(table: pd.DataFrame, start: str, decay: str, column: str) -> pd.Series:
    """A column after the last epoch of real labels, by seed."""
    return by_seed(_of(table, start, decay), column, "step").iloc[-1]


def deficit(table: pd.DataFrame, decay: str) -> pd.Series:
    """Test accuracy from random labels less that from a fresh start after the last epoch, in points, by seed."""
    first, second = (at_end(table, start, decay, "test_accuracy") for start in ("random", "fresh"))
    return 100 * (first - second)


def claims(table: pd.DataFrame) -> list[Result]:
    """What the start costs without and with weight decay, and what it does to coherence."""
    hurts = Claim(
        "Without weight decay, a start on random labels ends at a lower test accuracy than a fresh start.",
        "test accuracy after the last epoch, from random labels less fresh",
        "points",
        -1,
    )
    undone = Claim(
        "Weight decay makes the deficit of the start on random labels smaller.",
        "test accuracy after the last epoch, from random labels less fresh, with weight decay less without",
        "points",
        1,
    )
    incoherent = Claim(
        "At equal training loss, gradients are less coherent from random labels than from a fresh start.",
        f"m-coherence r of the training sample at training loss {_LOSS}, from random labels over fresh, no decay",
        "×",
        -1,
        "ratio",
    )
    random, fresh = (100 * at_end(table, start, "none", "test_accuracy") for start in ("random", "fresh"))
    r = {start: by_seed_at(_of(table, start, "none"), "r", [_LOSS], log=True).T[_LOSS] for start in STARTS}
    return [
        hurts.compared(random, fresh, "{:.2f}%"),
        undone.compared(deficit(table, "decay"), deficit(table, "none"), "{:.2f}"),
        incoherent.compared(r["random"], r["fresh"]),
    ]


def _table(table: pd.DataFrame) -> Table:
    """All four trainings after the last epoch."""
    lines: list[tuple[str, ...]] = []
    for (start, decay), line in _LINES.items():
        shares = [100 * at_end(table, start, decay, column) for column in ("accuracy", "test_accuracy")]
        others = [at_end(table, start, decay, column) for column in ("loss", "r", "distance", "norm")]
        coherence = by_seed_at(_of(table, start, decay), "r", [_LOSS], log=True).T[_LOSS]
        cells = [with_spread(share, "{:.2f}") for share in shares] + [with_spread(value) for value in others]
        lines.append((line.label, *cells, "–" if coherence.isna().any() else with_spread(coherence)))
    heads = ("start", "training accuracy [%]", "test accuracy [%]", "training loss [nats]", "r", "distance", "norm")
    note = "After the last epoch of real labels; r also where the training loss falls through a value. ± one deviation."
    return Table("Both starts, without and with weight decay", (*heads, f"r at loss {_LOSS}"), tuple(lines), note)


def _draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracies, r and the distance from the fresh start against epochs of real labels."""
    figure, axes = figures.grid(2, 3)
    columns = ("test_accuracy", "accuracy", "loss", "r", "distance", "norm")
    names = ("test accuracy", "training accuracy", "training loss [nats]", "", "distance from the fresh start ‖w − w₀‖")
    means = list[float]()
    for ax, column, name in zip(axes.flat, columns, (*names, "norm of the parameters ‖w‖"), strict=True):
        for (start, decay), line in _LINES.items():
            along = curve(_of(table, start, decay), column, log=column == "r")
            means += along.mean.tolist() if column == "r" else []
            figures.band(ax, along, line)
            figures.epoch_axis(ax, along.epoch)
        ax.set_xlabel("epoch of real labels")
        ax.set_ylabel(name)
    for ax in axes[0, :2]:
        figures.percent_axis(ax)
    for ax in (axes[0, 2], *axes[1, 1:]):
        ax.set_ylim(bottom=0)
    figures.coherence_axis(axes[1, 0], "\ntraining sample", means)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: AdversarialInitConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    results, tables, pictures = (), (), ()
    found = {(row["start"], row["decay"]) for row in rows if row["phase"] == "real"}
    fitted = "not known yet"
    if found >= set(_LINES):
        table = frame(rows)
        _draw(table, folder / "adversarial_init.png")
        results, tables = tuple(claims(table)), (_table(table),)
        pictures = (Figure("adversarial_init.png", _CAPTION.format(seeds=config.seeds)),)
        before = table[(table["phase"] == "before") & (table["decay"] == "none")]
        fitted = f"{with_spread(100 * by_seed(before, 'accuracy').iloc[-1], '{:.1f}')}%"
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size, "decay": config.decay}
    epochs = {"before": config.epochs_random, "epochs": config.epochs, "fitted": fitted}
    text = tuple(part.format(**values, **epochs, width=config.width) for part in _TEXT)
    return Section(config.name, "A start on random labels", (*text, described(config)), results, tables, pictures)


_CAPTION = (
    "The same training on real labels from a fresh start and from a network that was trained on random labels of the "
    "same images, without and with weight decay. Above: accuracy on the test and on the training sample, and training "
    "loss; below: m-coherence r of the training sample, and how far the parameters are from the fresh start and from "
    "0. Lines are means over {seeds} seed(s), of r geometric ones; bands are their 95% intervals. The dotted line at "
    "r = 1 is the orthogonal limit."
)
_TEXT = (
    "An MLP with {width} units a layer learns the images of {data} by plain SGD (learning rate {lr}, mini-batches of "
    "{batch}, {epochs} epochs): from a fresh start, and from a network that was first trained for {before} epochs on "
    "random labels of the same images; their accuracy on these labels at the end was {fitted}. Both are trained "
    "without weight decay and with one of {decay}, in the same order of examples.",
    "The theory says that a network generalises because of the way that it takes: from a fresh start, the directions "
    "that many examples share win. A network that has memorised the images one by one begins where they share less, "
    "and a minimum near it generalises worse. Liu, Papailiopoulos and Achlioptas (2020, “Bad global minima exist and "
    "SGD can reach them”, arXiv 1906.02613) find this, and that regularised training undoes it.",
)

EXPERIMENT = Experiment(AdversarialInitConfig(), measure, section)
