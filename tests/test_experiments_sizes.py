"""Width and depth, models from linear regression on, and a start on random labels: claims and what they measure."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments import adversarial_init, linear_to_deep, linear_to_deep_claims, models, sizes, width_depth
from experiments.__main__ import main
from experiments.adversarial_init import AdversarialInitConfig
from experiments.amplification import along, directions, with_share
from experiments.checks import check
from experiments.equal_loss import at_losses, with_gaps
from experiments.linear_to_deep import LinearToDeepConfig
from experiments.section import frame
from experiments.train import Recipe, trainer
from experiments.width_depth import WidthDepthConfig

LOSSES = (2.6, 1.5, 0.4, 0.05)


@pytest.fixture
def rng():
    """Random numbers, the same for every test."""
    return np.random.default_rng(0)


def test_a_column_at_a_loss_is_interpolated_where_the_loss_first_falls_through_it():
    run = pd.DataFrame({"loss": [3.0, 1.0, 1.5, 0.5], "gap": [0.0, 4.0, 8.0, 2.0], "r": [1.0, 16.0, 3.0, 3.0]})
    np.testing.assert_array_equal(at_losses(run, "gap", [2.0, 1.25, 0.75, 0.25, 3.5]), [2, 3.5, 3.5, np.nan, np.nan])
    assert at_losses(run, "r", [2.0], log=True) == pytest.approx([4.0])


def _images(number, rng):
    return rng.random((number, 4, 4, 1)).astype(np.float32), rng.integers(0, 3, number).astype(np.int32)


def test_linear_regression_has_the_squared_error(rng):
    images, labels = _images(5, rng)
    model = models.build("linear", 8, None, 3)
    params = model.init(jax.random.key(0), images[:1])
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"]["Dense_0"])
    outputs = images.reshape(5, -1).astype(np.float64) @ layer["kernel"] + layer["bias"]
    expected = [((out - np.eye(3)[label]) ** 2).sum() / 2 for out, label in zip(outputs, labels, strict=True)]
    losses = jax.vmap(models.loss_of(model), in_axes=(None, 0))(params, (images, labels))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    logits = models.build("logistic", None, None, 3).apply(params, images)
    np.testing.assert_allclose(logits, outputs, rtol=1e-5)


def test_the_strength_of_a_direction_is_that_of_the_product_of_all_layers(rng):
    images, labels = _images(30, rng)
    model = models.build("deep_linear", 6, 3, 3)
    params = model.init(jax.random.key(1), images[:1])
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that biases are there
    product = np.eye(16)
    for layer in range(4):
        product = product @ np.asarray(params["params"][f"Dense_{layer}"]["kernel"], np.float64)
    gradient = np.zeros((3, 16))
    for image, label in zip(images, labels, strict=True):
        gradient += np.outer(np.eye(3)[label] - 1 / 3, image.reshape(-1))
    left, right = directions(images, labels, 3)
    values = np.abs(np.einsum("kc,cp,kp->k", left, gradient, right))
    np.testing.assert_allclose(values, np.linalg.svd(gradient)[1][:2], rtol=1e-6)
    expected = [u @ product.T @ v for u, v in zip(left, right, strict=True)]
    np.testing.assert_allclose(along((left, right), (4, 4, 1), model, params), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_three_thirds_is_a_step_of_the_full_batch(rng):
    images, labels = _images(12, rng)
    config = dataclasses.replace(LinearToDeepConfig(), num_train=12, batch_size=2, width=5, steps=7)
    changes = linear_to_deep._changes(config, "mlp", "real", "full", 12)
    assert (changes["batch_size"], changes["epochs"]) == (4, 7)
    assert linear_to_deep._changes(config, "mlp", "real", "mini", 12)["epochs"] == 2  # 12 steps, the fewest from 7 on
    model = models.build("mlp", 5, 2, 3)
    method = trainer(model, "mean3", Recipe(changes["batch_size"], 0.1), 12)
    assert method.per_epoch == 1
    state = method.init(jax.random.key(0), images[:1])
    params = jax.device_get(state.params)
    gradient = jax.grad(models.mean_loss_of(model))(params, (images, labels))
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)
    rows = jnp.asarray(rng.permutation(12).reshape(3, 4))
    after = method.step(state, images, labels, rows).params
    for got, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def _rows(marks, seed, r, gap, shift=0.0, **others):
    """A training that falls through all losses, of constant r and gap that differ a little between seeds."""
    return [
        {
            **marks,
            **{"seed": seed, "step": step, "epoch": float(step), "loss": loss},
            **{"r": r * (1 + seed / 100), "alpha": r / 1000, "accuracy": 0.9, "norm": 1.0, "distance": 1.0},
            **{"test_accuracy": 0.9 - gap - seed / 1000 - shift, "test_loss": loss + gap},
            **{name: values[step] for name, values in others.items()},
        }
        for step, loss in enumerate(LOSSES)
    ]


def _of_sizes(config, r_of, gap_of, share_of):
    rows = []
    for cell in width_depth.cells(config):
        size = cell.width * cell.depth
        for seed in range(3):
            linear = {}
            if cell.model == "deep_linear":
                first = share_of(cell.depth) ** 0.5 * (1 + seed / 1000)
                linear = {"along": [[1.0, 1.0], *[[1 + first, 1 + (1 - share_of(cell.depth)) ** 0.5]] * 3]}
                size = cell.depth + 1
            rows += _rows(cell._asdict(), seed, r_of(size), gap_of(size), **linear)
    return with_share(with_gaps(frame(rows)))


def test_claims_on_width_and_depth_follow_the_largest_against_the_smallest():
    config = WidthDepthConfig(seeds=3)
    sweeps = width_depth.sweeps(config)
    table = _of_sizes(config, lambda size: size, lambda size: 1 / size, lambda depth: 0.2 + depth / 10)
    results = sizes.claims(sweeps, table)
    assert [result.verdict for result in results] == ["holds"] * 6
    assert results[0].effect == pytest.approx(2048 / 32)
    assert results[2].effect == pytest.approx(8)
    assert results[4].effect == pytest.approx(40, rel=0.01)
    table = _of_sizes(config, lambda size: 1 / size, lambda size: size / 1e5, lambda depth: 0.8 - depth / 10)
    assert [result.verdict for result in sizes.claims(sweeps, table)] == ["contradicted"] * 6
    unfinished = table[table["loss"] > 1]
    assert {result.verdict for result in sizes.claims(sweeps, unfinished)} == {"not measured"}


def _of_kinds(real, random, full=1.0):
    """(r, gap) of real and of random labels; the ratio of r by the full batch is the power `full` of SGD's."""
    rows = []
    for kind in linear_to_deep.KINDS:
        for labels, batches in linear_to_deep_claims.LINES:
            r, gap = real if labels == "real" else random
            if labels == "real" and batches == "full":
                r = random[0] * (r / random[0]) ** full
            for seed in range(3 if kind == "cnn" else 5):
                moved = seed / 1000 if labels == "real" else 0.0
                rows += _rows({"kind": kind, "labels": labels, "batches": batches}, seed, r * (1 + moved), gap, moved)
    return with_gaps(frame(rows))


def test_claims_on_all_models_follow_the_worst_of_them():
    kinds = linear_to_deep.KINDS
    results = linear_to_deep_claims.claims(kinds, _of_kinds((20, 0.1), (2, 0.5)))
    assert [result.verdict for result in results] == ["holds"] * 5
    assert results[0].effect == pytest.approx(10, rel=0.01)
    assert results[1].effect == pytest.approx(-40, rel=0.01)
    assert results[0].seeds == 3  # the CNN has no more
    against = _of_kinds((2, 0.5), (20, 0.1))
    assert [r.verdict for r in linear_to_deep_claims.claims(kinds, against)][:4] == ["contradicted"] * 4
    weak = linear_to_deep_claims.claims(kinds, _of_kinds((20, 0.1), (2, 0.5), full=0.2))
    assert weak[4].verdict == "contradicted"
    one = _of_kinds((20, 0.1), (2, 0.5))
    one.loc[(one["kind"] == "mlp") & (one["labels"] == "real"), "r"] = 1.0
    assert linear_to_deep_claims.claims(kinds, one)[0].verdict == "contradicted"
    none = one[(one["kind"] != "cnn") | (one["step"] == 0)]
    assert {result.verdict for result in linear_to_deep_claims.claims(kinds, none)} == {"not measured"}


def _of_starts(gaps, r):
    rows = []
    for (start, decay), gap in gaps.items():
        for seed in range(3):
            marks = {"start": start, "decay": decay, "phase": "real"}
            rows += _rows(marks, seed, r[start], gap + (seed / 1000 if start == "random" else 0))
    return frame(rows)


def test_claims_on_the_start_follow_test_accuracy_and_r():
    fresh = {("fresh", "none"): 0.1, ("fresh", "decay"): 0.1}
    undone = _of_starts(fresh | {("random", "none"): 0.3, ("random", "decay"): 0.12}, {"fresh": 9, "random": 3})
    results = adversarial_init.claims(undone)
    assert [result.verdict for result in results] == ["holds"] * 3
    assert results[0].effect == pytest.approx(-20.1)
    assert results[1].effect == pytest.approx(18)
    worse = _of_starts(fresh | {("random", "none"): 0.05, ("random", "decay"): 0.3}, {"fresh": 3, "random": 9})
    assert [result.verdict for result in adversarial_init.claims(worse)] == ["contradicted"] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WidthDepthConfig(widths=(32,)), "widths to be two or more"),
        (WidthDepthConfig(linear_depths=(-1, 2)), "linear_depths to be two or more, each >= 0"),
        (WidthDepthConfig(random_widths=(7,)), "random_widths among"),
        (WidthDepthConfig(epochs_wide=0), "epochs_wide >= 1"),
        (WidthDepthConfig(model="cnn", depth=None), "model=mlp with a width and a depth"),
        (LinearToDeepConfig(kinds=("tree",)), "kinds among"),
        (LinearToDeepConfig(steps_cnn=0), "steps_cnn >= 1"),
        (LinearToDeepConfig(linear_rate=0), "linear_rate > 0"),
        (AdversarialInitConfig(epochs_random=0), "epochs_random >= 1"),
        (AdversarialInitConfig(decay=0), "0 < decay < 1"),
        (AdversarialInitConfig(weight_decay=0.1), "weight decay as decay=0.005"),
        (AdversarialInitConfig(model="resnet50", width=None), "without BatchNorm"),
    ],
)
def test_wrong_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check(config)


def test_a_training_set_that_steps_would_cut_is_refused():
    with pytest.raises(ValueError, match="multiple of 3 mini-batches of batch_size=50"):
        LinearToDeepConfig().check_size(610)


def _smoke(name, out):
    assert main([name, "--smoke", "--seeds", "3", "--out", str(out)]) == 0
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    assert section["claims"]
    assert [*(out / "figures").glob("*.png")]
    return frame([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


@pytest.mark.slow
def test_width_and_depth_run(tmp_path):
    table = _smoke("width-depth", tmp_path)
    assert set(table["width"]) == {4, 8}
    linear = table[table["model"] == "deep_linear"]
    assert linear["along"].map(len).eq(9).all()
    assert table["along"].notna().sum() == len(linear)


@pytest.mark.slow
def test_linear_to_deep_runs(tmp_path):
    table = _smoke("linear-to-deep", tmp_path)
    assert set(table["kind"]) == {"linear", "logistic"}
    ends = table.groupby(["kind", "labels", "batches"])["step"].max()
    assert (ends.xs("full", level="batches") == 40).all()


@pytest.mark.slow
def test_a_training_on_real_labels_begins_where_random_ones_ended(tmp_path):
    table = _smoke("adversarial-init", tmp_path)
    for decay in adversarial_init.DECAYS:
        mine = table[(table["start"] == "random") & (table["decay"] == decay)]
        ended = mine[mine["phase"] == "before"].groupby("seed").tail(1).set_index("seed")["distance"]
        begun = mine[(mine["phase"] == "real") & (mine["step"] == 0)].set_index("seed")["distance"]
        assert begun.to_dict() == ended.to_dict()
        assert (begun > 0.01).all()
    fresh = table[(table["start"] == "fresh") & (table["step"] == 0)]
    assert (fresh["distance"] < 1e-5).all()
