"""SGD against medians of mini-batches when a part of the labels is wrong."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from . import comparison, figures, loop
from .comparison import BY_EXAMPLE, SELECTED, TUNED, ComparisonConfig
from .configs import TFDS, Hidden, described
from .data import RARE_CLASS, Noise
from .experiment import Experiment
from .methods import METHODS
from .moments import claims, table_at, whens
from .run_folder import RunFolder
from .section import Figure, Row, Section, curve, frame


@dataclasses.dataclass(frozen=True)
class NoiseConfig(ComparisonConfig):
    """SGD against medians of mini-batches when a part of the labels is wrong.

    `noise`: mnist5k, half of the labels redrawn, MLP 784-512-512-10; about 3 minutes on 2 CPU cores for one seed.
    Expect SGD to memorise nearly all wrong labels, and M3 to learn the right ones first.
    """

    name: Hidden = "noise"

    noise: float = 0.5
    """Share of the training labels that are changed; 0 for none."""
    noise_kind: Literal["uniform", "class"] = "uniform"
    """uniform: to a class drawn uniformly from all of them; some draws hit the true one. class: of each class to one
    other, the next on a cycle through all classes whose order is drawn from the seed."""
    rare: float = 1.0
    """Share of the training examples of class 0 that are kept; the test accuracy on that class is measured too."""

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        if not 0 <= self.noise < 1:
            raise ValueError(f"Expected 0 <= noise < 1, got noise={self.noise}.")
        if not 0 < self.rare <= 1:
            raise ValueError(f"Expected 0 < rare <= 1, got rare={self.rare}.")
        if self.data.startswith(TFDS) and (self.noise_kind != "uniform" or self.rare < 1):
            what = f"noise_kind={self.noise_kind} and rare={self.rare}"
            raise ValueError(f"Expected uniform noise and no rare class for data={self.data}, got {what}.")
        super().check()

    def check_size(self, num_train: int) -> None:
        """ValueError where not one label would be changed."""
        if self.noise and not round(self.noise * num_train):
            raise ValueError(f"Expected noise to be a label or more of {num_train}, got noise={self.noise}.")
        super().check_size(num_train)


def measure(config: NoiseConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Choose learning rates, train by every method, seed by seed, and measure on the way."""
    noise = Noise(config.noise, 0.0, config.noise_kind, config.rare, config.validation)

    def reported(rows: Sequence[Row]) -> list[loop.Training]:
        rates = comparison.chosen(config, config.methods, rows)
        return [
            comparison.training(config, method, seed, noise, rates[method], {})
            for seed in range(config.seed, config.seed + config.seeds)
            for method in config.methods
        ]

    loop.train_all(config, problem, folder, comparison.tunings(config, config.methods, noise, {}), reported)


_PANELS = (
    ("pristine", "accuracy on pristine examples"),
    ("corrupt", "accuracy on corrupt examples,\nas labelled (memorised)"),
    ("corrupt_true", "accuracy on corrupt examples,\ntrue label"),
    ("test", "test accuracy"),
    ("gap", "generalisation gap\n(training as labelled − test)"),
    ("loss", "training loss [nats]"),
)


# Where averages over examples are compared, lines are many: those of mini-batches have a row of their own.
_MAIN = ("pristine", "corrupt", "test")
_REFERENCES = ("sgd", "mean3", "m3")


def _by_row(methods: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(what they take, the methods) of each of two rows; the references are in both."""
    single = [method for method in methods if METHODS[method].average]
    both = [method for method in methods if method in _REFERENCES]
    rows = [("mini-batches", [each for each in methods if each not in single]), ("single examples", both + single)]
    return rows if single else []


def _draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracies and the gap against epochs, one line for each method."""
    methods = [*table["method"].unique()]
    panels = [panel for panel in _PANELS if panel[0] in table and table[panel[0]].notna().any()]
    rows = _by_row(methods)
    if rows:
        panels = [panel for panel in panels if panel[0] in _MAIN]
        shown = [(panel, lines, f"averages over {of}") for of, lines in rows for panel in panels]
        figure, axes = figures.grid(2, len(panels), (12, 7.4))
    else:
        shown = [(panel, methods, "") for panel in panels]
        figure, axes = figures.grid(2, 3)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, ((key, label), lines, title) in zip(axes.flat, shown, strict=False):
        for method in lines:
            figures.band(ax, curve(table[table["method"] == method], key), METHODS[method].line)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.set_title(title, fontsize=10)
        if key == "loss":
            ax.set_ylim(bottom=0)
        else:
            figures.percent_axis(ax)
        if key not in ("loss", "gap"):
            figures.chance(ax, table["chance"].iloc[0])
    figures.legend(figure, *axes[:, 0], columns=4 if rows else 6)
    figures.save(figure, path)


def section(config: NoiseConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figures that follow from what was measured."""
    rows = comparison.reported(rows)
    table = frame(rows)
    runs = {(row["method"], row["seed"]) for row in rows}
    complete = runs >= {(method, seed) for method in config.methods for _, seed in runs}
    pictures: tuple[Figure, ...] = ()
    if rows:
        _draw(table, folder / "noise.png")
        caption = (_OF_ROWS if _by_row(config.methods) else _CAPTION).format(seeds=config.seeds)
        pictures = (Figure("noise.png", caption),)
    results, tables = (), ()
    if rows and complete:
        results, tables = tuple(claims(table)), tuple(table_at(table, when) for when in whens(table))
    share = rows[0]["corrupt_share"] if rows else float("nan")
    title = "SGD against medians under label noise"
    return Section(config.name, title, _text(config, share), results, tables, pictures)


def _text(config: NoiseConfig, share: float) -> tuple[str, ...]:
    """What was done, where `share` of the labels are wrong."""
    values = {"data": config.data, "model": config.model, "lr": config.learning_rate, "batch": config.batch_size}
    text = [part.format(**values, noise=config.noise, share=share) for part in (_LABELS[config.noise_kind], _STEPS)]
    if any(METHODS[method].average or method == "gaf" for method in config.methods):
        text.append(BY_EXAMPLE.format(batch=3 * config.batch_size))
    if config.rare < 1:
        text.append(f"Of the training examples of class {RARE_CLASS} only {config.rare:.0%} are kept.")
    if config.validation:
        text.append(f"{config.validation:.0%} of the training examples are held out. {SELECTED}")
    if len(config.learning_rates) > 1:
        text.append(TUNED.format(rates=", ".join(f"{rate:g}" for rate in config.learning_rates)))
    return *text, described(config)


_CAPTION = (
    "Accuracy against epochs: on training examples whose label is right (pristine), on those whose label was "
    "changed (corrupt), counted by the wrong label they carry and by the true one, and on the test set; and the "
    "generalisation gap, training accuracy as labelled less test accuracy. A good method is high on pristine, "
    "true and test, and low on corrupt as labelled. Lines are means over {seeds} seed(s), bands their 95% "
    "intervals; the dotted line is chance."
)
_OF_ROWS = (
    "Accuracy against epochs: on training examples whose label is right (pristine), on those whose label was changed "
    "(corrupt), counted by the wrong label they carry, and on the test set. Above, methods that take the gradients of "
    "mini-batches; below, averages over single examples, beside SGD, M3 and the mean of the same three mini-batches. A "
    "good method is high on pristine and test, and low on corrupt. Lines are means over {seeds} seed(s), bands their "
    "95% intervals; the dotted line is chance."
)
_SAME = (
    " A network that fits all of them has memorised those. The same network ({model}) is trained from the same start "
    "and in the same order of examples by every method."
)
_LABELS = {
    "uniform": "A share of {noise:.0%} of the training labels ({data}) is replaced by classes drawn uniformly, which "
    "leaves {share:.0%} wrong." + _SAME,
    "class": "A share of {noise:.0%} of the training labels ({data}) is replaced, those of each class by one other, "
    "which leaves {share:.0%} wrong." + _SAME,
}
_STEPS = (
    "SGD steps along the gradient of one mini-batch of {batch} (learning rate {lr}). M3 takes the gradients of "
    "three mini-batches and, for every coordinate, their median: what only one mini-batch asks for is ignored. "
    "Its control steps along the mean of the same three, so that a difference between the two is the median's and"
    " not the batch size's. RM3 and RA3 take the median and the mean of the last three gradients, at every mini-"
    "batch."
)

EXPERIMENT = Experiment(NoiseConfig(), measure, section)
