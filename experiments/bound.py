"""Theorem 1 of the theory along real and random runs: what it says of the generalisation gap, and what was measured."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import cg_jax as cg

from . import bound_report, loop, models
from .arrays import OnDevices
from .bound_report import LABELS
from .configs import TFDS, Config, Hidden
from .examples import Examples
from .experiment import Experiment
from .methods import EPOCH_UNIT
from .run_folder import RunFolder
from .section import Row, Section

# Of the largest eigenvalue: how many examples it is estimated on, and by how many products with their Hessians.
EXAMPLES, ITERATIONS = 32, 20


@dataclasses.dataclass(frozen=True)
class BoundConfig(Config):
    """The stability bound of Theorem 1 along runs with real, half random and random labels.

    `bound`: mnist5k, MLP 784-128-10, nested training sets of 450 to 3,600 examples, 5 seeds, as many steps for all;
    about 8 minutes on one CPU core. Expect the bound in the order of the measured gap, and far above it.
    """

    name: Hidden = "bound"

    sizes: tuple[int, ...] = (450, 900, 1800, 3600)
    """Training examples, the first so many of the set. Each is a multiple of 3 mini-batches and divides the largest."""
    seeds: int = 5
    """Runs with different initialisation, order and labels; figures show their mean and its 95% interval."""
    width: int | None = 128
    """Units of the hidden layer."""
    depth: int | None = 1
    """Hidden layers."""
    learning_rate: float = 0.05
    """Step size of SGD, constant; no momentum."""
    epochs: int = 20
    """Passes over the largest training set; smaller ones are passed over more often, in as many steps."""
    every: int = 2
    """Measure every so many passes over the largest training set, and at the start and the end."""
    early: int = 7
    """Measure so many times in the first epoch of every training set too, on a logarithmic grid of steps."""

    def smaller(self) -> "BoundConfig":
        """The same with two small training sets."""
        return dataclasses.replace(self, sizes=(60, 240), early=2, every=1)

    def check(self) -> None:
        """ValueError where sizes, or what the bound does not hold for, are wrong."""
        unit, sizes = EPOCH_UNIT * self.batch_size, self.sizes
        if len(sizes) < 2 or any(size < unit or size % unit or sizes[-1] % size for size in sizes):
            what = f"two or more multiples of {unit} = {EPOCH_UNIT} × batch_size that divide the last"
            raise ValueError(f"Expected sizes to be {what}, got sizes={sizes}.")
        if any(after <= before for before, after in itertools.pairwise(sizes)):
            raise ValueError(f"Expected sizes to rise, got sizes={sizes}.")
        if self.data.startswith(TFDS) or self.estimator != "exact":
            what = f"data={self.data} and estimator={self.estimator}"
            raise ValueError(f"Expected a data set that fits the memory and estimator=exact, got {what}.")
        if self.decay_at or self.weight_decay:
            what = f"decay_at={self.decay_at} and weight_decay={self.weight_decay}"
            raise ValueError(f"Expected a constant step size and no weight decay, got {what}.")


def measure(config: BoundConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on every training set with every kind of labels, and measure on the way."""
    trainings = [
        _training(config, size, labels, seed)
        for size in config.sizes
        for labels in LABELS
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    loop.train_all(config, problem, folder, trainings)


def _training(config: BoundConfig, size: int, labels: str, seed: int) -> loop.Training:
    passes, share = config.sizes[-1] // size, LABELS[labels].share
    return loop.Training(
        f"bound · m = {size} · {labels} · seed {seed}",
        {"size": size, "labels": labels, "seed": seed},
        "sgd",
        (share, share),
        _measurement,
        lambda row: {"train": f"{row['train']['loss']:.3f}", "test": f"{row['test']['loss']:.3f}"},
        {"num_train": size, "epochs": passes * config.epochs, "every": passes * config.every},
    )


def _measurement(examples: Examples, model: nn.Module, params: Any) -> Row:
    """Both samples' coherence, loss and accuracy; what the theorem's constants are estimated by."""
    row: Row = {}
    for sample in ("train", "test"):
        coherence, seen = examples.measure(sample, model, params)
        row[sample] = {
            "alpha": _short(coherence.alpha),
            "alpha_unbiased": _short(coherence.alpha_unbiased),
            "loss": _short(coherence.loss),
            "accuracy": _short((seen.guess == seen.labels).mean()),
        }
    images, labels = cast(OnDevices, examples).arrays("train")
    norms = cg.per_example_sq_norms(models.loss_of(model))(params, (images, labels))
    row["lipschitz"] = _short(np.sqrt(np.sum(jax.tree.leaves(norms), 0, dtype=float).max()))
    row["smoothness"] = _short(_smoothness(model)(params, (images[:EXAMPLES], labels[:EXAMPLES])).max())
    return row


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


@functools.cache
def _smoothness(model: nn.Module) -> Callable[..., jax.Array]:
    """(params, batch) → [B], `smoothness` of the model's loss, compiled once."""
    return jax.jit(functools.partial(smoothness, models.loss_of(model)))


def smoothness(loss_fn: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """The largest |eigenvalue| of the Hessian of each example's loss [B], by power iteration; from below."""
    flat, unravel = ravel_pytree(params)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)

    def of_one(example: Any) -> jax.Array:
        grad = jax.grad(lambda w: loss_fn(unravel(w), example))

        def product(vector: jax.Array) -> jax.Array:
            norm = jnp.linalg.norm(vector)
            unit = jnp.where(norm > 0, vector / jnp.where(norm > 0, norm, 1), 0)
            return jax.jvp(grad, (flat,), (unit,))[1]

        return jnp.linalg.norm(jax.lax.fori_loop(0, ITERATIONS, lambda _, vector: product(vector), start))

    return jax.vmap(of_one)(batch)


def section(config: BoundConfig, rows: list[Row], folder: Path) -> Section:
    """The claims, the tables and the figure that follow from what was measured."""
    return bound_report.section(config, rows, folder)


EXPERIMENT = Experiment(BoundConfig(), measure, section)
