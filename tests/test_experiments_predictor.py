"""What predicts the generalisation gap: the statistics against a dumb oracle, the claims on rows made by hand."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import data, loop, predictor, predictor_report
from experiments.__main__ import main
from experiments.checks import check
from experiments.configs import smoked
from experiments.models import MLP
from experiments.predictor import PredictorConfig
from experiments.predictors import correlations, signs, statistics, tau
from experiments.section import frame

FACTORS = ("noise", "width", "rate", "m")


def _loss(vector, shapes, image, label):
    """Cross-entropy of one example in float64, of all parameters in one vector."""
    x, start = image.ravel(), 0
    for number, shape in enumerate(shapes):
        size = shape[0] * shape[1]
        kernel, bias = vector[start : start + size].reshape(shape), vector[start + size : start + size + shape[1]]
        start += size + shape[1]
        x = x @ kernel + bias
        x = np.maximum(x, 0) if number < len(shapes) - 1 else x
    return np.log(np.exp(x).sum()) - x[label]


def test_gsnr_and_gwa_are_those_of_numerical_gradients():
    model, rng = MLP(width=4, depth=2, num_classes=3), np.random.default_rng(0)
    images = rng.normal(size=(7, 2, 3, 1))
    images[:, 0, 0] = 0  # its weights have no gradient, and no variance
    labels = rng.integers(0, 3, 7)
    params = model.init(jax.random.key(1), images)
    layers = [jax.device_get(params["params"][f"Dense_{i}"]) for i in range(3)]
    layers = [{name: leaf.astype(np.float64) for name, leaf in layer.items()} for layer in layers]
    vector = np.concatenate([part for layer in layers for part in (layer["kernel"].ravel(), layer["bias"])])
    shapes, step = [layer["kernel"].shape for layer in layers], 1e-6
    grads = np.zeros((7, vector.size))
    for i, j in itertools.product(range(7), range(vector.size)):
        move = step * np.eye(vector.size)[j]
        up, down = (_loss(vector + sign * move, shapes, images[i], labels[i]) for sign in (1, -1))
        grads[i, j] = (up - down) / (2 * step)
    ratios = [g.mean() ** 2 / g.var(ddof=1) for g in grads.T if g.any()]
    assert len(ratios) <= vector.size - 4
    head = slice(vector.size - 15, vector.size - 3)
    cosines = np.array([-g @ vector[head] / np.linalg.norm(g) / np.linalg.norm(vector[head]) for g in grads[:, head]])
    centred = cosines - cosines.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2 - 3
    found = statistics(params, images.astype(np.float32), labels)
    assert found.gsnr == pytest.approx(np.mean(ratios) - 1 / 7, rel=1e-4)
    assert found.gwa == pytest.approx(cosines.mean() / (kurtosis + 1.2), rel=1e-4)


def test_tau_is_that_of_all_pairs():
    first, second = pd.Series([1.0, 2, 3, 4, 5]), pd.Series([2.0, 1, 3, 5, 4])
    pairs = itertools.combinations(range(5), 2)
    agree = [np.sign((first[i] - first[j]) * (second[i] - second[j])) for i, j in pairs]
    assert tau(first, second) == pytest.approx(np.mean(agree))
    assert tau(first, pd.Series([2.0, 1, 3, np.nan, np.nan])) == pytest.approx(1 / 3)
    assert np.isnan(tau(first, 0 * second))
    assert np.isnan(tau(first[:1], second[:1]))


def _cells(gap, alpha, seeds=(0, 1, 2)):
    """Rows of 16 cells at their start, after the first epoch and after the last, from functions of a cell's levels."""
    rows = []
    for seed, *levels in itertools.product(seeds, *[(0, 1)] * 4):
        cell = dict(zip(FACTORS, (0.4 * levels[0], 8 + levels[1], 0.1 + levels[2], 100 + 100 * levels[3]), strict=True))
        small = 1 + 0.01 * seed
        for step, (epoch, loss) in enumerate([(0.0, 2.0), (1.0, 1.5), (4.0, 0.5)]):
            rows.append(
                {
                    **cell, "seed": seed, "step": step, "epoch": epoch, "loss": loss + 0.1 * levels[0],
                    "alpha": small * alpha(*levels), "gsnr": alpha(*levels), "gwa": -alpha(*levels), "valid": 0.5,
                    "train": 0.5 + small * gap(*levels) * epoch / 4, "test": 0.5, "test_true": 0.6, "test_loss": 1.0,
                }
            )  # fmt: skip
    return rows


def _runs(rows):
    return predictor_report.runs_of(frame(rows), 4, 1.8, 1.0)


def _gap(noise, width, rate, m):
    return 0.2 + 0.1 * noise + 0.05 * width + 0.02 * rate - 0.01 * m


@pytest.mark.parametrize(("sign", "expected"), [(-1, "holds"), (1, "contradicted")])
def test_the_claims_of_alpha_follow_the_sign(sign, expected):
    runs = _runs(_cells(_gap, lambda *levels: 0.5 + sign * _gap(*levels)))
    results = predictor_report.claims(runs)
    assert [result.verdict for result in results[:5]] == [expected] * 5
    assert results[0].effect == sign
    assert all("opposite in 8" in r.ours if sign > 0 else "sign in 8" in r.ours for r in results[1:5])
    gwa, gsnr, better = results[5:]
    assert (gsnr.verdict, gwa.verdict) == ((expected, "contradicted") if sign < 0 else (expected, "holds"))
    assert better.verdict == expected
    assert [r.paper != "" for r in results] == [False, False, False, True, False, True, True, False]


def test_a_line_differs_in_one_factor_alone():
    runs = _runs(_cells(_gap, lambda noise, width, rate, m: 0.5 + 0.1 * rate - 0.05 * noise))
    assert correlations(runs, "alpha", "gap", FACTORS, "rate").tolist() == [1, 1, 1]
    assert correlations(runs, "alpha", "gap", FACTORS, "noise").tolist() == [-1, -1, -1]
    assert correlations(runs, "alpha", "gap", FACTORS, "width").isna().all()
    assert signs(runs, "alpha", "gap", FACTORS, "rate") == (0, 8)
    assert signs(runs, "alpha", "gap", FACTORS, "noise") == (8, 0)
    assert signs(runs, "alpha", "gap", FACTORS, "width") == (0, 0)
    own = runs[runs["seed"] == 1]
    assert correlations(runs, "alpha", "gap", FACTORS)[1] == pytest.approx(tau(own["alpha"], own["gap"]))


def test_a_run_is_its_first_epoch_and_its_last():
    rows = _cells(_gap, lambda *_: 0.25)
    runs = _runs([row for row in rows if (row["seed"], row["epoch"]) != (2, 4.0)])
    assert set(runs["seed"]) == {0, 1}
    one = runs[(runs["seed"] == 0) & (runs["noise"] == 0) & (runs["m"] == 200)].iloc[0]
    assert (one["r"], one["alpha_unbiased"], one["loss"]) == (50, pytest.approx(49 / 199), 1.5)
    assert (one["gap"], one["gap_loss"], one["gap_true"]) == pytest.approx((0.19, 0.5, 0.09))
    assert one["gap_at_loss"] == pytest.approx(0.19 * (1 / 4 + 3 / 8))
    assert _runs([]).empty


def test_a_loss_that_is_not_reached_has_no_value():
    run = frame([{"step": i, "loss": loss, "gap": i} for i, loss in enumerate([2.0, 1.0, 1.0])])
    assert predictor_report.at_loss(run, "gap", 1.25) == 0.75
    assert np.isnan(predictor_report.at_loss(run, "gap", 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noises": (0.2, 0.2)}, "Expected noises to be different ones"),
        ({"noises": (1.2,)}, r"Expected noises in \[0, 1\]"),
        ({"learning_rates": (0.0,)}, "Expected learning_rates > 0"),
        ({"widths": (0, 8)}, "Expected widths >= 1"),
        ({"sizes": ()}, "Expected sizes to be different ones"),
        ({"validation": -1}, "Expected validation >= 0"),
        ({"epochs": 1}, "Expected epochs >= 2"),
        ({"early": 1}, "Expected early >= 2 or every=1"),
        ({"model": "cnn"}, "Expected model=mlp"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(PredictorConfig(), **options))


def test_a_training_set_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="at least 4000 examples"):
        PredictorConfig().check_size(3999)
    PredictorConfig().check_size(4000)


def test_validation_examples_are_trained_on_by_no_cell(monkeypatch):
    config, kept = smoked(PredictorConfig()), []
    monkeypatch.setattr(loop, "train_all", lambda *arguments: kept.extend(arguments[3]))
    predictor.measure(config, None, None)
    loaded, labels = data.load("digits"), {}
    assert len(kept) == 4 * 3
    for training in kept:
        images, own = training.measure.args[0]
        np.testing.assert_array_equal(images, loaded.train_images[300:360])
        wrong, noise = own != loaded.train_labels[300:360], training.marks["noise"]
        assert wrong.any() == (noise > 0)
        same = labels.setdefault((noise, training.marks["seed"]), own)
        np.testing.assert_array_equal(own, same)
        assert training.changes["num_train"] == 300
        assert training.noise == (noise, noise)
    assert (labels[0.4, 0] != labels[0.4, 1]).any()


@pytest.mark.slow
def test_a_smoke_run_leaves_claims_tables_and_figures(tmp_path, capsys):
    assert not main(["predictor", "--smoke", "--out", str(tmp_path / "run")])
    assert "What predicts the generalisation gap" in capsys.readouterr().out
    section = json.loads((tmp_path / "run" / "summary.json").read_text())["sections"][0]
    assert (len(section["claims"]), [len(table["rows"]) for table in section["tables"]]) == (8, [7, 5])
    for figure in section["figures"]:
        assert (tmp_path / "run" / "figures" / figure["file"]).stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} >= {0.0, 1.0, 2.0}
    assert all(0 <= row["valid"] <= 1 for row in rows)
