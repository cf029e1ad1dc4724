"""Whether width and depth change coherence and generalisation, and whether deep linear networks amplify."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

from . import data, loop
from .amplification import directions, measured_linear, with_share
from .configs import TFDS, Config, Hidden, described
from .equal_loss import measured, shown, with_gaps
from .experiment import Experiment
from .run_folder import RunFolder
from .section import Figure, Row, Section, frame
from .sizes import RANDOM_LOSS, Sweep, Sweeps, claims, draw_linear, draw_sizes, table_of

# What is trained beside the MLP of the options.
_MODELS = ("mlp", "deep_linear", "logistic")
# Networks of so many units a layer are trained for fewer epochs.
_WIDE = 1024


@dataclasses.dataclass(frozen=True)
class WidthDepthConfig(Config):
    """Whether width and depth change coherence and generalisation, and whether deep linear networks amplify.

    `width-depth`: mnist5k, MLPs of 32 to 2048 units and of 1 to 8 hidden layers, deep linear networks of up to 4; about
    15 minutes on one CPU core. The theory expects r to rise, and the gap to fall, with width and with depth.
    """

    name: Hidden = "width-depth"

    width: int | None = 128
    """Units of a hidden layer where the depth differs."""
    depth: int | None = 2
    """Hidden layers where the width differs."""
    widths: tuple[int, ...] = (32, 128, 512, 2048)
    """Units of a hidden layer; the least is compared with the most."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Hidden layers; the fewest are compared with the most."""
    linear_depths: tuple[int, ...] = (0, 1, 2, 4)
    """Hidden layers of deep linear networks, 0 for logistic regression; the fewest are compared with the most."""
    random_widths: tuple[int, ...] = (128, 512)
    """Of these widths random labels are learnt as well."""
    epochs: int = 24
    """Passes over the training set."""
    epochs_wide: int = 8
    """Passes of networks of 1024 units or more."""
    epochs_random: int = 60
    """Passes over random labels."""
    every: int = 2
    """Measure every so many epochs, and at the start and the end; of random labels every fifth."""
    early: int = 6
    """Measure so many times in the first epoch too, on a logarithmic grid of steps; of wide networks two fewer."""
    seeds: int = 5
    """Runs with different initialisation and order; figures show their mean and its 95% interval."""

    def smaller(self) -> "WidthDepthConfig":
        """The same with small networks, few of them."""
        sizes = {"widths": (4, 8), "depths": (1, 2), "linear_depths": (0, 1), "random_widths": (4,)}
        return dataclasses.replace(self, **sizes, depth=1, epochs_wide=2, epochs_random=2, early=2, every=1)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        for name, least in (("widths", 1), ("depths", 1), ("linear_depths", 0)):
            sizes = getattr(self, name)
            if len(set(sizes)) < 2 or min(sizes) < least:
                raise ValueError(f"Expected {name} to be two or more, each >= {least}, got {name}={sizes}.")
        if not set(self.random_widths) <= set(self.widths):
            raise ValueError(f"Expected random_widths among {self.widths}, got random_widths={self.random_widths}.")
        for name in ("epochs_wide", "epochs_random"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {name}={getattr(self, name)}.")
        if self.model not in _MODELS or (self.model != "logistic" and not (self.width and self.depth)):
            options = f"model={self.model}, width={self.width} and depth={self.depth}"
            raise ValueError(f"Expected model=mlp with a width and a depth, got {options}.")
        if self.data.startswith(TFDS):
            raise ValueError(f"Expected a data set that is held in memory, got data={self.data}.")


class Cell(NamedTuple):
    """One network and the labels that it learns."""

    model: str  # mlp or deep_linear
    width: int
    depth: int
    labels: str


def cells(config: WidthDepthConfig) -> list[Cell]:
    """All that are trained, each once."""
    assert config.width is not None
    assert config.depth is not None
    wide = [Cell("mlp", width, config.depth, "real") for width in config.widths]
    deep = [Cell("mlp", config.width, depth, "real") for depth in config.depths]
    linear = [Cell("deep_linear", config.width, depth, "real") for depth in config.linear_depths]
    random = [Cell("mlp", width, config.depth, "random") for width in config.random_widths]
    return list(dict.fromkeys([*wide, *deep, *linear, *random]))


def _changes(config: WidthDepthConfig, cell: Cell) -> dict[str, Any]:
    if cell.model == "deep_linear" and not cell.depth:
        return {"model": "logistic", "depth": None}
    changes: dict[str, Any] = {"model": cell.model, "width": cell.width, "depth": cell.depth}
    if cell.labels == "random":
        return changes | {"epochs": config.epochs_random, "every": min(5, config.epochs_random)}
    wide = {"epochs": config.epochs_wide, "early": max(config.early - 2, 0)}
    return changes | (wide if cell.width >= _WIDE else {})


def measure(config: WidthDepthConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train every network, all seeds of one after another, and measure on the way."""
    loaded = data.load(config.data, folder=config.data_dir, num_train=config.num_train)
    strengths = directions(loaded.train_images, loaded.train_labels, loaded.num_classes)
    linear = functools.partial(measured_linear, strengths, problem.data.image_shape)
    trainings = [
        loop.Training(
            f"width-depth · {cell.model} {cell.width} × {cell.depth} · {cell.labels} · seed {seed}",
            {**cell._asdict(), "seed": seed},
            "sgd",
            (1.0, 1.0) if cell.labels == "random" else (0.0, 0.0),
            linear if cell.model == "deep_linear" else measured,
            shown,
            _changes(config, cell),
        )
        for cell in cells(config)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    loop.train_all(config, problem, folder, trainings)


def sweeps(config: WidthDepthConfig) -> Sweeps:
    """By width, by depth, and by the depth of linear networks."""
    assert config.width is not None
    assert config.depth is not None
    return (
        Sweep("mlp", "width", config.widths, config.depth, f"With {config.depth} hidden layers"),
        Sweep("mlp", "depth", config.depths, config.width, f"With {config.width} units a layer"),
        Sweep("deep_linear", "depth", config.linear_depths, config.width, "Without ReLU"),
    )


def section(config: WidthDepthConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figures that follow from what was measured."""
    results, tables, pictures = (), (), ()
    found = {(row["model"], row["width"], row["depth"], row["labels"]) for row in rows}
    if found >= set(cells(config)):
        table, compared = with_share(with_gaps(frame(rows))), sweeps(config)
        draw_sizes(compared, table, folder / "width_depth.png")
        draw_linear(compared, table, folder / "linear.png")
        results, tables = tuple(claims(compared, table)), (table_of(compared, table),)
        pictures = (
            Figure("width_depth.png", _CAPTION.format(seeds=config.seeds)),
            Figure("linear.png", _LINEAR_CAPTION.format(seeds=config.seeds, loss=RANDOM_LOSS)),
        )
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size}
    text = tuple(part.format(**values, depth=config.depth, width=config.width) for part in _TEXT)
    return Section(config.name, "Width and depth", (*text, described(config)), results, tables, pictures)


_CAPTION = (
    "m-coherence r of the training sample and the generalisation gap, in accuracy and in loss, when the training loss "
    "falls through three values, against width (above) and depth (below). Real labels. Points are means over {seeds} "
    "seed(s), of r geometric ones; bands are their 95% intervals. A point is left out where a seed did not get there."
)
_LINEAR_CAPTION = (
    "Networks without ReLU, by hidden layers: the share of the strongest common direction in what was learnt, and r, "
    "against training loss. On the right r of real and of random labels against width, at training loss {loss}. Means "
    "over {seeds} seed(s), of r geometric ones; bars and bands are their 95% intervals."
)
_TEXT = (
    "MLPs of several widths, with {depth} hidden layers, and of several depths, with {width} units a layer, learn the "
    "same images ({data}) by plain SGD (learning rate {lr}, mini-batches of {batch}). Larger networks learn faster, so "
    "all are compared when their training loss is the same.",
    "The theory says that layers amplify each other: a direction that many examples share grows in one layer, which "
    "makes its gradient larger in all others. Deep networks should then favour such directions over weaker ones more "
    "than shallow ones do. Networks without ReLU show this alone: their outputs are W x + b whatever their depth. "
    "The singular directions u_k, v_k of (1/m) Σ (onehot(y) − 1/classes) xᵀ are what the images of a class have in "
    "common, the first one the strongest. Of the change W − W₀ during training, g_k = u_k · (W − W₀) v_k lies along "
    "direction k, and the share of the strongest is g₁² / Σ g_k². Feedback needs two layers or more: without hidden "
    "layers (logistic regression) there is none.",
)

EXPERIMENT = Experiment(WidthDepthConfig(), measure, section)
