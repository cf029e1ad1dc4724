"""Draw docs/architecture.png from the floors of tests/test_architecture.py: `python docs/architecture.py`."""

import runpy
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
# Each column: title, colour, where it begins and ends, and its entries of cg_jax.
COLUMNS: tuple[tuple[str, str, float, float, str], ...] = (
    (
        "common",
        "#d9dce1",
        0.0,
        4.4,
        "_types _jaxprs _leaves trees _compat _validate _compiled _data _loss sharding _per_batch",
    ),
    ("the engine", "#f6c7a5", 4.6, 6.0, "ghost"),
    (
        "measuring",
        "#a9cdee",
        6.2,
        8.8,
        "moments bound metrics batches gradients per_example statistics estimators stream measure",
    ),
    (
        "averaging",
        "#b5dfb4",
        9.0,
        13.0,
        "incoming order_statistics rules weighting slots collective aggregate micro_batch checked coordinatewise "
        "weighted",
    ),
)
RIGHT = COLUMNS[-1][3]


def _box(axes: Any, left: float, right: float, floor: float, text: str, color: str) -> None:
    shape = FancyBboxPatch(
        (left + 0.07, floor + 0.14), right - left - 0.14, 0.72, boxstyle="round,pad=0,rounding_size=0.08", fc=color
    )
    axes.add_patch(shape)
    axes.text((left + right) / 2, floor + 0.5, text, ha="center", va="center", fontsize=8, family="monospace")


def draw(path: Path) -> None:
    """One row for each floor, one box for each module or folder."""
    floors = runpy.run_path(str(HERE.parent / "tests" / "test_architecture.py"))["FLOORS"]
    levels, folders = floors["cg_jax"], {name.removeprefix("cg_jax.") for name in floors}
    figure, axes = plt.subplots(figsize=(12.5, 6.4))
    for floor, names in enumerate(levels[:-1]):
        axes.axhline(floor, color="#eeeeee", zorder=0)
        axes.text(-0.15, floor + 0.5, str(floor + 1), ha="right", va="center", color="gray")
        for _, color, left, right, known in COLUMNS:
            here = [name for name in names if name in known.split()]
            for i, name in enumerate(here):
                width = (right - left) / len(here)
                shown = f"{name}/" if name in folders else name
                _box(axes, left + i * width, left + (i + 1) * width, floor, shown, color)
    missing = {name for names in levels[:-1] for name in names} - {n for *_, known in COLUMNS for n in known.split()}
    if missing:
        raise ValueError(f"Expected a column for every module, got none for {sorted(missing)}.")
    top = len(levels) - 1
    axes.text(-0.15, top + 0.5, str(top + 1), ha="right", va="center", color="gray")
    _box(axes, 0, RIGHT, top, "cg_jax/__init__: the public names", "white")
    _box(axes, 0, RIGHT, top + 1, "experiments/   benchmarks/   tests/   your code", "white")
    for title, _, left, right, _ in COLUMNS:
        axes.text((left + right) / 2, -0.35, title, ha="center", va="center", fontweight="bold")
    axes.set(xlim=(-0.5, RIGHT + 0.1), ylim=(-0.7, top + 2.1))
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw(HERE / "architecture.png")
