"""The calibration against published numbers, and what it needs: Adam, LeNet-5 and permuted labels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, models
from experiments.__main__ import main
from experiments.calibration import ARMS, PREDICTIONS, CalibrationConfig, claims
from experiments.checks import check
from experiments.section import frame
from experiments.train import Recipe, trainer


def _verdicts(**ends):
    """The verdicts of trainings that end at these accuracies (training, test), a thousandth apart between seeds."""
    rows = [
        {"arm": arm, "seed": seed, "step": step, "epoch": step} | dict(zip(("train", "test"), values, strict=True))
        for arm in ARMS
        for seed in range(3)
        for step, values in enumerate([(0.5, 0.5), np.add(ends[arm], (seed - 1) / 1000).tolist()])
    ]
    return [result.verdict for result in claims(frame(rows))]


def test_claims_hold_where_ours_lies_on_the_predicted_side():
    ends = {"real": (1.0, 0.95), "half": (0.9, 0.6), "permuted": (0.99, 0.1), "lenet60": (0.6, 0.8)}
    ends |= {"lenet0": (1.0, 0.97), "lenet20": (0.9, 0.96), "lenet40": (0.8, 0.9)}
    assert _verdicts(**ends) == ["holds"] * (len(PREDICTIONS) + 2)


def test_claims_are_contradicted_on_the_other_side():
    ends = {"real": (0.9, 0.99), "half": (0.5, 0.6), "permuted": (0.8, 0.2), "lenet60": (0.6, 0.3)}
    ends |= {"lenet0": (1.0, 0.995), "lenet20": (0.9, 0.96), "lenet40": (0.8, 0.9)}
    verdicts = _verdicts(**ends)
    assert verdicts == ["contradicted"] * (len(PREDICTIONS) + 1) + ["holds"]
    worse = _verdicts(**ends | {"lenet0": (1.0, 0.2)})
    assert worse[-1] == "contradicted"


def test_permuted_labels_keep_the_size_of_every_class():
    true = np.repeat(np.arange(10, dtype=np.int32), [30, 50, 100, 120, 100, 100, 100, 100, 150, 150])
    for share, moved in ((1.0, 0.9), (0.5, 0.45)):
        labels = data.corrupt(jax.random.key(0), true, share, 10, "permuted")
        np.testing.assert_array_equal(np.bincount(labels), np.bincount(true))
        assert (labels != true).mean() == pytest.approx(moved, abs=0.03)
    assert (data.corrupt(jax.random.key(1), true, 1.0, 10, "permuted") != labels).any()


def test_the_shares_of_wrong_labels_are_the_published_ones():
    true = np.arange(20000, dtype=np.int32) % 10
    for arm, wrong in (("lenet0", 0.0), ("lenet20", 0.2), ("lenet40", 0.4), ("lenet60", 0.6)):
        labels = data.corrupt(jax.random.key(0), true, ARMS[arm].noise.train, 10, ARMS[arm].noise.kind)
        assert (labels != true).mean() == pytest.approx(wrong, abs=0.01)


def test_lenet_has_the_layers_of_the_paper():
    params = models.build("lenet", None, None, 10).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(layer)) for layer in params["params"].values()]
    assert sorted(sizes) == sorted([156, 2416, 48120, 10164, 850])


def test_adam_takes_the_steps_written_out_by_hand():
    rng, rate = np.random.default_rng(0), 0.01
    images, labels = jnp.asarray(rng.normal(size=(36, 4, 4, 1)), jnp.float32), jnp.asarray(rng.integers(0, 10, 36))
    model = models.build("mlp", 8, 1, 10)
    method = trainer(model, "sgd", Recipe(4, rate, weight_decay=0.1, optimizer="adam"), 36)
    state = method.init(jax.random.key(1), images)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for step in range(3):
        rows = 4 * step + jnp.arange(4)
        grads = jax.grad(lambda p: models.mean_loss_of(model)(p, (images[rows], labels[rows])))(state.params)  # noqa: B023
        grads = jax.tree.map(lambda g, p: np.asarray(g, np.float64) + 0.1 * p, grads, params)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        fair = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1))
        params = jax.tree.map(
            lambda p, m, v: p - rate * (m / fair[0]) / (np.sqrt(v / fair[1]) + 1e-8),  # noqa: B023
            *(params, first, second),
        )
        state = method.step(state, images, labels, rows[None])
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs_lenet": 0}, "Expected epochs_lenet >= 1, got epochs_lenet=0"),
        ({"lenet_seeds": 0}, "Expected lenet_seeds >= 1, got lenet_seeds=0"),
        ({"model": "cnn", "depth": None}, "Expected model=mlp, beside which LeNet-5 is trained, got model=cnn"),
        ({"model": "lenet", "depth": 3}, "Expected no depth for lenet, got depth=3"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(CalibrationConfig(), **changes))


@pytest.mark.slow
def test_a_smoke_run_leaves_claims_and_figures(tmp_path):
    out = tmp_path / "run"
    assert main(["calibration", "--smoke", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == {*ARMS}
    section = json.loads((out / "summary.json").read_text())["sections"][0]
    assert len(section["claims"]) == len(PREDICTIONS) + 2
    assert len(section["tables"][0]["rows"]) == len(ARMS)
    assert (out / "figures" / "calibration.png").stat().st_size > 10_000
