"""What a user with a typical mistake is told: one line, with the leaf or argument and the remedy. And what converts."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from flax.core import FrozenDict

import cg_jax as cg

W, X, Y = np.ones(4, np.float32), np.arange(32, dtype=np.float32).reshape(8, 4) / 32, np.arange(8, dtype=np.float32)
# W·x of rows of X, minus y, times x.
RESIDUALS = (X @ W - Y)[:, None] * X
ALPHA = np.square(RESIDUALS.sum(0)).sum() / (8 * np.square(RESIDUALS).sum())


def loss_fn(w, example):
    x, y = example
    return 0.5 * (w @ x - y) ** 2


class Tensor:
    """As a tensor of PyTorch looks: a dtype that is none of NumPy's, and an array in it, unless it has a gradient."""

    dtype = types.SimpleNamespace(name="torch.float32")

    def __init__(self, array, requires_grad=False):
        self.array, self.requires_grad = np.asarray(array), requires_grad
        self.shape, self.ndim = self.array.shape, self.array.ndim

    def __array__(self, dtype=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.array if dtype is None else self.array.astype(dtype)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return Tensor(self.array[rows])

    def __iter__(self):
        return map(Tensor, self.array)


class DataLoader:
    """As PyTorch's: iterable, batches are lists of tensors; its length may be unknown."""

    def __iter__(self):
        return ([Tensor(X[i : i + 3]), Tensor(Y[i : i + 3])] for i in (0, 3, 6))

    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")


class Lazy:
    """As a data set in a file: read when sliced."""

    dtype, shape = X.dtype, X.shape

    def __init__(self):
        self.read = []

    def __array__(self, dtype=None):
        raise AssertionError("read as a whole")

    def __getitem__(self, rows):
        self.read.append(rows)
        return X[rows]


def _measured(params, data, loss=loss_fn, batch_size=4, **more):
    return cg.measure_coherence(loss, params, data, batch_size=batch_size, **more)


# Every function that takes parameters and a batch.
TAKERS = {
    "grad_moments": lambda p, b: cg.grad_moments(loss_fn)(p, b),
    "per_example_sq_norms": lambda p, b: cg.per_example_sq_norms(loss_fn)(p, b),
    "per_example_grads": lambda p, b: cg.per_example_grads(loss_fn)(p, b),
    "alignments": lambda p, b: cg.alignments(loss_fn)(p, b, jnp.asarray(W)),
    "micro_batch_grads": lambda p, b: cg.micro_batch_grads(loss_fn, 2)(p, b),
    "measure_coherence": _measured,
}


@pytest.mark.parametrize(
    ("params", "batch"),
    [
        (Tensor(W), (Tensor(X), Tensor(Y))),
        (tf.constant(W), (tf.constant(X), tf.constant(Y))),
        (tf.Variable(W), (X, pd.Series(Y, index=np.arange(8) + 100))),
    ],
    ids=["torch", "tensorflow", "pandas"],
)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_what_numpy_can_read_is_converted(take, params, batch):
    chex.assert_trees_all_equal(take(params, batch), take(jnp.asarray(W), (X, Y)))


def test_loaders_and_files_are_read_batch_by_batch():
    file = Lazy()
    for data in (
        DataLoader(),
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(3),
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(3).filter(lambda x, y: True),  # of unknown length
        [(Tensor(X[:3]), Y[:3]), (Tensor(X[3:]), Y[3:])],
        (file, Y),
    ):
        np.testing.assert_allclose(_measured(W, data, batch_size=5).alpha, ALPHA, rtol=1e-5)
    assert file.read == [slice(0, 5), slice(5, 8)]


def test_explain_takes_tensors_and_shapes():
    shape = jax.ShapeDtypeStruct((4,), np.float32)
    plans = [cg.explain(loss_fn, w, (x, 1.0)) for w, x in ((W, X[0]), (Tensor(W), Tensor(X[0])), (shape, shape))]
    assert plans[0] == plans[1] == plans[2]


STRINGS = "encode strings as numbers, or leave them out"
BATCHES = [
    ((X, "abc"), rf"\[1\] of str; {STRINGS}"),
    ((X, b"abc"), rf"\[1\] of bytes; {STRINGS}"),
    ((X, np.array(["a"] * 8)), rf"\[1\] of dtype <U1; {STRINGS}"),
    ((X, np.array([b"a"] * 8)), rf"\[1\] of dtype \|S1; {STRINGS}"),
    ((X, np.array(["a"] * 8, object)), rf"\[1\] of dtype object; {STRINGS}"),
    ((X, tf.constant(["a"] * 8)), rf"\[1\] of dtype object; {STRINGS}"),
    ((X, pd.Series(["a"] * 8).astype("category")), rf"\[1\] of dtype object; {STRINGS}"),
    ((X, np.array([[1], [1, 2]] * 4, object)), r"\[1\] of dtype object; make an array of numbers of it, rows of diff"),
    ((X, tf.ragged.constant([[1], [1, 2]] * 4)), r"\[1\] of RaggedTensor; make an array of numbers of it"),
    ((X, Y.astype("datetime64[s]")), r"\[1\] of dtype datetime64\[s\]; convert it to a dtype that JAX has"),
    ((X.astype(np.longdouble), Y), r"\[0\] of dtype float128; convert it to a dtype that JAX has"),
    ((np.ma.masked_array(X), Y), r"\[0\] of MaskedArray; fill it, or leave the masked rows out"),
    (np.zeros(8, [("x", "f4"), ("y", "f4")]), r" of dtype \[\('x', '<f4'\), .*; convert it to a dtype that JAX has"),
    (pd.DataFrame(X), r" of DataFrame; take its \.to_numpy\(\), or a dict of its columns as arrays"),
    ((pd.DataFrame(X), Y), r"\[0\] of DataFrame; take its \.to_numpy\(\)"),
    (
        (Tensor(X, requires_grad=True), Y),
        r"\[0\] of Tensor, which NumPy cannot read \(Can't call .*\.detach\(\)\.numpy",
    ),
    ({"x": X, "name": "train"}, rf"\['name'\] of str; {STRINGS}"),
    ({"x": X, "f": print}, r"\['f'\] of builtin_function_or_method; make an array of numbers of it, or leave it out"),
    (FrozenDict({"x": X, "o": object()}), r"\['o'\] of object; make an array of numbers of it, or leave it out"),
    (types.MappingProxyType({"x": X}), r" of mappingproxy; take a dict of it"),  # as numpy.load gives
    (
        jax.ShapeDtypeStruct((8, 4), np.float32),
        r" of ShapeDtypeStruct; it has no values, and only explain takes shapes",
    ),
]


@pytest.mark.parametrize(("batch", "message"), BATCHES)
def test_a_batch_with_a_leaf_that_is_no_array_of_numbers(batch, message):
    for take in (TAKERS["grad_moments"], TAKERS["measure_coherence"]):
        with pytest.raises(
            TypeError, match=rf"^Expected every leaf of (batch|data) to be an array, got (batch|data){message}"
        ):
            take(W, batch)


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_every_function_checks_its_batch(take):
    with pytest.raises(TypeError, match=r"\[1\] of str"):
        take(W, (X, "abc"))
    with pytest.raises(
        ValueError, match=r"to have a leading axis, got \w+\[1\]\[0\] of shape \(\); .* numbers into one a"
    ):
        take(W, (X, [1.0, 2.0]))
    with pytest.raises(ValueError, match=r"Expected all arrays .* got \{.*\}; params come first, then (batch|data)\.$"):
        take((X, Y), {"w": np.ones((4, 3)), "b": np.ones(3)})


def test_a_loader_is_data_and_no_batch():
    with pytest.raises(
        TypeError, match=r"got batch of DataLoader; take one batch of it, next\(iter\(…\)\); measure_coh"
    ):
        cg.grad_moments(loss_fn)(W, DataLoader())
    with pytest.raises(TypeError, match=r"got data\[0\] of DataLoader; give a loader by itself, as data"):
        _measured(W, (DataLoader(), Y))
    with pytest.raises(TypeError, match=rf"got data of str; {STRINGS}"):
        _measured(W, "mnist")
    with pytest.raises(
        TypeError, match=r"an iterable of batches, got object; stack its examples .*, or read them by a l"
    ):
        _measured(W, object())
    with pytest.raises(TypeError, match=rf"got batch\[1\] of str; {STRINGS}"):
        _measured(W, iter([(X, "abc")]))


def test_a_list_is_a_list_of_batches():
    with pytest.raises(
        TypeError, match=r"got rows of float\[:\] in data\[0\] and of float\[\] in data\[1\]; .* a tuple, \(X"
    ):
        _measured(W, [X, Y])
    with pytest.raises(TypeError, match=r"got rows of float\[\] in data\[0\] and of int\[\] in data\[1\]"):
        _measured(W, [Y, np.arange(8)])
    with pytest.raises(ValueError, match=r"got batch\[1\] of shape \(\); stack examples into a batch"):
        _measured(W, list(zip(X, Y, strict=True)))
    with pytest.raises(
        ValueError, match=r"at most batch_size=2 examples, got one of 4; a list or a loader is one of b"
    ):
        _measured(W, list(X), batch_size=2)
    with pytest.raises(
        ValueError, match=r"got batch of shape \(\); stack examples into a batch, and numbers into one a"
    ):
        _measured(W, [1.0, 2.0])
    with pytest.raises(TypeError, match=rf"got data\[1\] of str; {STRINGS}"):
        _measured(W, [X, "abc"])
    # Rows may be longer in one batch than in another.
    got = cg.measure_coherence(lambda w, x: w * x.sum(), 1.0, [X[:4], X[4:, :2]], batch_size=4)
    assert int(got.count) == 8


def test_a_generator_that_was_read():
    read = iter([(X, Y)])
    list(read)
    with pytest.raises(ValueError, match=r"an empty iterable; a generator can be read only once"):
        _measured(W, read)


GRADS = cg.per_example_grads(loss_fn)(W, (X, Y))


@pytest.mark.parametrize(
    "value", [GRADS, {"w": GRADS}, 3.0, (8, 0.0, W, 1.0)], ids=["array", "dict", "number", "tuple"]
)
def test_coherence_is_of_moments(value):
    for call in (cg.coherence, lambda value: cg.merge(value, value)):
        with pytest.raises(
            TypeError, match=r"to be a GradMoments, got \w+; take grad_moments\(loss_fn\)\(params, batch\)"
        ):
            call(value)


def test_coherence_of_a_function_and_of_nothing():
    with pytest.raises(
        TypeError, match=r"to be a GradMoments, got function; call what grad_moments\(loss_fn\) returns"
    ):
        cg.coherence(cg.grad_moments(loss_fn))
    with pytest.raises(ValueError, match=r"Expected moments of at least one tensor, got none"):
        cg.coherence(cg.GradMoments.zeros({}))


@pytest.mark.parametrize("build", [cg.grad_moments, cg.per_example_sq_norms], ids=["grad_moments", "sq_norms"])
@pytest.mark.parametrize("params", [jnp.ones(3), {"w": jnp.ones((50, 50))}], ids=["array", "dict"])
def test_params_in_the_place_of_method(build, params):
    message = rf"got method of type \w+; call it as {build.__name__}\(loss_fn\)\(params, batch\)\.$"
    with pytest.raises(ValueError, match=message):
        build(loss_fn, params)


def test_arguments_of_another_kind():
    with pytest.raises(ValueError, match=r"^Expected k to be a whole number >= 1, got k of type dict\.$"):
        cg.micro_batch_grads(loss_fn, {"w": jnp.ones((50, 50))})
    with pytest.raises(ValueError, match=r"^Expected batch_size to be a whole number >= 1, got batch_size='32'\.$"):
        _measured(W, (X, Y), batch_size="32")
    with pytest.raises(
        ValueError, match=r"^Expected nonfinite in \['propagate', 'raise', 'skip'\], got nonfinite=None\.$"
    ):
        _measured(W, (X, Y), nonfinite=None)
    with pytest.raises(TypeError, match=r"^Expected loss_fn to be a function, got dict\.$"):
        cg.measure_coherence({"w": W}, loss_fn, (X, Y), batch_size=4)
    with pytest.raises(TypeError, match=r"jax\.sharding\.Mesh or None, got list; jax\.make_mesh makes one"):
        _measured(W, (X, Y), mesh=jax.devices())
    with pytest.raises(ValueError, match=r"got mask of dtype int32 and shape \(8,\); take mask != 0\.$"):
        cg.grad_moments(loss_fn)(W, (X, Y), np.ones(8, np.int32))
    with pytest.raises(TypeError, match=rf"got direction of str; {STRINGS}"):
        cg.alignments(loss_fn)(W, (X, Y), "up")


def test_a_batch_where_an_example_is_wanted():
    with pytest.raises(
        TypeError, match=r"got shape \(8,\); add up its parts, and give one example where a batch was given"
    ):
        cg.explain(lambda w, x: (x @ w) ** 2, W, X)
