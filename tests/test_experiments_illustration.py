"""The drawings and the toy: their gradients in closed form, their claims on made-up rows, and a run without data."""

import json

import numpy as np
import pytest

from experiments import illustration
from experiments.__main__ import main
from experiments.checks import check
from experiments.illustration import METHODS, IllustrationConfig, toy
from experiments.illustration_report import claims, section
from experiments.run_folder import RunFolder


def test_the_toy_is_drawn_by_the_seed_and_has_one_shared_input():
    drawn = toy(3, 8, 0.25)
    assert drawn.corrupt.sum() == 2
    assert ((drawn.inputs != 0).sum(0) == [1] * 8 + [8]).all()
    true = np.sign(drawn.inputs[:, -1])
    np.testing.assert_array_equal(drawn.labels == true, ~drawn.corrupt)
    np.testing.assert_array_equal(toy(3, 8, 0.25).inputs, drawn.inputs)
    assert (toy(4, 8, 0.25).inputs != drawn.inputs).any()


def test_descent_is_that_of_numpy():
    drawn = toy(0, 8, 0.25)
    found = {row["method"]: row for row in illustration._descents(IllustrationConfig(examples=8, steps=50), 0)}
    for method, average in (("mean", np.mean), ("median", np.median)):
        w = np.zeros(9)
        for _ in range(50):
            w -= 0.1 * average((drawn.inputs @ w - drawn.labels)[:, None] * drawn.inputs, 0)
        losses = 0.5 * (drawn.labels - drawn.inputs @ w) ** 2
        row = found[method]
        assert row["step"] == 50
        assert row["shared"] == pytest.approx(w[-1], rel=1e-4)
        assert row["own"] == pytest.approx(np.linalg.norm(w[:-1]), rel=1e-4, abs=1e-7)
        assert row["corrupt"] == pytest.approx(losses[drawn.corrupt].mean(), rel=1e-4)
        assert row["pristine"] == pytest.approx(losses[~drawn.corrupt].mean(), rel=1e-4)
        assert row["test"] == pytest.approx(0.5 * ((1 - drawn.tests * w[-1]) ** 2).mean(), rel=1e-4)


def test_the_papers_toy_ends_where_the_paper_says():
    ends = {(row["method"], row["shared"]): row for row in illustration._of_the_paper(IllustrationConfig())}
    np.testing.assert_allclose(ends["mean", True]["w"], (0.2, 0.2, 0.2, 0.2, 0, 0.8), atol=1e-4)
    np.testing.assert_allclose(ends["mean", False]["w"], (1, 1, 1, 1, 0, 0), atol=1e-4)
    np.testing.assert_allclose(ends["median", True]["w"], (0, 0, 0, 0, 0, 1), atol=1e-4)
    np.testing.assert_allclose(ends["median", False]["w"], np.zeros(6))
    assert [ends["mean", shared]["test"] for shared in (True, False)] == pytest.approx([0.02, 0.5], abs=1e-4)


def test_two_examples_help_each_other_only_where_they_agree():
    agreeing, orthogonal = illustration._pairs(5)
    (_, a), (_, b) = agreeing["directions"]
    assert agreeing["average"] == pytest.approx([1, (a + b) / 2], abs=1e-4)
    assert agreeing["r"] == pytest.approx((4 + (a + b) ** 2) / (2 + a**2 + b**2), rel=1e-3)
    assert agreeing["helped"] > 0
    assert orthogonal["r"] == pytest.approx(1)
    assert orthogonal["helped"] == 0


def _rows(swapped):
    rows = []
    for seed in range(3):
        for m in (2, 64):
            own = m / 64 if swapped else 1 / m
            rows.append({"part": "size", "seed": seed, "m": m, "shared": 1 + 0.01 * seed, "own": own})
        for method in METHODS:
            robust = (method != "mean") != swapped
            values = {"corrupt": 2.0 + 0.1 * seed if robust else 0.1, "test": 0.1 if robust else 0.3 + 0.01 * seed}
            rows.append({"part": "toy", "method": method, "seed": seed, "step": 10, **values})
    return rows


@pytest.mark.parametrize(("swapped", "wanted"), [(False, "holds"), (True, "contradicted")])
def test_its_claims_are_judged_in_both_directions(swapped, wanted):
    results = claims(_rows(swapped))
    assert [each.verdict for each in results] == [wanted] * 5
    if not swapped:
        assert results[0].effect == pytest.approx(32)


def test_a_seed_that_is_not_whole_is_left_out(tmp_path):
    values = {"examples": 20, "corrupt": 0.25, "rate": 0.1, "steps": 10, "seeds": 3}
    assert section("illustration", values, _rows(False)[:4], tmp_path).claims == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": (4, 2)}, r"Expected sizes to be two or more that rise from 1 or more, got sizes=\(4, 2\)"),
        ({"steps": 0}, "Expected steps >= 1, got steps=0"),
        ({"learning_rate": 0.9}, "Expected 0 < learning_rate <= 0.5, got learning_rate=0.9"),
        ({"corrupt": 0.01}, "Expected corrupt to be an example or more and less than half, got corrupt=0.01"),
        ({"corrupt": 0.5}, "Expected corrupt to be an example or more and less than half, got corrupt=0.5"),
        ({"seeds": 0}, "Expected seeds >= 1, got seeds=0"),
        ({"seed": -1}, "Expected seed >= 0 and finite, got seed=-1"),
    ],
)
def test_options_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        check(IllustrationConfig(**changed))


def test_a_run_without_data_goes_on_and_is_drawn_again(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(["illustration", "--smoke", "--out", str(whole)]) == 0
    rows = (whole / "metrics.jsonl").read_bytes()
    (found,) = json.loads((whole / "summary.json").read_text())["sections"]
    assert [claim["seeds"] for claim in found["claims"]] == [3] * 5

    def add(self, **row):
        if row["part"] == "toy" and row["seed"] == 1 and row["method"] == "median":
            raise KeyboardInterrupt
        add_row(self, **row)

    options = ["illustration", "--smoke", "--out", str(out)]
    with monkeypatch.context() as patch:
        add_row = RunFolder.add
        patch.setattr(RunFolder, "add", add)
        assert main(options) == 130
    cut = (out / "metrics.jsonl").read_bytes()
    assert rows.startswith(cut)
    assert 0 < len(cut) < len(rows)
    assert main(options) == 0
    assert (out / "metrics.jsonl").read_bytes() == rows
    drawn = (whole / "figures" / "illustration.png").read_bytes()
    (out / "figures" / "illustration.png").unlink()
    assert main(["figures", str(out)]) == 0
    assert (out / "figures" / "illustration.png").read_bytes() == drawn
    assert (out / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    assert main([*options, "--corrupt", "0.3"]) == 1
