"""Whether one explanation reaches from linear regression to deep networks, by mini-batches and by the full batch."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import figures, loop
from .claims import with_spread
from .configs import TFDS, Config, Hidden, described
from .equal_loss import shown, trained, with_gaps
from .experiment import Experiment
from .linear_to_deep_claims import BATCHES, LABELS, LINES, at_losses, claims
from .methods import EPOCH_UNIT
from .models import MODELS
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

KINDS = ("linear", "logistic", "deep_linear", "mlp", "cnn")
# So often a training is measured, about; of the CNN half as often.
_MEASURED = 20


@dataclasses.dataclass(frozen=True)
class LinearToDeepConfig(Config):
    """Whether one explanation reaches from linear regression to deep networks, by mini-batches and by the full batch.

    `linear-to-deep`: 600 examples of mnist5k; linear and logistic regression, a deep linear network, an MLP and a CNN,
    each by SGD and by the full batch; about 10 minutes on one CPU core. The theory expects r of real labels above that
    of random ones everywhere, and their gap below.
    """

    name: Hidden = "linear-to-deep"

    kinds: tuple[str, ...] = KINDS
    """Of linear, logistic, deep_linear, mlp, cnn: what is trained."""
    num_train: int | None = 600
    """Training examples, a multiple of three batch sizes, so that both kinds of steps see the same ones."""
    width: int | None = 64
    """Units of a hidden layer of the deep linear network and the MLP."""
    depth: int | None = 2
    """Hidden layers of the deep linear network and the MLP."""
    width_cnn: int = 4
    """Channels of the CNN's first stage."""
    linear_rate: float = 0.01
    """Step size of linear regression, whose curvature grows with the squared pixels."""
    steps: int = 300
    """Steps with real labels, of either kind."""
    steps_random: int = 1200
    """Steps with random labels."""
    steps_cnn: int = 100
    """Steps of the CNN with real labels, which take longer."""
    steps_random_cnn: int = 240
    """Steps of the CNN with random labels."""
    early: int = 4
    """Measure so many times in the first epoch of mini-batches too, on a logarithmic grid of steps."""
    seeds: int = 5
    """Runs with different initialisation, order and random labels; figures show their mean and its 95% interval."""
    seeds_cnn: int = 3
    """How many of them the CNN has too."""

    def smaller(self) -> "LinearToDeepConfig":
        """The same with two models and few steps."""
        return dataclasses.replace(self, kinds=("linear", "logistic"), steps=40, steps_random=40, early=2)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"Expected kinds among {KINDS}, got kinds={self.kinds}.")
        for name in ("steps", "steps_random", "steps_cnn", "steps_random_cnn", "seeds_cnn", "width_cnn"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {name}={getattr(self, name)}.")
        if not 0 < self.linear_rate < math.inf:
            raise ValueError(f"Expected linear_rate > 0 and finite, got linear_rate={self.linear_rate}.")
        if self.model not in KINDS:
            raise ValueError(f"Expected models by kinds, got model={self.model}.")
        if self.data.startswith(TFDS):
            raise ValueError(f"Expected a data set that is held in memory, got data={self.data}.")

    def check_size(self, num_train: int) -> None:
        """ValueError where the two kinds of steps would not see the same examples."""
        if num_train % (EPOCH_UNIT * self.batch_size):
            what = f"a multiple of {EPOCH_UNIT} mini-batches of batch_size={self.batch_size} to train on"
            raise ValueError(f"Expected {what}, got {num_train} examples.")


def _changes(config: LinearToDeepConfig, kind: str, labels: str, batches: str, num_train: int) -> dict[str, Any]:
    """Options of one training: of the full batch an epoch is one step."""
    sizes = {"mlp": (config.width, config.depth), "deep_linear": (config.width, config.depth)}
    width, depth = sizes.get(kind, (config.width_cnn if kind == "cnn" else None, None))
    all_steps = {"real": (config.steps, config.steps_cnn), "random": (config.steps_random, config.steps_random_cnn)}
    steps = all_steps[labels][kind == "cnn"]
    epochs = steps if batches == "full" else math.ceil(steps * config.batch_size / num_train)
    return {
        "model": kind,
        "width": width,
        "depth": depth,
        "learning_rate": config.linear_rate if kind == "linear" else config.learning_rate,
        "batch_size": num_train // EPOCH_UNIT if batches == "full" else config.batch_size,
        "epochs": epochs,
        "every": math.ceil(epochs / (_MEASURED // 2 if kind == "cnn" else _MEASURED)),
    }


def measure(config: LinearToDeepConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train every model on real and on random labels by both kinds of steps, and measure on the way."""
    trainings = [
        loop.Training(
            f"linear-to-deep · {kind} · {labels} · {BATCHES[batches]} · seed {seed}",
            {"kind": kind, "labels": labels, "batches": batches, "seed": seed},
            # The mean of three mini-batches, which are a third of all examples each, is the full batch.
            "mean3" if batches == "full" else "sgd",
            LABELS[labels],
            trained,
            shown,
            _changes(config, kind, labels, batches, problem.data.num_train),
        )
        for kind in config.kinds
        for labels in LABELS
        for batches in BATCHES
        for seed in range(config.seed, config.seed + seeds_of(config, kind))
    ]
    loop.train_all(config, problem, folder, trainings)


def seeds_of(config: LinearToDeepConfig, kind: str) -> int:
    """How many seeds a model has."""
    return min(config.seeds, config.seeds_cnn) if kind == "cnn" else config.seeds


def _table(kinds: Sequence[str], table: pd.DataFrame) -> Table:
    """α, r and the gap of every model at its least common training loss."""
    lines: list[tuple[str, ...]] = []
    for kind in kinds:
        columns = {name: at_losses(table, kind, name) for name in ("alpha", "r", "gap")}
        for batches, label in BATCHES.items():
            heads = (MODELS[kind].line.label, label)
            losses = columns["r"]["real", batches].index
            if losses.empty:
                lines.append((*heads, "none", *[""] * 6))
                continue
            last = {name: [each[labels, batches].T[losses[-1]] for labels in LABELS] for name, each in columns.items()}
            cells = [with_spread(100 * value if name == "gap" else value) for name in last for value in last[name]]
            lines.append((*heads, f"{losses[-1]:g}", *cells))
    names = ("α", "r", "gap in accuracy [points]")
    heads = ("model", "steps", "training loss", *(f"{name}, {labels}" for name in names for labels in LABELS))
    note = (
        "At the least training loss that all runs of a model reached, of a fixed grid (squared error of linear "
        "regression, nats of the others), interpolated between measurements; ± one deviation."
    )
    return Table("Models at equal training loss", heads, tuple(lines), note)


def _draw(kinds: Sequence[str], table: pd.DataFrame, path: Path) -> None:
    """r and the gap of every model against its training loss."""
    figure, axes = figures.grid(2, len(kinds), (3.2 * max(len(kinds), 3), 6.4))
    for kind, (above, below) in zip(kinds, axes.T, strict=True):
        means = list[float]()
        for (labels, batches), line in LINES.items():
            mine = (table["kind"] == kind) & (table["labels"] == labels) & (table["batches"] == batches)
            r, loss, gap = curve(table[mine], "r", log=True), curve(table[mine], "loss"), curve(table[mine], "gap")
            means += r.mean.tolist()
            figures.against(above, loss, r, line)
            figures.against(below, loss, gap, line)
        figures.coherence_axis(above, "training sample", means)
        figures.percent_axis(below)
        above.set_ylabel("")
        for ax in (above, below):
            ax.invert_xaxis()
            ax.set_xlabel(f"training loss [{'squared error' if kind == 'linear' else 'nats'}]")
        above.set_title(MODELS[kind].line.label, fontsize=10)
    axes[0, 0].set_ylabel("m-coherence r,\ntraining sample [examples]")
    axes[1, 0].set_ylabel("gap in accuracy\n(training − test)")
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def section(config: LinearToDeepConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    results, tables, pictures = (), (), ()
    found = {(row["kind"], row["labels"], row["batches"]) for row in rows}
    if found >= {(kind, *line) for kind in config.kinds for line in LINES}:
        table = with_gaps(frame(rows))
        _draw(config.kinds, table, folder / "linear_to_deep.png")
        results, tables = tuple(claims(config.kinds, table)), (_table(config.kinds, table),)
        pictures = (Figure("linear_to_deep.png", _CAPTION.format(seeds=config.seeds, cnn=config.seeds_cnn)),)
    values = {"data": config.data, "lr": config.learning_rate, "rate": config.linear_rate, "m": config.num_train}
    text = tuple(part.format(**values, batch=config.batch_size) for part in _TEXT)
    return Section(
        config.name, "From linear regression to deep networks", (*text, described(config)), results, tables, pictures
    )


_CAPTION = (
    "m-coherence r of the training sample (above) and the generalisation gap (below) against training loss; training "
    "goes to the right. Lines are means over {seeds} seed(s), of the CNN {cnn}, of r geometric ones; bars are their "
    "95% intervals. The dotted line at r = 1 is the orthogonal limit."
)
_TEXT = (
    "Five models learn the same {m} images ({data}), with real labels and with random ones: linear regression (squared "
    "error against the one-hot label), logistic regression, a deep linear network, an MLP and a CNN. Each is trained "
    "by SGD on mini-batches of {batch} and by the full batch, as many steps with the same step size ({rate} of linear "
    "regression, {lr} of the others).",
    "The theory needs neither depth nor the noise of mini-batches: where gradients of examples agree, the average "
    "moves in a direction that does not depend on any one of them, whatever the model. So r should tell real labels "
    "from random ones, and the gap should follow, in all of them, by the full batch as by SGD. Runs of one model are "
    "compared at the training losses that all of them reached.",
)

EXPERIMENT = Experiment(LinearToDeepConfig(), measure, section)
