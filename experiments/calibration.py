"""What others published of MNIST with real, permuted and noisy labels, trained again before anything is believed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import pandas as pd

from . import figures, loop
from .claims import Claim, Result, with_spread
from .comparison import shares
from .configs import Config, Hidden
from .data import Noise
from .examples import Examples
from .experiment import Experiment
from .line import Line
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

SAMPLES = {"train": "training accuracy (labels as given)", "test": "test accuracy"}
# Per cent, and how far from it a test accuracy may be to count as chance.
_CHANCE, _MARGIN = 10, 5


class Arm(NamedTuple):
    """One training that others published."""

    line: Line
    noise: Noise
    published: Mapping[str, float]  # per cent, of the samples whose number is known
    lenet: bool = False


def _redrawn(wrong: float) -> Noise:
    """So many labels redrawn that `wrong` of them are wrong on average: a draw in ten hits the true class."""
    return Noise(wrong * 10 / 9)


ARMS: dict[str, Arm] = {
    "real": Arm(Line("MLP, real labels", "tab:blue"), Noise(), {"train": 99.90, "test": 98.24}),
    "half": Arm(Line("MLP, half of the labels random", "tab:purple", "-."), Noise(0.5), {}),
    "permuted": Arm(
        Line("MLP, permuted labels", "tab:red", "--"), Noise(1.0, kind="permuted"), {"train": 91.27, "test": 9.73}
    ),
    "lenet0": Arm(Line("LeNet-5, no wrong labels", "black"), Noise(), {"test": 99.1}, True),
    "lenet20": Arm(Line("LeNet-5, 20% wrong", "tab:green", "--"), _redrawn(0.2), {"test": 98.8}, True),
    "lenet40": Arm(Line("LeNet-5, 40% wrong", "tab:orange", "-."), _redrawn(0.4), {"test": 98.6}, True),
    "lenet60": Arm(Line("LeNet-5, 60% wrong", "tab:brown", ":"), _redrawn(0.6), {"test": 98.0}, True),
}


@dataclasses.dataclass(frozen=True)
class CalibrationConfig(Config):
    """What others published of MNIST with real, permuted and noisy labels, trained again on 4,000 examples.

    `calibration`: mnist5k, an MLP 784-256-256-256-10 and LeNet-5; about 11 minutes on one CPU core. Expect accuracies
    on the test set below the published ones, which took 60,000 examples, and random labels fitted at least as well.
    """

    name: Hidden = "calibration"

    width: int | None = 256
    """Units of a hidden layer of the MLP."""
    depth: int | None = 3
    """Hidden layers of the MLP."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """What steps along the gradient."""
    learning_rate: float = 0.001
    """Step size."""
    batch_size: int = 64
    """Examples in a mini-batch of the MLP."""
    lenet_batch_size: int = 32
    """Examples in a mini-batch of LeNet-5."""
    lenet_weight_decay: float = 0.001
    """So much of the weights of LeNet-5 is added to its gradients."""
    epochs: int = 300
    """Passes over the training set with permuted labels."""
    epochs_real: int = 100
    """Passes over the training set with real labels, and with half of them random."""
    epochs_lenet: int = 20
    """Passes over the training set of LeNet-5."""
    every: int = 5
    """Measure every so many epochs, and at the start and the end; of LeNet-5, two at the most."""
    seeds: int = 5
    """Runs of the MLP with different initialisation, order and noise; figures show their mean and its 95% interval."""
    lenet_seeds: int = 3
    """How many of them LeNet-5 has too."""

    @property
    def samples(self) -> tuple[str, ...]:
        """None: coherence is not measured."""
        return ()

    def smaller(self) -> "CalibrationConfig":
        """The same with two epochs of everything, of one seed."""
        return dataclasses.replace(self, epochs_real=2, epochs_lenet=2, every=1, seeds=1)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        for name in ("epochs_real", "epochs_lenet", "lenet_batch_size", "lenet_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {name}={getattr(self, name)}.")
        if self.model not in ("mlp", "lenet"):
            raise ValueError(f"Expected model=mlp, beside which LeNet-5 is trained, got model={self.model}.")


def measure(config: CalibrationConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train all arms, seed by seed, and measure on the way."""
    seeds = range(config.seed, config.seed + config.seeds)
    trainings = [
        loop.Training(
            f"calibration · {name} · seed {seed}",
            {"arm": name, "seed": seed},
            "sgd",
            arm.noise,
            _measurement,
            lambda row: {sample: f"{row[sample]:.3f}" for sample in SAMPLES},
            _changes(config, arm),
        )
        for seed in seeds
        for name, arm in ARMS.items()
        if not arm.lenet or seed - config.seed < config.lenet_seeds
    ]
    loop.train_all(config, problem, folder, trainings)


def epochs_of(config: CalibrationConfig, arm: Arm) -> int:
    """Passes over the training set."""
    if arm.lenet:
        return config.epochs_lenet
    return config.epochs if arm.noise.kind == "permuted" else config.epochs_real


def _changes(config: CalibrationConfig, arm: Arm) -> dict[str, Any]:
    epochs = {"epochs": epochs_of(config, arm)}
    if not arm.lenet:
        return epochs
    every = min(2, config.every)  # its epochs are fewer
    recipe = {"batch_size": config.lenet_batch_size, "weight_decay": config.lenet_weight_decay, "every": every}
    # LeNet-5 takes no images as small as those of a smoke test.
    data = {"data": "mnist5k"} if config.smoke else {}
    return {"model": "lenet", "width": None, "depth": None, **recipe, **epochs, **data}


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    train, test = (examples.guess(sample, model, params) for sample in SAMPLES)
    row = shares(train.guess, train.labels, train.true) | {"test": float((test.guess == test.labels).mean())}
    return {name: round(row[name], 5) for name in ("train", "pristine", "corrupt", "test")}


def at_end(table: pd.DataFrame, arm: str, sample: str) -> pd.Series:
    """Accuracy in per cent after the last epoch, by seed."""
    last = table[table["arm"] == arm].groupby("seed").tail(1)
    return 100 * last.set_index("seed")[sample].astype(float)


class Prediction(NamedTuple):
    """A claim of an accuracy after the last epoch, in per cent, against a number."""

    statement: str
    arm: str
    sample: str
    sign: Literal[1, -1]
    number: float
    paper: str


_FEWER = "below the published one, which took 15 times the examples."
_WRONG = "With 60% of the labels wrong the test accuracy of LeNet-5 is"
PREDICTIONS = (
    Prediction(
        "With real labels the MLP fits the training set to one point below the published share, or better.",
        *("real", "train", 1, 98.90, "training 99.90%"),
    ),
    Prediction(f"With real labels the test accuracy of the MLP is {_FEWER}", "real", "test", -1, 98.24, "test 98.24%"),
    Prediction(
        "The MLP memorises a larger share of permuted labels than published, since there are fewer of them.",
        *("permuted", "train", 1, 91.27, "training 91.27%"),
    ),
    Prediction(
        "With half of the labels random the MLP fits more than the 55% that it could by generalising alone.",
        *("half", "train", 1, 55.0, "attainable about 55%"),
    ),
    Prediction(
        f"Without wrong labels the test accuracy of LeNet-5 is {_FEWER}", "lenet0", "test", -1, 99.1, "test 99.1%"
    ),
    Prediction(f"{_WRONG} above the share of right labels.", "lenet60", "test", 1, 40.0, "98.0% against 40%"),
)


def claims(table: pd.DataFrame) -> list[Result]:
    """Each prediction; that permuted labels teach nothing of the test set; and what wrong labels cost LeNet-5."""
    out = list[Result]()
    for each in PREDICTIONS:
        ours, what = at_end(table, each.arm, each.sample), SAMPLES[each.sample].split(" (")[0]
        claim = Claim(each.statement, f"{what} less {each.number:g}%", "points", each.sign, paper=each.paper)
        out.append(claim.judged(ours - each.number, with_spread(ours, "{:.2f}%")))
    chance = Claim(
        f"With permuted labels the test accuracy of the MLP is chance, to {_MARGIN} points.",
        f"{_MARGIN} points less the distance of the test accuracy from {_CHANCE}%",
        *("points", 1),
        paper="test 9.73%",
    )
    permuted = at_end(table, "permuted", "test")
    out.append(chance.judged(_MARGIN - (permuted - _CHANCE).abs(), with_spread(permuted, "{:.2f}%")))
    cost = Claim(
        f"{_WRONG} below that without wrong labels.",
        "test accuracy, 60% wrong less none wrong",
        *("points", -1),
        paper="98.0% against 99.1%",
    )
    right, wrong = (at_end(table, arm, "test") for arm in ("lenet0", "lenet60"))
    out.append(cost.compared(wrong, right, "{:.2f}%"))
    return out


def _table(config: CalibrationConfig, table: pd.DataFrame) -> Table:
    rows = list[tuple[str, ...]]()
    for name, arm in ARMS.items():
        line = [arm.line.label, str(epochs_of(config, arm))]
        for sample in SAMPLES:
            line += [f"{arm.published[sample]:.2f}" if sample in arm.published else "–"]
            line += [with_spread(at_end(table, name, sample), "{:.2f}")]
        rows.append(tuple(line))
    heads = [f"{sample}, {who} [%]" for sample in ("training", "test") for who in ("paper", "ours")]
    note = "Training accuracy by the labels as given, wrong ones too; ± one deviation over seeds."
    return Table("Accuracy after the last epoch", ("training", "epochs", *heads), tuple(rows), note)


def _draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracies against epochs, and the published ones as dashes at the end; the MLP above LeNet-5."""
    figure, axes = figures.grid(2, 2, (11, 7.6))
    for line, lenet in zip(axes, (False, True), strict=True):
        for ax, (sample, label) in zip(line, SAMPLES.items(), strict=True):
            for name, arm in ARMS.items():
                rows = table[table["arm"] == name]
                if arm.lenet != lenet or rows.empty:
                    continue
                figures.band(ax, curve(rows, sample), arm.line)
                if sample in arm.published:
                    height, end = arm.published[sample] / 100, 1.03 * rows["epoch"].max()
                    ax.plot(end, height, marker="_", color=arm.line.color, markersize=16, markeredgewidth=2)
            ax.set_xlabel("epoch")
            ax.set_ylabel(label)
            ends = [at_end(table, name, sample).min() / 100 for name, arm in ARMS.items() if arm.lenet]
            ax.set_ylim(min(0.85, *ends) - 0.05 if lenet and sample == "test" else 0, 1.02)
            figures.percent_axis(ax)
        if line[0].get_legend_handles_labels()[1]:
            line[0].legend(fontsize=9, loc="lower right")
    figures.save(figure, path)


def section(config: CalibrationConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    table = frame(rows)
    pictures: tuple[Figure, ...] = ()
    results, tables = (), ()
    if rows:
        _draw(table, folder / "calibration.png")
        pictures = (Figure("calibration.png", _CAPTION.format(seeds=config.seeds, lenet=config.lenet_seeds)),)
    if rows and set(table["arm"]) == set(ARMS):
        results, tables = tuple(claims(table)), (_table(config, table),)
    values = {name: getattr(config, name) for name in ("data", "batch_size", "learning_rate", "lenet_batch_size")}
    text = tuple(part.format(**values) for part in _TEXT)
    return Section(config.name, "What others published, trained again", text, results, tables, pictures)


_CAPTION = (
    "Accuracy against epochs, of the MLP ({seeds} seed(s), above) and of LeNet-5 ({lenet} seed(s), below). Lines are "
    "means over seeds, bands their 95% intervals; dashes at the right end are the published accuracies "
    "after as many epochs, of networks trained on 60,000 examples; those of LeNet-5 fall with the share of wrong "
    "labels. The axis of its test accuracy does not begin at 0."
)
_TEXT = (
    "Before anything is believed, what others published is trained again. Chatterjee & Mishchenko (2019, "
    "https://arxiv.org/abs/1907.01991) trained an MLP 784-256-256-256-10 on MNIST by Adam with mini-batches of 64: 100 "
    "epochs with real labels, 300 with permuted ones, and with half of the labels random, of which generalising alone "
    "fits about 55%. A replication of Menon et al. (2020, https://github.com/dmizr/phuber) trained LeNet-5 with 0, 20, "
    "40 and 60% of the labels wrong.",
    "What differs here: the training set ({data}) has 4,000 examples instead of 60,000, the test set 1,000 instead of "
    "10,000. So an epoch has a fifteenth of the steps. The learning rate of Adam is {learning_rate} for both networks; "
    "that of the MLP was not published. With half of the labels random the published number of epochs is not known; "
    "100 are taken. LeNet-5 has tanh and average pooling, mini-batches of {lenet_batch_size}, 20 epochs and weight "
    "decay as in the replication, but no decay of the learning rate, no standardised inputs, and the initialisation of "
    "Flax.",
    "With a fifteenth of the examples the published test accuracies cannot be expected. Claims say on which side of "
    "the published number ours must lie, and check what does not depend on the size: permuted labels are memorised and "
    "teach nothing of the test set, and the right labels outweigh the wrong ones.",
)

EXPERIMENT = Experiment(CalibrationConfig(), measure, section)
