"""What a user with a typical mistake is told: one line, with the leaf or argument and the remedy. And what converts."""

import types

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import tensorflow as tf
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

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
    jax.tree.map(np.testing.assert_array_equal, take(params, batch), take(jnp.asarray(W), (X, Y)))


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


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.norm.mean[...] = jnp.full(3, 0.1)
        self.adapter = nnx.LoRA(3, 1, 1, rngs=rngs)
        self.scale = nnx.Variable(jnp.ones(()))  # of a kind that its owner may train

    def __call__(self, x):
        return self.scale[...] * self.adapter(self.norm(self.dense(x)))


def test_statistics_of_an_nnx_model_are_no_parameters():
    model = Net(nnx.Rngs(0))
    recipe = (
        r"split them off, graphdef, params, rest = nnx\.split\(model, nnx\.Param, \.\.\.\), and put both back inside"
    )
    for params in (nnx.split(model)[1], {"nested": nnx.split(model)[1]}, model):
        with pytest.raises(TypeError, match=rf"got params\S*mean\W* of BatchStat and 1 more; {recipe}"):
            cg.grad_moments(lambda p, x: 0.0)(params, X)
        with pytest.raises(TypeError, match=r"of BatchStat"):
            _measured(params, X)
        with pytest.raises(TypeError, match=r"of BatchStat"):
            cg.explain(lambda p, x: 0.0, params, X[0])
    for other, kind in (
        (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "RngState"),
        (nnx.Optimizer(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1, 0.9), wrt=nnx.Param), "Opt"),
    ):
        with pytest.raises(TypeError, match=rf"got params\S+ of {kind}.*; {recipe}"):
            cg.grad_moments(lambda p, x: 0.0)(nnx.state(other), X)


@pytest.mark.parametrize("wanted", [nnx.Param, nnx.LoRAParam, (nnx.Param, lambda path, _: path == ("scale",))])
def test_what_an_nnx_model_trains_is_measured(wanted):
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Any(*wanted) if isinstance(wanted, tuple) else wanted, ...)
    loss = lambda p, x: nnx.merge(graph, p, rest)(x).sum() ** 2  # noqa: E731
    grads = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, X))
    norms = [np.square(g).sum() for g in grads]
    got = cg.grad_moments(loss)(params, X)
    np.testing.assert_allclose(jax.tree.leaves(got.sum_sq_norms), norms, rtol=1e-5)
    assert cg.coherence(got).per_tensor.keys() == {
        "/".join(map(str, (*path, "value"))) for path, _ in nnx.to_flat_state(params)
    }


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(1)(x))


@pytest.mark.parametrize("wrapped", [dict, FrozenDict])
def test_statistics_of_a_linen_model_are_no_parameters(wrapped):
    variables = wrapped(Linen().init(jax.random.key(0), X))
    with pytest.raises(
        TypeError, match=r"got a dict of variables with 'batch_stats'; take variables\['params'\], and put"
    ):
        cg.grad_moments(lambda p, x: Linen().apply(p, x).sum())(variables, X)
    fixed = {"batch_stats": variables["batch_stats"]}
    loss = lambda p, x: Linen().apply({"params": p, **fixed}, x).sum()  # noqa: E731
    assert len(cg.coherence(cg.grad_moments(loss)(variables["params"], X)).per_tensor) == 4
    loss = lambda p, x: Linen().apply({**p, **fixed}, x).sum()  # noqa: E731
    assert len(cg.coherence(cg.grad_moments(loss)({"params": variables["params"]}, X)).per_tensor) == 4


def test_a_model_or_a_train_state_in_the_place_of_params():
    with pytest.raises(
        TypeError, match=r"got params of Linen; take the parameters of a model: variables\['params'\], nnx"
    ):
        cg.grad_moments(loss_fn)(Linen(), X)
    with pytest.raises(
        TypeError, match=r"got params\.activation of custom_jvp; keep such leaves apart \(nnx\.split, equ"
    ):
        cg.grad_moments(loss_fn)(eqx.nn.MLP(4, 1, 3, 1, key=jax.random.key(0)), X)
    with pytest.raises(TypeError, match=r"got params of function; take the parameters of a model"):
        cg.grad_moments(loss_fn)(loss_fn, X)
    state = TrainState.create(apply_fn=print, params={"w": W}, tx=optax.adam(0.1))
    with pytest.raises(TypeError, match=r"^Expected params, got a TrainState; take its \.params\.$"):
        cg.grad_moments(loss_fn)(state, X)
    with pytest.raises(TypeError, match=r"got params\['w'\] of dtype <U1; encode strings"):
        cg.grad_moments(loss_fn)({"w": np.array(["a"])}, X)
    with pytest.raises(
        TypeError, match=r"got params of ShapeDtypeStruct; it has no values, and only explain takes shapes"
    ):
        cg.grad_moments(loss_fn)(jax.ShapeDtypeStruct((4,), np.float32), (X, Y))


def test_numbers_and_nothing_among_the_parameters():
    loss = lambda p, x: p["a"] * x.sum() * p["k"]  # noqa: E731
    got = cg.grad_moments(loss)({"a": 2.0, "none": None, "k": 3, "flag": np.bool_(True)}, X)
    assert float(got.sum_grads["a"]) == pytest.approx(3 * X.sum())
    assert list(cg.coherence(got).per_tensor) == ["a"]
    for nothing in (None, {}, 3):
        with pytest.raises(ValueError, match=r"Expected params to hold at least one floating-point array, got none"):
            cg.grad_moments(lambda p, x: x.sum())(nothing, X)
    for nothing in (None, (), {}):
        with pytest.raises(ValueError, match=r"Expected batch to hold at least one array, got"):
            cg.grad_moments(loss_fn)(W, nothing)
        with pytest.raises(ValueError, match=r"Expected data to hold at least one array, got"):
            _measured(W, nothing)
