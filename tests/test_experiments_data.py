"""Data sets, label noise, the order of examples."""

import gzip
import struct

import jax
import numpy as np
import pytest

from experiments import data
from experiments.train import METHODS, Keys, epoch_rows


def _write_idx(path, array):
    head = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, size in (("train", 12), ("t10k", 7)):
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (size, 28, 28)))
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, size))
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files(idx_folder):
    found = data.load("fashion_mnist", folder=idx_folder, num_train=10)
    want = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    assert found.train_images.shape == (10, 28, 28, 1)
    assert found.test_labels.shape == (7,)
    np.testing.assert_array_equal(np.round(found.train_images[..., 0] * 255), want[:10])


def test_a_cut_idx_file_is_refused(idx_folder):
    path = idx_folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match=r"Expected t10k-images-idx3-ubyte.gz to hold .* cut short"):
        data.load("fashion_mnist", folder=idx_folder)


def test_a_file_of_another_format_is_refused(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no labels here"))
    with pytest.raises(ValueError, match="Expected a gzipped IDX file"):
        data.load("fashion_mnist", folder=idx_folder)


def test_without_a_source_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(FileNotFoundError, match="Install Debian's package dataset-fashion-mnist"):
        data.load("fashion_mnist", folder=tmp_path)


@pytest.mark.parametrize(("name", "train", "test", "side"), [("mnist5k", 4000, 1000, 28), ("digits", 1400, 397, 8)])
def test_embedded_data_sets(name, train, test, side):
    found = data.load(name)
    assert found.train_images.shape == (train, side, side, 1)
    assert found.test_images.shape == (test, side, side, 1)
    assert found.train_images.min() == 0
    assert found.train_images.max() == 1
    assert set(found.train_labels) == set(found.test_labels) == set(range(10))


def test_more_examples_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"Expected num_train <= 1400, the size of digits, got num_train=1401"):
        data.load("digits", num_train=1401)


def test_corruption_redraws_the_share_and_changes_nine_tenths_of_it():
    labels = np.arange(20_000) % 10
    noisy = data.corrupt(jax.random.key(0), labels, 0.5, 10)
    changed = (noisy != labels).sum()
    # 10,000 draws, each a change with probability 0.9: five standard deviations are 150.
    assert abs(changed - 9000) < 150
    assert set(noisy) == set(range(10))
    np.testing.assert_array_equal(data.corrupt(jax.random.key(0), labels, 0.0, 10), labels)


def test_corruption_depends_on_its_key_alone():
    labels = np.arange(100) % 10
    a, b, c = (data.corrupt(jax.random.key(k), labels, 1.0, 10) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_every_method_sees_the_same_examples_in_the_same_order():
    seen = {}
    for name, method in METHODS.items():
        rows = list(epoch_rows(Keys.of(3).order, 2, 100, method.groups * 8, 8))
        assert all(len(part) == method.groups * 8 for part in rows)
        seen[name] = np.concatenate(rows)
    assert seen["sgd"].size == 96
    assert len(set(seen["sgd"].tolist())) == 96
    assert all(np.array_equal(seen["sgd"], order) for order in seen.values())
    other = np.concatenate(list(epoch_rows(Keys.of(3).order, 3, 100, 8, 8)))
    assert not np.array_equal(seen["sgd"], other)
