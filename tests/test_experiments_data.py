"""Data sets, label noise, the order of examples."""

import gzip
import sys

import jax
import numpy as np
import pytest
from idx import NAMES, write_fashion_mnist, write_idx

from experiments import data
from experiments.methods import METHODS
from experiments.train import Keys, epoch_rows


@pytest.fixture
def idx_folder(tmp_path):
    write_fashion_mnist(tmp_path, 12, 7)
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
    with pytest.raises(ValueError, match=r"Expected .*t10k-images-idx3-ubyte.gz to hold .* cut short"):
        data.load("fashion_mnist", folder=idx_folder)


def test_a_file_of_another_format_is_refused(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no labels here"))
    with pytest.raises(ValueError, match="Expected a gzipped IDX file"):
        data.load("fashion_mnist", folder=idx_folder)


def test_without_a_source_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(OSError, match=r"neither data_dir nor .* name the folder of the four IDX files with --data-dir"):
        data.load("fashion_mnist")


def test_debians_files_are_read_where_no_folder_is_named(idx_folder, monkeypatch):
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", idx_folder)
    assert data.load("fashion_mnist").train_images.shape == (12, 28, 28, 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_of_the_four_files_is_missed(idx_folder, name):
    (idx_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"Expected the four IDX files .*, got none called {name}; name"):
        data.load("fashion_mnist", folder=idx_folder)


def _packed(content):
    """The same bytes at whatever time: workers of one run must give tests the same names."""
    return gzip.compress(content, mtime=0)


_PACKED = _packed(bytes(range(256)) * 40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        _PACKED[:9],
        _PACKED[:-9],
        _PACKED[:40] + b"\0\0\0\0" + _PACKED[44:],
        *(b"", _packed(b""), _packed(b"\0\0\x08"), _packed(b"\0\0\x08\3")),
        _packed(b"\0\0\x08\1\xff\xff\xff\xff"),
        _packed(b"\0\0\x08\1\0\0\0\5abc"),
        _packed(b"\0\0\x08\1\0\0\0\2abc"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(idx_folder, name, content):
    (idx_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^Expected .*{name}"):
        data.load("fashion_mnist", folder=idx_folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (NAMES[0], np.zeros((12, 28))),
        (NAMES[0], np.zeros((12, 27, 28))),
        (NAMES[2], np.zeros((6, 28, 28))),
        (NAMES[1], np.full(12, 10)),
        (NAMES[3], np.zeros((7, 1))),
    ],
)
def test_files_that_do_not_fit_together_are_refused(idx_folder, name, array):
    write_idx(idx_folder / name, array)
    with pytest.raises(ValueError, match=r"Expected images \[m, 28, 28\] in .* and labels \[m\] below 10 in .*, got"):
        data.load("fashion_mnist", folder=idx_folder)


def test_empty_files_are_refused(idx_folder):
    write_idx(idx_folder / NAMES[2], np.zeros((0, 28, 28)))
    write_idx(idx_folder / NAMES[3], np.zeros(0))
    with pytest.raises(ValueError, match=r"got shapes \[0, 28, 28\] and \[0\] and labels up to 0"):
        data.load("fashion_mnist", folder=idx_folder)


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
