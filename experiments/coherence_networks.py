"""Coherence at full size: three networks on Fashion-MNIST with real, half random and random labels."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn

from . import coherence, coherence_batch_norm, loop, sample_sizes
from .coherence import CoherenceConfig
from .coherence_batch_norm import BatchNormConfig
from .configs import TFDS, Config, Hidden, RunConfig
from .experiment import Experiment, Several
from .label_order import LOSSES
from .models import MODELS
from .run_folder import RunFolder
from .section import Figure, Row, Section, frame

# Random labels of many examples are hardly learnt in a few epochs: losses near that of guessing, log 10, too.
_NEAR_CHANCE = (2.4, 2.35, 2.3, 2.29, 2.28, 2.27, 2.26, 2.24, 2.22)


@dataclasses.dataclass(frozen=True)
class NetworkConfig(CoherenceConfig):
    """Coherence of one network on Fashion-MNIST with real, half random and random labels."""

    name: Hidden = ""

    sizes: tuple[int, ...] = ()
    """Measure r and α_unbiased of nested parts of the training sample of so many examples too."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Training losses, in nats, at which the kinds of labels are compared."""
        return tuple(sorted({*LOSSES, *_NEAR_CHANCE}, reverse=True))

    def smaller(self) -> "NetworkConfig":
        """The same for a smoke test."""
        return dataclasses.replace(self, sizes=(100, 200) if self.sizes else (), log_grid=2)

    def check(self) -> None:
        """ValueError where options of this experiment are wrong."""
        super().check()
        if any(size < 2 for size in self.sizes) or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"Expected sizes to be rising numbers >= 2, got sizes={self.sizes}.")
        plain = not (self.data.startswith(TFDS) or MODELS[self.model].batch_norm) and self.estimator == "exact"
        if self.sizes and not plain:
            what = f"data={self.data}, model={self.model} and estimator={self.estimator}"
            raise ValueError(f"Expected no sizes for {what}, got sizes={self.sizes}.")

    def check_size(self, num_train: int) -> None:
        """ValueError where a part would be larger than the training sample."""
        if self.sizes and self.sizes[-1] > num_train:
            raise ValueError(f"Expected sizes up to {num_train}, the training examples, got sizes={self.sizes}.")


def measure(config: NetworkConfig, problem: loop.Problem, folder: RunFolder) -> None:
    """Train on each kind of labels, seed by seed, and measure on the way."""
    loop.train_all(config, problem, folder, coherence.trainings(config, lambda seed: _measurement(config, seed)))


def _measurement(config: NetworkConfig, seed: int) -> Any:
    """What is measured of one seed: both samples, and parts of the training sample."""

    def measured(examples: Any, model: nn.Module, params: Any) -> Row:
        if not config.sizes:
            return _rounded(coherence.row_of(*(examples.measure(name, model, params) for name in ("train", "test"))))
        found = sample_sizes.coherence_by_size(
            model, params, examples.arrays("train"), config.sizes, seed, config.measure_batch_size
        )
        train = found[max(found)], examples.guess("train", model, params)
        row = coherence.row_of(train, examples.measure("test", model, params))
        row["sizes"] = {
            str(size): {"r": float(found[size].m_coherence), "alpha_unbiased": float(found[size].alpha_unbiased)}
            for size in config.sizes
        }
        return _rounded(row)

    return measured


def _rounded(value: Any) -> Any:
    """Numbers to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def section(config: NetworkConfig, rows: list[Row], folder: Path) -> Section:
    """The section of coherence, and what follows from samples of several sizes."""
    found = coherence.section(config, rows, folder)
    found = dataclasses.replace(found, title=f"{MODELS[config.model].line.label}: real against random labels")
    if not (config.sizes and rows):
        return found
    table = frame(rows)
    sample_sizes.draw(table, config.sizes, folder / "sizes.png")
    results = sample_sizes.claims(table, config.sizes) if "real" in set(table["labels"]) else []
    return dataclasses.replace(
        found,
        paragraphs=(*found.paragraphs, _SIZES),
        claims=(*found.claims, *results),
        figures=(*found.figures, Figure("sizes.png", _SIZES_CAPTION.format(seeds=config.seeds))),
    )


_SIZES = (
    "At every measurement the coherence of nested parts of the training sample is measured on the same parameters: the "
    "first examples of the sample in an order drawn from the seed. r = m α counts the examples that one helps, and so "
    "grows with m where gradients have something in common. α_unbiased = (r − 1) / (m − 1) estimates the coherence of "
    "the population that the examples are drawn from, whatever m is."
)
_SIZES_CAPTION = (
    "m-coherence r and unbiased coherence of nested parts of the training sample, against their size m, on the same "
    "parameters: before training, after about one epoch and at the end. Lines are means over {seeds} seed(s), of r "
    "geometric ones; bands are their 95% intervals. The dotted line is the orthogonal limit, r = 1 and α_unbiased = 0. "
    "The axis of α_unbiased is linear from −0.001 to 0.001 and logarithmic beyond."
)
_HELP = """Coherence of {network} on 50,000 examples of Fashion-MNIST with real, half random and random labels.

    `coherence-{name}`: one part of coherence-networks."""


def _network(name: str, network: str, **options: Any) -> Experiment[NetworkConfig]:
    given = {"data": "fashion_mnist", "num_train": 50_000, "labels": ("real", "half", "random"), "early": 0}
    config = NetworkConfig(name=f"coherence-{name}", model=name, **given, **options)
    return Experiment(config, measure, section, help=_HELP.format(name=name, network=network))


_ALL_SIZES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
MLP = _network("mlp", "an MLP", width=256, batch_size=100, epochs=30, log_grid=12, sizes=_ALL_SIZES, seeds=5)
# Measuring all examples costs more than an epoch of training. Small batches are measured faster on a CPU.
CNN = _network("cnn", "a CNN", width=8, epochs=3, log_grid=4, measure_batch_size=50, seeds=3)
RESNET = _network("resnet", "a ResNet-8, GroupNorm", width=8, epochs=2, log_grid=3, measure_batch_size=50, seeds=3)


@dataclasses.dataclass(frozen=True)
class NetworksConfig(RunConfig):
    """Coherence at full size: MLP, CNN and ResNet-8 on 50,000 examples of Fashion-MNIST, and estimators on BatchNorm.

    `coherence-networks`: real, half random and random labels; about 90 minutes on one CPU core.
    """

    name: Hidden = "coherence-networks"

    seeds: int = 5
    """Runs of the MLP with different initialisation, order and noise."""
    seeds_convolutions: int = 3
    """Runs of the networks with convolutions."""
    seed: int = 0
    """The first seed; the others follow it."""
    data_dir: Path | None = None
    """Folder with the four IDX files of fashion_mnist; without it, that of Debian's package dataset-fashion-mnist."""
    smoke: bool = False
    """Try it: a tiny data set and networks, 2 epochs; a minute on 2 CPU cores."""

    def parts(self) -> tuple[Config, ...]:
        """MLP, CNN, ResNet-8 (but for a smoke test, which it would double) and the comparison of estimators."""
        given = {"seed": self.seed, "data_dir": self.data_dir, "smoke": self.smoke}
        convolutions: tuple[NetworkConfig | BatchNormConfig, ...] = (
            CNN.config,
            *(() if self.smoke else (RESNET.config,)),
            coherence_batch_norm.EXPERIMENT.config,
        )
        return (
            dataclasses.replace(MLP.config, seeds=self.seeds, **given),
            *(dataclasses.replace(each, seeds=self.seeds_convolutions, **given) for each in convolutions),
        )


EXPERIMENT = Several(NetworksConfig(), NetworksConfig.parts)
