"""Winsorised SGD: what moving the outermost gradients of every coordinate inwards does to fitting and memorising."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import pandas as pd

from . import loop
from .claims import Claim, Result, with_spread
from .comparison import shares
from .configs import TFDS, Config, Hidden
from .data import DATASETS, Noise
from .examples import Examples
from .experiment import Experiment
from .methods import METHODS, PER_SIDE
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, frame
from .winsorize_figures import draw_epochs, draw_shares

ORDER = ("sgd", *PER_SIDE)
QUANTITIES = {
    "train": "training accuracy (labels as given)",
    "pristine": "accuracy on pristine examples",
    "corrupt": "accuracy on corrupt examples,\nas labelled (memorised)",
    "test": "test accuracy",
}
# The shares of random labels that all methods are trained on, and that claims are of.
_NONE, _HALF, _ALL = 0.0, 0.5, 1.0


@dataclasses.dataclass(frozen=True)
class WinsorizeConfig(Config):
    """Winsorised SGD: what moving the outermost gradients of every coordinate inwards does to fitting and memorising.

    `winsorize`: mnist5k and 10,000 examples of Fashion-MNIST, MLP 784-256-256-256-10; about 22 minutes on one CPU core
    for one seed. Expect few wrong labels to be memorised with c >= 1 per side, and slow fitting with large c.
    """

    name: Hidden = "winsorize"

    width: int | None = 256
    """Units of a hidden layer."""
    depth: int | None = 3
    """Hidden layers."""
    batch_size: int = 100
    """Examples in a mini-batch, whose gradients are winsorised together."""
    epochs: int = 40
    """Passes over the training set."""
    every: int = 4
    """Measure every so many epochs, and at the start and the end."""
    seeds: int = 5
    """Runs with different initialisation, order and noise; figures show their mean and its 95% interval."""
    shares: tuple[float, ...] = (0.5, 0.0, 1.0, 0.25, 0.75)
    """Shares of the training labels that are redrawn uniformly."""
    fully: tuple[float, ...] = (0.5, 0.0)
    """Shares that every c is trained on; the others with c = 0, 1 and 4 alone."""
    also: str | None = "fashion_mnist"
    """A second data set, of which also_train examples are trained on; it is read without data_dir."""
    also_train: int = 10_000
    """Training examples of the second data set."""
    also_epochs: int = 15
    """Passes over them, about as many steps as of the first; measured as often."""

    @property
    def samples(self) -> tuple[str, ...]:
        """None: coherence is not measured."""
        return ()

    def smaller(self) -> "WinsorizeConfig":
        """The same with one data set, three shares and few methods."""
        return dataclasses.replace(self, also=None, shares=(_HALF, _NONE, _ALL), fully=(), every=1, seeds=1)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        for name in ("shares", "fully"):
            values = getattr(self, name)
            if any(not 0 <= share <= 1 for share in values) or len(set(values)) < len(values):
                raise ValueError(f"Expected {name} to be different ones from 0 to 1, got {name}={values}.")
        if not self.shares or not set(self.fully) <= set(self.shares):
            raise ValueError(f"Expected fully to be among shares, got fully={self.fully} and shares={self.shares}.")
        if self.batch_size < 17:
            raise ValueError(f"Expected batch_size >= 17, to move 8 examples per side, got {self.batch_size}.")
        if self.model != "mlp":
            raise ValueError(f"Expected model=mlp, got model={self.model}.")
        if self.data.startswith(TFDS) or (self.also is not None and self.also not in DATASETS):
            raise ValueError(f"Expected data and also to be in {(*DATASETS,)}, got {self.data} and {self.also}.")
        if self.also == self.data or min(self.also_train, self.also_epochs) < 1:
            what = f"also={self.also}, also_train={self.also_train} and also_epochs={self.also_epochs}"
            raise ValueError(f"Expected another data set than {self.data}, and numbers >= 1, got {what}.")

    def methods(self, share: float) -> tuple[str, ...]:
        """What is trained on a share of random labels."""
        return ORDER if share in self.fully else ("sgd", "winsor1", "winsor4")

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """The data sets, with the options that differ."""
        every = max(1, self.every * self.also_epochs // self.epochs)
        other = {"num_train": self.also_train, "num_test": None, "epochs": self.also_epochs, "every": every}
        also = {"data": self.also, "data_dir": None, "also": None, **other}
        return {self.data: {}} | ({} if self.also is None else {self.also: also})


def measure(config: WinsorizeConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on both data sets with all shares of random labels, seed by seed, and measure on the way."""
    trainings = [
        loop.Training(
            f"winsorize · {data} · {share:.0%} random · {method} · seed {seed}",
            {"data": data, "share": share, "method": method, "seed": seed},
            method,
            Noise(share),
            _measurement,
            lambda row: {"train": f"{row['train']:.3f}", "test": f"{row['test']:.3f}"},
            changes,
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for data, changes in config.sets.items()
        for share in config.shares
        for method in config.methods(share)
    ]
    loop.train_all(config, problem, folder, trainings)


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    train, test = (examples.guess(sample, model, params) for sample in ("train", "test"))
    row = shares(train.guess, train.labels, train.true) | {"test": float((test.guess == test.labels).mean())}
    return {name: round(row[name], 4) for name in QUANTITIES}


def at_end(table: pd.DataFrame, data: str, share: float, method: str, key: str) -> pd.Series:
    """A share of examples in per cent after the last epoch, by seed."""
    runs = table[(table["data"] == data) & (table["share"] == share) & (table["method"] == method)]
    return 100 * runs.groupby("seed").tail(1).set_index("seed")[key].astype(float)


def claims(table: pd.DataFrame, data: str) -> list[Result]:
    """Five of a data set: three of half of the labels random, one of none, one of all."""
    name = DATASETS[data].line.label

    def end(share: float, method: str, key: str) -> pd.Series:
        return at_end(table, data, share, method, key)

    def claim(statement: str, quantity: str, sign: Any, first: pd.Series, second: pd.Series) -> Result:
        of = Claim(f"{name}, {statement}", quantity, "points", sign)
        return of.compared(first, second, "{:.1f}%")

    half, memorised = "half of the labels random:", "accuracy on corrupt examples as labelled"
    few = Claim(
        f"{name}, {half} with c = 4 less than a tenth of the corrupt examples are memorised.",
        f"10% less the {memorised}, c = 4",
        *("points", 1),
    )
    four = end(_HALF, "winsor4", "corrupt")
    gaps = {method: end(_HALF, method, "train") - end(_HALF, method, "test") for method in ("winsor4", "sgd")}
    return [
        claim(
            f"{half} with c = 1 fewer corrupt examples are memorised than by plain SGD.",
            f"{memorised}, c = 1 less c = 0",
            *(-1, end(_HALF, "winsor1", "corrupt"), end(_HALF, "sgd", "corrupt")),
        ),
        few.judged(10 - four, with_spread(four, "{:.1f}%")),
        claim(
            f"{half} the generalisation gap is smaller with c = 4 than with plain SGD.",
            "training accuracy as labelled less test accuracy, c = 4 less c = 0",
            *(-1, gaps["winsor4"], gaps["sgd"]),
        ),
        claim(
            "real labels: with c = 8 the training set is fitted worse than by plain SGD in as many steps.",
            "training accuracy, c = 8 less c = 0",
            *(-1, end(_NONE, "winsor8", "train"), end(_NONE, "sgd", "train")),
        ),
        claim(
            "all labels random: with c = 1 fewer of them are fitted than by plain SGD.",
            "training accuracy, c = 1 less c = 0",
            *(-1, end(_ALL, "winsor1", "train"), end(_ALL, "sgd", "train")),
        ),
    ]


def _table(config: WinsorizeConfig, table: pd.DataFrame, data: str) -> Table:
    lines = list[tuple[str, ...]]()
    for share in sorted(config.shares):
        for method in config.methods(share):
            cells = [at_end(table, data, share, method, key) for key in QUANTITIES]
            texts = ["–" if cell.isna().any() or cell.empty else with_spread(cell, "{:.1f}") for cell in cells]
            lines.append((f"{share:.0%}", label(method), *texts))
    heads = [f"{name} [%]" for name in ("training", "pristine", "corrupt as labelled", "test")]
    title = f"{DATASETS[data].line.label}: accuracy after the last epoch"
    return Table(title, ("random labels", "per side", *heads), tuple(lines), "± one deviation over seeds.")


def label(method: str) -> str:
    """What figures and tables call a method of this experiment."""
    return "c = 0 (SGD)" if method == "sgd" else METHODS[method].label


def section(config: WinsorizeConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figures of what was measured; of the seeds that have all."""
    table, sets = frame(rows), config.sets
    pictures, results, tables = list[Figure](), list[Result](), list[Table]()
    if rows:
        lines = {method: METHODS[method].line._replace(label=label(method)) for method in ORDER}
        draw_shares(table, sets, QUANTITIES, lines, folder / "winsorize_shares.png")
        pictures = [Figure("winsorize_shares.png", _SHARES)]
        if (half := table[table["share"] == _HALF]).size:
            draw_epochs(half, sets, QUANTITIES, lines, folder / "winsorize.png")
            pictures = [Figure("winsorize.png", _EPOCHS), *pictures]
    for data in sets:
        if rows and {_NONE, _HALF, _ALL} <= set(table[table["data"] == data]["share"]):
            results += claims(table, data)
            tables.append(_table(config, table, data))
    text = tuple(part.format(lr=config.learning_rate, batch=config.batch_size) for part in _TEXT)
    return Section(config.name, "Winsorised SGD", text, tuple(results), tuple(tables), tuple(pictures))


_EPOCHS = (
    "Half of the labels random: accuracies against epochs, a row for each data set, a line for each number c of "
    "examples per side. Lines are means over seeds, bands their 95% intervals."
)
_SHARES = (
    "Accuracies after the last epoch, against the share of labels that are random. Bars are 95% intervals over seeds; "
    "shares at which not every c has a point were trained with c = 0, 1 and 4 alone."
)
_TEXT = (
    "The theory of coherent gradients says that what only few examples ask for is memorised, and that a step which "
    "ignores them cannot memorise. Winsorised SGD (Chatterjee 2020, https://arxiv.org/abs/2002.10657) takes the "
    "gradient of every example of a mini-batch of {batch}. For every coordinate it moves the c smallest and the c "
    "largest values to their neighbours, and averages. With c = 0 it is SGD; with the median only the middle is left.",
    "The same network (784-256-256-256-10) is trained from the same start and in the same order of examples with each "
    "c, at a constant learning rate of {lr}. A share of the labels is redrawn uniformly; a draw in ten hits the true "
    "one. If the theory is right, a small c keeps corrupt labels from being memorised, and a large c makes fitting "
    "slow even where all labels are right, since rare patterns are ignored too.",
)

EXPERIMENT = Experiment(WinsorizeConfig(), measure, section)
