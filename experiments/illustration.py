"""Why the average gradient is strong where examples agree: two drawings and a toy, from real gradients."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cg_jax as cg

from . import illustration_report
from .checkpoint import Position
from .configs import Hidden, SeededConfig
from .devices import together
from .experiment import Experiment
from .illustration_report import METHODS
from .run_folder import RunFolder
from .section import Row, Section

_MEASURED = 16  # steps on a logarithmic grid
_TESTS = 1000


@dataclasses.dataclass(frozen=True)
class IllustrationConfig(SeededConfig):
    """Single examples' gradients and their average: drawings, and a toy by three averages.

    `illustration`: linear regression on inputs drawn by the seed; about half a minute on one CPU core. Expect the
    average to fit corrupt examples by what is their own, and the medians to learn what examples share.
    """

    name: Hidden = "illustration"

    seeds: int = 5
    """Draws of the inputs; figures show their mean and its 95% interval."""
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Examples that the average gradient is taken of, where its size is measured."""
    examples: int = 20
    """Examples of the toy."""
    corrupt: float = 0.25
    """Share of the toy's labels that are turned."""
    steps: int = 4000
    """Steps of descent on all examples of the toy."""
    learning_rate: float = 0.1
    """Step size, of every average."""

    def smaller(self) -> "IllustrationConfig":
        """The same with fewer steps."""
        return dataclasses.replace(self, steps=400)

    def check(self) -> None:
        """ValueError where options are wrong."""
        if len(self.sizes) < 2 or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"Expected sizes to be two or more that rise from 1 or more, got sizes={self.sizes}.")
        if self.steps < 1:
            raise ValueError(f"Expected steps >= 1, got steps={self.steps}.")
        if not 0 < self.learning_rate <= 0.5:
            raise ValueError(f"Expected 0 < learning_rate <= 0.5, got learning_rate={self.learning_rate}.")
        if not 0 < self.corrupt < 0.5 or not round(self.corrupt * self.examples):
            what = f"corrupt={self.corrupt} of examples={self.examples}"
            raise ValueError(f"Expected corrupt to be an example or more and less than half, got {what}.")


class Toy(NamedTuple):
    """A linear regression whose examples share the last input, and have one input each that no other has."""

    inputs: np.ndarray  # [m, m + 1]
    labels: np.ndarray  # [m], 1 or −1
    corrupt: np.ndarray  # [m], whether the label is the wrong one
    tests: np.ndarray  # the shared input of examples whose own input is none of the training's, times their label


def toy(seed: int, examples: int, share: float) -> Toy:
    """Inputs of sizes between ½ and 1½, all of the sign of the true label; then labels are turned."""
    rng = np.random.default_rng(seed)
    true = rng.choice([-1.0, 1.0], examples)
    own, shared = rng.uniform(0.5, 1.5, (2, examples))
    corrupt = np.arange(examples) < round(share * examples)
    inputs = true[:, None] * np.column_stack([np.diag(own), shared])
    return Toy(inputs, np.where(corrupt, -true, true), corrupt, rng.uniform(0.5, 1.5, _TESTS))


def golden(*, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """The inputs [5, 6] and labels [5] of the paper's toy; the last is the test, the sixth input what all share."""
    labels = np.array([1.0, -1.0, -1.0, 1.0, -1.0])
    signs = np.array([1.0, -1.0, -1.0, 1.0, -1.0])[:, None]
    return signs * np.column_stack([np.eye(5), np.full(5, float(shared))]), labels


def loss_fn(w: Any, example: tuple[Any, Any]) -> jax.Array:
    """½ (y − w·x)²."""
    x, y = example
    return 0.5 * (y - w @ x) ** 2


@functools.cache
def _averages() -> dict[str, Callable[..., Any]]:
    """(w, batch) → what each of METHODS makes of the examples' gradients."""
    geometric = cg.weighted_grads(loss_fn, cg.geometric_median(16))
    return {
        "mean": cg.coordinatewise_grads(loss_fn, cg.mean()),
        "median": cg.coordinatewise_grads(loss_fn, cg.median()),
        "geometric": lambda w, batch: geometric(w, batch)[0],
    }


@functools.cache
def _descent(method: str) -> Callable[..., jax.Array]:
    """(w, batch, rate, steps) → w after so many steps along the average."""
    average = _averages()[method]

    def descend(w: jax.Array, batch: Any, rate: float, steps: int) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, w: w - rate * average(w, batch), w)

    return jax.jit(descend)


def _batch(inputs: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.float32)


def measure(config: IllustrationConfig, _: None, folder: RunFolder) -> None:
    """The paper's toy, then seed by seed all of the others, from where the folder's last checkpoint stands."""
    restored = together(folder.restore, lambda: None)
    done = restored[0].part if restored else 0
    parts = [lambda: _of_the_paper(config)]
    parts += [functools.partial(_of_seed, config, config.seed + i) for i in range(config.seeds)]
    for part, rows in enumerate(parts):
        if part < done:
            continue
        if not part:
            folder.save(Position(0, -1, 0, {}), np.zeros(1))
        for row in rows():
            folder.add(**row)
        folder.save(Position(part + 1, -1, 0, {}), np.zeros(1))


def _of_seed(config: IllustrationConfig, seed: int) -> list[Row]:
    """The rows of one seed."""
    return [*_pairs(seed), *_sizes(config, seed), *_descents(config, seed)]


def _of_the_paper(config: IllustrationConfig) -> list[Row]:
    """Where every method ends on the paper's toy, with what all examples share and without it."""
    rows: list[Row] = []
    for shared in (True, False):
        inputs, labels = golden(shared=shared)
        batch = _batch(inputs[:4], labels[:4])
        for method in METHODS:
            w = _descent(method)(jnp.zeros(6), batch, config.learning_rate, config.steps)
            test = float(loss_fn(w, (inputs[4], labels[4])))
            rows.append({"part": "paper", "shared": shared, "method": method, "w": _short(w), "test": _short(test)})
    return rows


def _pairs(seed: int) -> list[Row]:
    """The descent directions of two examples that agree in one input, and of two that have none in common."""
    a, b, c, d = np.random.default_rng(seed).uniform([0.5, 0.5, 0.8, 0.8], [0.9, 0.9, 1.2, 1.2])
    problems = {"agreeing": np.array([(1, a), (1, -b)]), "orthogonal": np.array([(c, 0), (0, d)])}
    rows: list[Row] = []
    for problem, inputs in problems.items():
        w, batch = jnp.zeros(2), _batch(inputs, np.ones(2))
        gradients = cg.per_example_grads(loss_fn)(w, batch)
        alone = w - 0.1 * gradients[0]
        losses = jax.vmap(loss_fn, (None, 0))
        rows.append(
            {
                "part": "pair",
                "problem": problem,
                "seed": seed,
                "directions": _short(-gradients),
                "average": _short(-gradients.mean(0)),
                "r": _short(cg.coherence(cg.grad_moments(loss_fn)(w, batch)).m_coherence),
                "helped": _short((losses(w, batch) - losses(alone, batch))[1]),  # by a step along the other's alone
            }
        )
    return rows


def _sizes(config: IllustrationConfig, seed: int) -> list[Row]:
    """The components of the average gradient of toys of several sizes, before any step."""
    rows: list[Row] = []
    for size in config.sizes:
        inputs, labels, *_ = toy(seed, size, 0.0)
        average = np.abs(_averages()["mean"](jnp.zeros(size + 1), _batch(inputs, labels)))
        row = {"part": "size", "seed": seed, "m": size, "shared": _short(average[-1])}
        rows.append(row | {"own": _short(average[:-1].mean())})
    return rows


def _descents(config: IllustrationConfig, seed: int) -> list[Row]:
    """Descent on the toy by every method, measured on a logarithmic grid of steps."""
    drawn = toy(seed, config.examples, config.corrupt)
    batch = _batch(drawn.inputs, drawn.labels)
    grid = sorted({0, *np.round(np.geomspace(1, config.steps, _MEASURED)).astype(int).tolist()})
    rows: list[Row] = []
    for method in METHODS:
        w, done = jnp.zeros(config.examples + 1), 0
        for step in grid:
            w = _descent(method)(w, batch, config.learning_rate, step - done)
            done = step
            rows.append({"part": "toy", "method": method, "seed": seed, "step": step, **_state(drawn, w)})
    return rows


def _state(drawn: Toy, w: jax.Array) -> Row:
    """Losses on both kinds of examples and on tests, and the weights on what is shared and on what is not."""
    weights = np.asarray(w, float)
    losses = 0.5 * (drawn.labels - drawn.inputs @ weights) ** 2
    return {
        "pristine": _short(losses[~drawn.corrupt].mean()),
        "corrupt": _short(losses[drawn.corrupt].mean()),
        "test": _short((0.5 * (1 - drawn.tests * weights[-1]) ** 2).mean()),
        "shared": _short(weights[-1]),
        "own": _short(np.linalg.norm(weights[:-1])),
    }


def _short(value: Any) -> Any:
    """Numbers of five digits, in lists where there are several."""
    numbers = np.asarray(value, float)
    return [_short(part) for part in numbers] if numbers.ndim else float(f"{float(numbers):.5g}")


def section(config: IllustrationConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figure that follow from what was measured."""
    values = {"examples": config.examples, "corrupt": config.corrupt, "rate": config.learning_rate}
    values |= {"steps": config.steps, "seeds": config.seeds}
    return illustration_report.section(config.name, values, rows, folder)


EXPERIMENT = Experiment(IllustrationConfig(), measure, section)
