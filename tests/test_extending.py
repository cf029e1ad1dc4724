"""The skeletons of docs/extending.md run as they stand, and compute what a plain loop does."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import mesh_of

import cg_jax as cg
from experiments import data, line, methods

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")
# Title of a section → its blocks. The experiment is run by test_experiments_extending.py.
BLOCKS = {
    section.split("\n", 1)[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}
X = np.random.default_rng(0).normal(size=(13, 5)).astype(np.float32)
W = np.linspace(-1, 1, 5).astype(np.float32)


def _names(title, number=0):
    """What a block defines."""
    names: dict[str, Any] = {"__name__": "extending"}
    exec(compile(BLOCKS[title][number], f"docs/extending.md, {title}, block {number}", "exec"), names)
    return names


def _loss(w, x):
    return jnp.tanh(w @ x + x[0])


def _grads(loss_fn, params, batch):
    """[B, P] in float64."""
    with jax.enable_x64(True):
        _, grads = oracle.per_example(loss_fn, np.asarray(params, np.float64), np.asarray(batch, np.float64))
    return grads[0].reshape(len(batch), -1)


def _solved(w, x):
    return jnp.sin(jax.lax.linalg.triangular_solve(jnp.eye(5) + jnp.tril(x), w, left_side=True, lower=True)).sum()


@pytest.mark.parametrize(
    ("number", "name", "rule", "loss_fn", "shape"),
    [
        (0, "solve", "norm", _solved, (5, 1)),
        (1, "times", "closed", lambda w, x: jnp.sin(x[0] @ w).sum(), (5, 3)),
    ],
)
def test_a_rule(number, name, rule, loss_fn, shape):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x = np.random.default_rng(2).normal(size=(4, 5, 5)).astype(np.float32) / 5
    with _names("Add a primitive", number)[name]:
        assert cg.explain(loss_fn, w, x[0])[0].rule == rule
        got = cg.per_example_sq_norms(loss_fn)(w, x)
    np.testing.assert_allclose(got, np.square(_grads(loss_fn, w, x)).sum(1), rtol=1e-5)


def test_without_its_rule_the_primitive_falls_back():
    assert cg.explain(_solved, np.ones((5, 1), np.float32), np.ones((5, 5), np.float32))[0].rule == "vjp"


@pytest.mark.parametrize("devices", [1, 8])
def test_an_estimator(devices):
    _names("Add an estimator")
    mesh = mesh_of(devices)
    got = cg.measure_coherence(_loss, W, X, batch_size=8, estimator="directions", mesh=mesh)
    grads = _grads(_loss, W, X)
    want = oracle.ratios(grads / np.linalg.norm(grads, axis=1, keepdims=True))
    assert int(got.count) == len(X)
    np.testing.assert_allclose([got.alpha, got.alpha_unbiased], [want["alpha"], want["alpha_unbiased"]], rtol=1e-5)


@pytest.mark.parametrize("devices", [None, 8])
def test_an_estimator_skips_a_shard_or_a_batch_that_is_not_finite(devices):
    _names("Add an estimator")
    mesh = None if devices is None else mesh_of(devices)
    spoilt = X.copy()
    spoilt[3] = np.nan
    got = cg.measure_coherence(
        _loss, W, spoilt, batch_size=devices or 1, estimator="directions", mesh=mesh, nonfinite="skip"
    )
    grads = _grads(_loss, W, np.delete(X, 3, 0))
    want = oracle.ratios(grads / np.linalg.norm(grads, axis=1, keepdims=True))
    assert (int(got.count), int(got.num_skipped)) == (len(X) - 1, 1)
    np.testing.assert_allclose(got.alpha, want["alpha"], rtol=1e-5)


def test_a_statistic():
    got, aux = _names("Add a statistic of single examples")["cosines"](
        lambda w, x, state: (_loss(w, x) * state, x[1]), has_aux=True
    )(W, X, jnp.float32(2))
    grads = _grads(_loss, W, X)
    total = grads.sum(0)
    np.testing.assert_allclose(got, grads @ total / np.linalg.norm(grads, axis=1) / np.linalg.norm(total), rtol=1e-4)
    np.testing.assert_array_equal(aux, X[:, 1])


def test_a_weighting():
    cosine = _names("Add a weighting")["cosine"]
    grads, info = cg.weighted_grads(_loss, cosine)(W, X)
    rows = _grads(_loss, W, X)
    want = np.maximum(rows @ rows.sum(0) / np.linalg.norm(rows, axis=1), 0)
    np.testing.assert_allclose(info.weights, want / want.sum(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads, want @ rows / want.sum(), rtol=1e-4, atol=1e-6)


def test_a_source():
    with_averages = _names("Add a source of k gradients")["with_averages"]
    optimizer = optax.chain(with_averages(cg.median(), (0.5, 0.9)), optax.sgd(1.0))
    params = {"w": jnp.asarray(W), "step": jnp.zeros((), jnp.int32)}
    state, averages = optimizer.init(params), np.zeros((2, 5))
    for grad in X[:4]:
        updates, state = jax.jit(optimizer.update)({"w": jnp.asarray(grad), "step": None}, state, params)
        averages = [d * a + (1 - d) * grad for d, a in zip((0.5, 0.9), averages, strict=True)]
        np.testing.assert_allclose(-updates["w"], np.median([grad, *averages], axis=0), rtol=1e-5)
        assert updates["step"] == 0


def test_every_link_leads_to_a_file():
    for page in (DOCS / "extending.md", DOCS / "architecture.md", DOCS.parent / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert all((page.parent / link).is_file() for link in links if not link.startswith("http"))


def test_the_citation_is_of_this_version():
    text = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [cg.__version__]


def _entry(title, names, number=0):
    return eval("{" + BLOCKS[title][number] + "}", names)


def test_a_method_may_average_over_examples():
    (method,) = _entry("Add a method", vars(methods), 1).values()
    got = method.average(_loss, len(X))(jnp.asarray(W), jnp.asarray(X))
    grads = _grads(_loss, W, X)
    norms = np.linalg.norm(grads, axis=1)
    np.testing.assert_allclose(got, (np.median(norms) / norms) @ grads / len(X), rtol=1e-4)
    assert set(method.rivals) <= set(methods.METHODS)


def test_entries_of_the_experiments():
    (method,) = _entry("Add a method", vars(methods)).values()
    grad = 3 * jnp.asarray(X[0])
    transform = method.transform()
    got, _ = transform.update(grad, transform.init(grad))
    np.testing.assert_allclose(got, grad / max(1, np.linalg.norm(grad)), rtol=1e-6)
    assert methods.EPOCH_UNIT % method.groups == 0
    assert set(method.rivals) <= set(methods.METHODS)
    (entry,) = _entry("Add a data set", vars(data) | {"Line": line.Line, "_two_moons": lambda: "moons"}).values()
    assert isinstance(entry, data.DatasetEntry)
