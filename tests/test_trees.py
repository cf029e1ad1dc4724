"""Names of tensors: the keys of ordinary ones, and no two alike whatever the keys."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import cg_jax as cg
from cg_jax import trees


def test_keys_with_slashes_are_tensors_of_their_own():
    w, X = jnp.ones(4), np.ones((8, 4), np.float32)
    X[1::2, 2:] = -3
    p = {"a/b": w, "a": {"b": w}}
    loss = lambda p, x: (p["a/b"] @ x) ** 2 + (2 * p["a"]["b"] @ x + x[2]) ** 2  # noqa: E731
    got = cg.measure_coherence(loss, p, X, batch_size=8)
    rows = X.astype(np.float64)
    wanted = {"a/b": 4 * (2 * rows.sum(1) + rows[:, 2])[:, None] * rows, "'a/b'": 2 * rows.sum(1)[:, None] * rows}
    assert list(got.per_tensor) == list(wanted)
    for name, grads in wanted.items():
        alpha = np.square(grads.sum(0)).sum() / (8 * np.square(grads).sum())
        np.testing.assert_allclose(got.per_tensor[name].alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(sum(part.share for part in got.per_tensor.values()), 1, rtol=1e-6)
    assert [row.path for row in cg.explain(loss, p, X[0])] == list(wanted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Layer:
    kernel: jax.Array
    table: jax.Array


@jax.tree_util.register_pytree_with_keys_class
class _Node:
    """A node with an attribute, a key and a place of one name."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten_with_keys(self):
        kinds = jax.tree_util.GetAttrKey("0"), jax.tree_util.DictKey(0), jax.tree_util.SequenceKey(0)
        return list(zip(kinds, self.parts, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


def test_ordinary_names_are_the_keys():
    tree = {
        "params": {"Dense_0": {"kernel": 1.0, "bias": 1.0}},
        "layers": [1.0, (2.0, {"0": 3.0, "none": None})],
        "by number": {0: 1.0, 10: 2.0},
        "layer": _Layer(1.0, 2.0),
        "frozen": FrozenDict({"Conv(3)": 1.0}),
    }
    assert trees.paths(tree) == [
        "by number/0", "by number/10", "frozen/Conv(3)", "layer/kernel", "layer/table", "layers/0", "layers/1/0",
        "layers/1/1/0", "params/Dense_0/bias", "params/Dense_0/kernel",
    ]  # fmt: skip
    assert trees.paths(1.0) == [""]
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))))
    assert trees.paths(state) == ["layers/0/kernel/value"]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"a/b": 1, "a": {"b": 2}}, ["a/b", "'a/b'"]),
        ({"mlp/~/linear": {"w": 1}}, ["'mlp/~/linear'/w"]),  # of Haiku
        ({"": 1, "a": {"": 2}, "/": {"": 3}}, ["''", "'/'/''", "a/''"]),
        ({"a/b": 1, "'a/b'": 2, '"': 3, "it's": 4}, ["'\"'", "\"'a/b'\"", "'a/b'", "it's"]),
        ({"a\\/b": 1, "a\\": {"b": 2}}, ["a\\/b", "'a\\\\/b'"]),
        (collections.OrderedDict({0: 1, "0": 2, "b": 3}), ["<[0]>", "<['0']>", "b"]),
        (collections.OrderedDict({0: 1, "0": 2, "<[0]>": 3}), ["<[0]>", "<['0']>", "'<[0]>'"]),
        ({"n": _Node(1, 2, 3), "m": 4}, ["m", "<['n'].0>", "<['n'][0]>#2", "<['n'][0]>#3"]),
    ],
)
def test_no_two_tensors_share_a_name(tree, names):
    assert trees.paths(tree) == names


KEYS = st.one_of(st.text("ab/'\"<>[]#0.\\", max_size=4), st.integers(0, 2))
TREES = st.recursive(
    st.just(0.0),
    lambda children: st.one_of(
        st.dictionaries(KEYS, children, min_size=1, max_size=4).map(collections.OrderedDict),
        st.lists(children, min_size=1, max_size=3),
        st.tuples(children, children, children).map(lambda parts: _Node(*parts)),
    ),
)


@settings(deadline=None, max_examples=60)
@given(TREES)
def test_names_are_one_to_one_whatever_the_keys(tree):
    names = trees.paths(tree)
    assert len(set(names)) == len(names) == len(jax.tree.leaves(tree))
