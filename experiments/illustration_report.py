"""What the drawings and the toy say: claims, tables and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import figures
from .claims import Claim, Result, with_spread
from .line import Line
from .section import Figure, Row, Section, Table, curve, frame

METHODS = {
    "mean": Line("gradient descent", "tab:blue"),
    "median": Line("coordinate median", "tab:orange", "--"),
    "geometric": Line("geometric median", "tab:green", "-."),
}
_COMPONENTS = {
    "shared": Line("along the shared input", "black"),
    "own": Line("along each example's own", "tab:gray", "--"),
}


def _of(rows: list[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def claims(rows: list[Row]) -> list[Result]:
    """What agrees adds up; what is one example's own is fitted by the mean, and not by medians."""
    sizes = pd.DataFrame(_of(rows, "size"))
    ratio = pd.DataFrame({m: own["shared"] / own["own"] for m, own in sizes.set_index("seed").groupby("m")})
    least, most = int(ratio.columns.min()), int(ratio.columns.max())
    results = [
        Claim(
            "The average gradient keeps its size along what examples share, and loses it as 1/m along what is their "
            "own.",
            f"component along the shared input over that along an own one, at m = {most} over that at m = {least}",
            "×",
            1,
            "ratio",
            paper=f"{most / least:g}",
        ).compared(pd.Series(ratio[most]), pd.Series(ratio[least]))
    ]
    toy = frame(_of(rows, "toy"))
    last = toy[toy["step"] == toy["step"].max()]
    for method in ("median", "geometric"):
        label = METHODS[method].label
        fits = f"Gradient descent fits corrupt examples of the toy, and the {label} does not, at the last step."
        better = f"The {label} has the lower test loss on the toy, at the last step."
        corrupt, test = f"loss of corrupt examples, {label} less gradient descent", f"test loss, {label} less the same"
        results += [
            Claim(fits, corrupt, "of ½ (y − w·x)²", 1).compared(*_against_descent(last, "corrupt", method)),
            Claim(better, test, "of ½ (y − w·x)²", -1).compared(*_against_descent(last, "test", method)),
        ]
    return results


def _against_descent(last: pd.DataFrame, column: str, method: str) -> tuple[pd.Series, pd.Series]:
    """A column of a method and of gradient descent, of each seed."""
    first, second = (last[last["method"] == each].set_index("seed")[column] for each in (method, "mean"))
    return pd.Series(first), pd.Series(second)


# What the paper's toy gives in closed form: where descent ends and its test loss, by (method, shared).
_PAPER = {
    ("mean", True): ("(0.2, 0.2, 0.2, 0.2, 0, 0.8)", "0.02"),
    ("mean", False): ("(1, 1, 1, 1, 0, 0)", "0.5"),
    ("median", True): ("(0, 0, 0, 0, 0, 1)", "0"),
    ("median", False): ("(0, 0, 0, 0, 0, 0)", "0.5"),
}


def _tables(rows: list[Row]) -> tuple[Table, ...]:
    lines = []
    for row in _of(rows, "paper"):
        end = f"({', '.join(f'{abs(round(w, 3)):g}' for w in row['w'])})"
        paper = _PAPER.get((row["method"], row["shared"]), ("–", "–"))
        data = "real" if row["shared"] else "random"
        lines.append((f"{data}, {METHODS[row['method']].label}", paper[0], end, paper[1], f"{row['test']:.3g}"))
    heads = ("data, method", "end, paper", "end, ours", "test loss, paper", "test loss, ours")
    note = "Four examples, six inputs, of which the sixth is shared (real) or 0 (random); no seeds."
    paper = Table("The paper's toy", heads, tuple(lines), note)
    pairs, lines = pd.DataFrame(_of(rows, "pair")), []
    for problem in ("agreeing", "orthogonal"):
        own = pairs[pairs["problem"] == problem]
        lines.append((problem, with_spread(own["r"]), with_spread(own["helped"])))
    note = "helped: how far a step of size 0.1 along the gradient of the first example alone lowers the second's loss."
    return paper, Table("Two examples", ("gradients", "m-coherence r", "helped"), tuple(lines), note)


_NAMES = ("first example", "second example", "average")
_GREYS = (Line("", "tab:blue"), Line("", "tab:red", "--"), Line("", "black"))


def _arrows(ax: Any, row: Row) -> None:
    """The descent directions of two examples and their average, as arrows from one point."""
    vectors = np.array([*row["directions"], row["average"]])
    for vector, name, line in zip(vectors, _NAMES, _GREYS, strict=True):
        wide = 2.6 if name == "average" else 1.5
        arrow = {"arrowstyle": "-|>", "color": line.color, "linestyle": line.style, "linewidth": wide}
        ax.annotate("", vector, (0, 0), arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 15})
        ax.text(vector[0] + 0.08, vector[1] + 0.06, name, va="bottom", fontsize=9, color=line.color)
    ax.set_xlim(-0.25, 1.9)
    ax.set_ylim(-1.05, 1.45)
    ax.set_aspect("equal", adjustable="box")
    ax.axhline(0, color="black", linewidth=0.5)
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_title(f"{row['problem']}: r = {row['r']:.2f} of 2", fontsize=10)
    ax.set_xlabel("first weight, direction of descent")
    ax.set_ylabel("second weight, direction of descent")


def _draw(rows: list[Row], path: Path) -> None:
    """Both drawings of the first seed; the average gradient against m; the toy against steps."""
    figure, axes = figures.grid(2, 3, (13, 8.5))
    for ax, row in zip(axes[0], _of(rows, "pair")[:2], strict=False):
        _arrows(ax, row)
    sizes = frame([row | {"step": 0, "epoch": row["m"]} for row in _of(rows, "size")])
    for column, line in _COMPONENTS.items():
        figures.band(axes[0, 2], curve(sizes, column, log=True), line)
    ms = sorted(sizes["m"].unique())
    axes[0, 2].set_xscale("log")
    axes[0, 2].set_xticks(ms, [str(m) for m in ms])
    axes[0, 2].minorticks_off()
    axes[0, 2].set_xlabel("examples m that are averaged")
    axes[0, 2].set_ylabel("component of the average gradient")
    figures.log_axis(axes[0, 2])
    axes[0, 2].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
    toy = frame([row | {"epoch": row["step"]} for row in _of(rows, "toy")])
    panels = (
        ("corrupt", "loss of corrupt examples, as labelled"),
        ("test", "test loss"),
        ("own", "distance of the weights from\nthe shared direction"),
    )
    for ax, (column, name) in zip(axes[1], panels, strict=True):
        for method, line in METHODS.items():
            along = curve(toy[toy["method"] == method], column)
            figures.band(ax, along, line)
            figures.epoch_axis(ax, along.epoch)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_ylabel(name)
    figures.legend(figure, axes[1, 0])
    figures.save(figure, path)


def section(name: str, values: Mapping[str, Any], rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figure, of the seeds of which all was measured."""
    title, text = "Where examples agree", tuple(part.format(**values) for part in _TEXT)
    end = {"part": "toy", "method": [*METHODS][-1], "step": values["steps"]}
    whole = {row["seed"] for row in rows if all(row.get(key) == value for key, value in end.items())}
    rows = [row for row in rows if row["part"] == "paper" or row["seed"] in whole]
    if not whole:
        return Section(name, title, text, (), (), ())
    _draw(rows, folder / "illustration.png")
    pictures = (Figure("illustration.png", _CAPTION.format(**values)),)
    return Section(name, title, text, tuple(claims(rows)), _tables(rows), pictures)


_CAPTION = (
    "Above: descent directions of two examples of a linear regression and their average (the thick arrow), drawn to "
    "one scale, where the examples agree in the first weight and where their gradients are orthogonal; and the size of"
    " the average gradient's components against the number of examples. Below: the toy by three averages against "
    "steps. Lines are means over {seeds} seed(s), bands their 95% intervals; the drawings are those of the first seed."
)
_TEXT = (
    "The theory begins with a picture: along a direction in which gradients of examples agree, their average is as "
    "strong as each; along one that is a single example's own it is 1/m as strong. Where all gradients are orthogonal,"
    " nothing that one example asks for helps another, and descent can but fit them one by one: brute force. Both "
    "drawings are of the gradients of two examples at w = 0, of the loss ½(y − w·x)² with y = 1.",
    "The toy is that of the paper with more examples and sizes drawn by the seed: example i has an input that no other"
    " has and one that all share, both of the sign of its true label and of sizes drawn between ½ and 1½. Of its "
    "{examples} examples {corrupt:.0%} have the label of the other sign. Tests have their own input where no training "
    "example has one, so that only the shared weight predicts them. Descent takes {steps:,} steps of size {rate} on "
    "all examples: along the mean of the gradients, along the median of each coordinate, and along the geometric "
    "median (16 iterations of Weiszfeld's method). A coordinate that is one example's own has one gradient that is "
    "not zero, which the coordinate median ignores. The geometric median weighs examples down whose gradient is far "
    "from most others.",
)
