"""Robust averages of single examples against medians of mini-batches, over kinds and shares of wrong labels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import tyro

from . import comparison, loop, robust_report
from .comparison import ComparisonConfig
from .configs import TFDS, Hidden, MethodNames
from .data import Noise
from .examples import Examples
from .experiment import Experiment
from .methods import METHODS, PER_SIDE
from .run_folder import RunFolder
from .seconds import keep_seconds
from .section import Row, Section


class Cell(NamedTuple):
    """A way to spoil a training set."""

    label: str
    share: float = 0.0  # of the labels that are changed
    kind: str = "uniform"
    rare: bool = False  # whether most examples of one class are left out
    tuned: str = "uniform40"  # the cell that its learning rates are chosen on


CELLS: dict[str, Cell] = {
    "clean": Cell("no wrong labels", tuned="clean"),
    "uniform20": Cell("20% redrawn", 0.2),
    "uniform40": Cell("40% redrawn", 0.4),
    "uniform50": Cell("50% redrawn", 0.5),
    "class40": Cell("40%, each class to one other", 0.4, "class"),
    "rare": Cell("one class rare", rare=True, tuned="clean"),
    "rare40": Cell("one class rare, 40% redrawn", 0.4, rare=True),
}
CellNames = Annotated[
    tuple[str, ...],
    tyro.conf.arg(constructor_factory=lambda: tuple[tyro.extras.literal_type_from_choices((*CELLS,)), ...]),  # type: ignore[misc]
]


@dataclasses.dataclass(frozen=True)
class RobustConfig(ComparisonConfig):
    """Robust averages of single examples against medians of mini-batches, over kinds and shares of wrong labels.

    `robust`: mnist5k, MLP 784-128-128-10, seven ways to spoil its labels, five seeds; about half an hour on one CPU
    core. `robust --data fashion_mnist --num-train 20000 --epochs 12 --every 1 --seeds 3`: as long. Expect averages of
    examples to memorise fewer wrong labels than M3, and to lose more of a rare class.
    """

    name: Hidden = "robust"

    width: int | None = 128
    """Units of a hidden layer, as in the other experiments."""
    epochs: int = 40
    """Passes over the training set."""
    seeds: int = 5
    """Runs with different initialisation, order and noise; tables show their mean and deviation."""
    every: int = 2
    """Measure every so many epochs, and at the start and the end; the selected epoch is one of them."""
    validation: float = 0.2
    """Share of the training examples that is held out, with its labels as they are, wrong ones too."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Each method takes the one that validates best, once without wrong labels and once with 40% redrawn."""
    coherence: bool = False
    """Measure the coherence of the training sample too; each time costs about an epoch of training."""
    methods: MethodNames = tuple(name for name in METHODS if name not in ("ra3", *PER_SIDE))
    """What is compared; see noise."""
    cells: CellNames = (*CELLS,)
    """clean: labels as they are. uniform20, uniform40, uniform50: so many per cent redrawn uniformly. class40: 40%,
    each class to one other. rare, rare40: the training examples of class 0 cut to the share `rare`, and labels as they
    are, or 40% redrawn."""
    dear_cells: CellNames = ("uniform40", "class40", "rare")
    """Cells that the winsorised mean is measured on too, after all others; its steps are the dearest by far."""
    rare: float = 0.05
    """Share of the training examples of class 0 that rare and rare40 keep."""

    def smaller(self) -> "RobustConfig":
        """The same with two cells and two learning rates."""
        return dataclasses.replace(self, cells=("uniform40", "rare40"), learning_rates=(0.1, 0.3), seeds=1)

    def check(self) -> None:
        """ValueError where cells, rare or what every comparison has are wrong."""
        for name in ("cells", "dear_cells"):
            cells = getattr(self, name)
            if not set(cells) <= set(CELLS) or len(set(cells)) < len(cells):
                raise ValueError(f"Expected {name} to be different ones of {(*CELLS,)}, got {name}={cells}.")
        if not self.cells:
            raise ValueError("Expected cells to be one or more, got cells=().")
        if not 0 < self.rare < 1:
            raise ValueError(f"Expected 0 < rare < 1, got rare={self.rare}.")
        if not self.validation or self.data.startswith(TFDS):
            what = f"validation={self.validation} and data={self.data}"
            raise ValueError(f"Expected validation > 0 and a data set that fits the memory, got {what}.")
        super().check()

    def noise(self, cell: str) -> Noise:
        """What a cell does to the training set."""
        share, kind, rare = CELLS[cell].share, CELLS[cell].kind, self.rare if CELLS[cell].rare else 1.0
        return Noise(share, 0.0, "class" if kind == "class" else "uniform", rare, self.validation)


def measure(config: RobustConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Choose learning rates and train in all cells by all methods, seed by seed; then by those of dear steps."""
    dear = [method for method in config.methods if METHODS[method].dear]
    cheap = [method for method in config.methods if not METHODS[method].dear]
    dear_cells = [cell for cell in config.cells if cell in config.dear_cells]
    loop.train_all(
        config,
        problem,
        folder,
        _tunings(config, cheap, config.cells),
        lambda rows: _trainings(config, cheap, config.cells, rows),
        lambda _: _tunings(config, dear, dear_cells),
        lambda rows: _trainings(config, dear, dear_cells, rows),
    )
    keep_seconds(folder.path)


def _tunings(config: RobustConfig, methods: Sequence[str], cells: Sequence[str]) -> list[loop.Training]:
    return [
        training
        for cell in dict.fromkeys(CELLS[cell].tuned for cell in cells)
        for training in comparison.tunings(config, methods, config.noise(cell), {"cell": cell})
    ]


def _trainings(
    config: RobustConfig, methods: Sequence[str], cells: Sequence[str], rows: Sequence[Row]
) -> list[loop.Training]:
    rates = {
        tuned: comparison.chosen(config, methods, [row for row in rows if row["cell"] == tuned])
        for tuned in dict.fromkeys(CELLS[cell].tuned for cell in cells)
    }
    trainings = [
        comparison.training(config, method, seed, config.noise(cell), rates[CELLS[cell].tuned][method], {"cell": cell})
        for seed in range(config.seed, config.seed + config.seeds)
        for cell in cells
        for method in methods
    ]
    return [each._replace(measure=_short(each.measure)) for each in trainings]


# Measured, and left out of the rows: the same in all of a cell, or the difference of two others.
_LEFT_OUT = ("gap", "chance", "corrupt_share")


def _short(measure: Any) -> Any:
    """The same with shares of four digits, a hundredth of a point, since there are many rows."""

    def measured(examples: Examples, model: nn.Module, params: Any) -> Row:
        return {
            name: round(value, 4) for name, value in measure(examples, model, params).items() if name not in _LEFT_OUT
        }

    return measured


def section(config: RobustConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figures of every cell."""
    labels = {cell: CELLS[cell].label for cell in config.cells}
    return robust_report.section(config, labels, rows, folder)


EXPERIMENT = Experiment(RobustConfig(), measure, section)
