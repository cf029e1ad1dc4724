"""How fast pristine and corrupt examples are learnt, and which of them make up the average gradient."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import numpy as np
import pandas as pd

from . import figures, loop
from .claims import Claim, Result, with_spread
from .configs import Hidden
from .examples import Examples
from .experiment import Experiment
from .learning import LearningConfig, accuracy, by_run, crossing, part_of, per_example, reached, rounded, share_of
from .line import Line
from .run_folder import RunFolder
from .section import Figure, Row, Section, Table, curve, frame

# So many times the steps of the noise-free run count as nearly its speed.
NEARLY = 2.0
# The shares of examples whose steps are compared.
_HALF, _MOST = 0.5, 0.9


@dataclasses.dataclass(frozen=True)
class NoisyLabelsConfig(LearningConfig):
    """How fast pristine and corrupt examples are learnt, and which of them make up the average gradient.

    `noisy-labels`: mnist5k without noise and with 25% and 50% of the labels redrawn, MLP 784-256-256-10; about
    4 minutes on one CPU core for five seeds.
    """

    name: Hidden = "noisy-labels"

    epochs: int = 60
    noises: tuple[float, ...] = (0.25, 0.5)
    """Shares of the training labels that are redrawn; claims are about the largest."""

    def smaller(self) -> Self:
        """With one noise, measured at few steps."""
        return dataclasses.replace(super().smaller(), noises=self.noises[-1:])

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        noises = self.noises
        if not noises or len(set(noises)) < len(noises) or any(not 0 < noise < 1 for noise in noises):
            raise ValueError(f"Expected noises to be different, > 0 and < 1, at least one, got noises={noises}.")
        super().check()

    def check_size(self, num_train: int) -> None:
        """ValueError where not one label would be changed."""
        if not round(min(self.noises) * num_train):
            raise ValueError(f"Expected noises to be a label or more of {num_train}, got noises={self.noises}.")


def measure(config: NoisyLabelsConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train without noise and with it, seed by seed, and look at every example on the way."""
    trainings = [
        loop.Training(
            f"{config.name} · noise {noise:g} · seed {seed}",
            {"noise": noise, "seed": seed},
            "sgd",
            (noise, 0.0),
            functools.partial(_measurement, seed),
            lambda row: {"loss": f"{row['loss']:.3f}", "test": f"{row['test']:.3f}"},
        )
        for noise in (0.0, *config.noises)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    loop.train_all(config, problem, folder, trainings)


def _measurement(seed: int, examples: Examples, model: nn.Module, params: Any) -> Row:
    """Shares of ‖ḡ‖² and of fitted examples; the shuffled tags are the same along a training."""
    each = per_example(examples, model, params)
    pristine = ~each.corrupt
    shuffled = np.random.default_rng(seed).permutation(pristine)
    return rounded(
        {
            "pristine": share_of(pristine),
            "share": part_of(each.along, pristine),
            "share_corrupt": part_of(each.along, each.corrupt),
            "share_shuffled": part_of(each.along, shuffled),
            "fitted_pristine": share_of(each.fitted[pristine]),
            "fitted_corrupt": share_of(each.fitted[each.corrupt]),
            "loss": float(each.losses.mean()),
            "alpha": each.alpha,
            "test": accuracy(examples, model, params),
        }
    )


def _early(run: pd.DataFrame, column: str) -> float:
    """The mean over the measured steps of the first epoch, without step 0."""
    return float(run[column][(run["epoch"] > 0) & (run["epoch"] <= 1)].mean())


def _crossing(run: pd.DataFrame) -> float:
    return crossing(run, "share_corrupt")


def _stated(noise: float) -> tuple[Claim, ...]:
    """What is predicted where so many labels are redrawn."""
    at = f"With {noise:.0%} of the labels redrawn"
    return (
        Claim(
            f"{at}, pristine examples make up more of the average gradient in the first epoch than their number says.",
            "share of ‖ḡ‖² of the pristine, less that of as many examples by shuffled tags, mean over the first epoch",
            "of ‖ḡ‖²",
            1,
        ),
        Claim(
            f"{at}, it takes more steps to fit half of the corrupt examples, as labelled, than half of the pristine.",
            "steps until half are fitted, corrupt over pristine",
            "×",
            1,
            "ratio",
        ),
        Claim(
            f"{at}, half of the pristine examples are fitted in less than {NEARLY:g} times the steps that the "
            "noise-free run takes to fit half of its examples.",
            f"steps until half are fitted, pristine over {NEARLY:g} times noise-free",
            "×",
            -1,
            "ratio",
        ),
        Claim(
            f"{at}, corrupt examples come to make up more of the average gradient than pristine ones, and that after "
            "90% of the pristine are fitted.",
            "step, after the first epoch, at which the corrupt share of ‖ḡ‖² passes the pristine one, over the step "
            "with 90% of the pristine fitted",
            "×",
            1,
            "ratio",
        ),
    )


def claims(table: pd.DataFrame, noise: float) -> tuple[Result, ...]:
    """Four, of the trainings with this noise beside those without."""
    noisy, clean = table[table["noise"] == noise], table[table["noise"] == 0]

    def steps(runs: pd.DataFrame, kind: str = "pristine", level: float = _HALF) -> pd.Series:
        return by_run(runs, functools.partial(reached, column=f"fitted_{kind}", level=level))

    def early(column: str) -> pd.Series:
        return by_run(noisy, functools.partial(_early, column=column))

    stronger, later, nearly, crossed = _stated(noise)
    return (
        stronger.compared(early("share"), early("share_shuffled")),
        later.compared(steps(noisy, "corrupt"), steps(noisy)),
        nearly.compared(steps(noisy), NEARLY * steps(clean)),
        crossed.compared(by_run(noisy, _crossing), steps(noisy, level=_MOST)),
    )


def _table(table: pd.DataFrame) -> Table:
    """The steps of each noise."""
    lines = []
    for noise, runs in table.groupby("noise"):
        steps = [
            by_run(runs, functools.partial(reached, column=f"fitted_{kind}", level=level))
            for kind in ("pristine", "corrupt")
            for level in (_HALF, _MOST)
        ]
        steps.append(by_run(runs, _crossing))
        early = by_run(runs, lambda run: _early(run, "share"))
        cells = ("–" if each.isna().any() else with_spread(each, "{:.0f}") for each in steps)
        lines.append((f"{noise:.0%}", *cells, f"{runs['pristine'].mean():.2f}", with_spread(early, "{:.2f}")))
    heads = [f"{kind}: {level:.0%} fitted [step]" for kind in ("pristine", "corrupt") for level in (_HALF, _MOST)]
    note = "A dash: not every run reached it. ± one deviation over seeds."
    columns = ("noise", *heads, "crossing [step]", "pristine examples [share]", "their share of ‖ḡ‖², first epoch")
    return Table("Steps until examples are fitted as labelled", columns, tuple(lines), note)


_SHARES = {
    "share": Line("pristine", "tab:blue"),
    "share_corrupt": Line("corrupt", "tab:red", "--"),
    "share_shuffled": Line("shuffled tags (null)", "tab:gray", ":"),
}
_FREE = Line("noise-free run", "black", "-.")


def _draw(table: pd.DataFrame, noises: tuple[float, ...], path: Path) -> None:
    """Shares of the average gradient above, learnt examples below; a column for each noise."""
    figure, axes = figures.grid(2, len(noises), (5.5 * len(noises), 7.2))
    for (above, below), noise in zip(axes.T, noises, strict=True):
        runs = table[table["noise"] == noise]
        for column, line in _SHARES.items():
            figures.band(above, curve(runs, column), line)
        above.axhline(runs["pristine"].mean(), color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        above.set_ylim(-0.6, 1.6)
        above.set_ylabel("share of ‖ḡ‖²")
        figures.band(below, curve(table[table["noise"] == 0], "fitted_pristine"), _FREE)
        for kind in ("pristine", "corrupt"):
            line = _SHARES["share" if kind == "pristine" else "share_corrupt"]
            figures.band(below, curve(runs, f"fitted_{kind}"), line)
        below.set_ylim(0, 1.02)
        below.set_ylabel("share fitted as labelled")
        above.set_title(f"{noise:.0%} of the labels redrawn", fontsize=10)
        for ax in (above, below):
            figures.percent_axis(ax)
            figures.epoch_axis(ax, runs["epoch"].to_numpy(float))
            ax.set_xlim(0, runs["epoch"].max())
    handles, labels = axes[0, 0].get_legend_handles_labels()
    free = axes[1, 0].get_legend_handles_labels()
    figure.legend([*handles, free[0][0]], [*labels, free[1][0]], loc="outside upper center", ncols=4, fontsize=9)
    figures.save(figure, path)


def section(config: NoisyLabelsConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the table and the figure that follow from what was measured."""
    title = "Noisy labels: pristine examples first"
    values = {"data": config.data, "lr": config.learning_rate, "batch": config.batch_size, "nearly": NEARLY}
    text = tuple(part.format(**values) for part in _TEXT)
    table = frame(rows)
    noises = (0.0, *config.noises)
    complete = {(row["noise"], row["seed"]) for row in rows} >= {
        (noise, seed) for noise in noises for seed in range(config.seed, config.seed + config.seeds)
    }
    if not complete:
        return Section(config.name, title, text, (), (), ())
    _draw(table, config.noises, folder / "noisy_labels.png")
    picture = Figure("noisy_labels.png", _CAPTION.format(seeds=config.seeds))
    return Section(config.name, title, text, claims(table, max(config.noises)), (_table(table),), (picture,))


_CAPTION = (
    "Above: shares of the squared average gradient ‖ḡ‖² that come from pristine and from corrupt examples, which add "
    "up to 1, and from as many examples as are pristine, chosen at random (shuffled tags); the dotted black line is "
    "the number of pristine examples as a share. Shares lie outside 0 and 1 where the two groups pull against each "
    "other; the axis is cut. Below: the share of examples that are predicted as they are labelled, beside that of the "
    "run without noise. Lines are means over {seeds} seed(s), bands their 95% intervals."
)
_TEXT = (
    "A share of the training labels ({data}) is redrawn uniformly, and the same network is trained by SGD (learning "
    "rate {lr}, mini-batches of {batch}) from the same start and in the same order as without noise. An example is "
    "corrupt where its label really changed, and pristine otherwise.",
    "With ḡ the average gradient over the training sample and ḡ_p the part of that sum which pristine examples give, "
    "⟨ḡ, ḡ_p⟩ / ‖ḡ‖² is the share of the pristine: how much of the decrease of the training loss in a small step is "
    "theirs. It comes from the exact inner product of every example's gradient with the average. The theory says that "
    "pristine examples agree, so that they give more than their number, while corrupt ones cancel; that pristine "
    "examples are therefore learnt nearly as fast as without noise, and corrupt ones later, when the pristine are "
    "fitted and their gradients gone. The null is the share of as many examples chosen at random, whose expectation "
    "is their number.",
    "Nearly as fast means in less than {nearly:g} times the steps, which was fixed beforehand: with half of the labels "
    "redrawn a mini-batch holds 55% as many pristine examples, so that 1.8 times the steps see as many of them.",
)

EXPERIMENT = Experiment(NoisyLabelsConfig(), measure, section)
