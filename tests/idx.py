"""IDX files that a test writes."""

import gzip
import struct

import numpy as np

NAMES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def write_idx(path, array):
    head = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder, train, test):
    """The four files, of so many examples."""
    rng = np.random.default_rng(0)
    for (images, labels), size in ((NAMES[:2], train), (NAMES[2:], test)):
        write_idx(folder / images, rng.integers(0, 256, (size, 28, 28)))
        write_idx(folder / labels, rng.integers(0, 10, size))
