"""Comparisons of methods: what is done to a data set, how learning rates are chosen, and the experiment of all."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from processes import free_port, outputs, running

from benchmarks.kills import ENVIRONMENT
from experiments import comparison, data, loop, moments, noise, robust_report
from experiments.__main__ import main
from experiments.arrays import InMemory
from experiments.checks import check
from experiments.comparison import chosen
from experiments.data import Noise
from experiments.noise import NoiseConfig
from experiments.robust import CELLS, RobustConfig
from experiments.seconds import from_timings, keep_seconds, seconds_of
from experiments.section import frame
from experiments.train import Keys

DIGITS = ["--data", "digits", "--width", "8", "--batch-size", "20"]


def _rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_class_noise_sends_each_class_to_one_other():
    true = np.arange(1000, dtype=np.int32) % 10
    following = []
    for seed in range(5):
        labels = data.corrupt(jax.random.key(seed), true, 0.4, 10, "class")
        changed = labels != true
        assert changed.sum() == 400
        pairs = {(int(a), int(b)) for a, b in zip(true[changed], labels[changed], strict=True)}
        assert len(pairs) == len(dict(pairs)) == len({b for _, b in pairs}) == 10
        reached = [0]
        for _ in range(9):
            reached.append(dict(pairs)[reached[-1]])
        assert sorted(reached) == [*range(10)]  # one cycle
        following.append(frozenset(pairs))
    assert len(set(following)) > 1
    np.testing.assert_array_equal(data.corrupt(jax.random.key(0), true, 0.0, 10, "class"), true)


@pytest.fixture(scope="module")
def digits():
    return InMemory(NoiseConfig(data="digits"))


def test_averages_over_examples_have_a_row_beside_the_references():
    methods = ("sgd", "mean3", "m3", "rm3", "clip", "geomed")
    assert noise._by_row(methods) == [
        ("mini-batches", ["sgd", "mean3", "m3", "rm3"]),
        ("single examples", ["sgd", "mean3", "m3", "clip", "geomed"]),
    ]
    assert noise._by_row(methods[:4]) == []


def test_without_options_the_noise_is_what_it_was(digits):
    keys = Keys.of(3)
    examples = digits.noisy(keys, Noise(0.5))
    loaded = data.load("digits")
    images, labels = jax.device_get(examples._there["train"])
    np.testing.assert_array_equal(images, loaded.train_images)
    np.testing.assert_array_equal(labels, data.corrupt(keys.noise, loaded.train_labels, 0.5, 10))
    assert set(examples._there) == {"train", "test"}


def test_validation_examples_are_apart_and_keep_their_wrong_labels(digits):
    keys, loaded = Keys.of(0), data.load("digits")
    examples = digits.noisy(keys, Noise(0.5, validation=0.2))
    parts = {name: jax.device_get(examples._there[name]) for name in ("train", "valid")}
    assert (len(parts["train"][1]), len(parts["valid"][1]), examples.num_train) == (1120, 280, 1120)
    rows = {
        name: data.held_out(jax.random.fold_in(keys.noise, 2), 1400, 0.2)[i]
        for i, name in enumerate(("train", "valid"))
    }
    assert sorted([*rows["train"], *rows["valid"]]) == [*range(1400)]
    labels = data.corrupt(keys.noise, loaded.train_labels, 0.5, 10)
    for name, (images, of_part) in parts.items():
        np.testing.assert_array_equal(images, loaded.train_images[rows[name]])
        np.testing.assert_array_equal(of_part, labels[rows[name]])
        assert 0.3 < (examples._labels[name][0] != examples._labels[name][1]).mean() < 0.6
    other = digits.noisy(Keys.of(1), Noise(0.5, validation=0.2))
    assert not np.array_equal(other._there["valid"][1], parts["valid"][1])


def test_a_rare_class_loses_its_examples_and_no_other_does(digits):
    true = data.load("digits").train_labels
    before = np.bincount(true, minlength=10)
    examples = digits.noisy(Keys.of(0), Noise(rare=0.05))
    after = np.bincount(examples._labels["train"][1], minlength=10)
    assert after[0] == round(0.05 * before[0])
    np.testing.assert_array_equal(after[1:], before[1:])
    assert examples.num_train == after.sum()
    assert np.bincount(true[data.without_most_of(jax.random.key(0), true, 1e-9)])[0] == 1
    np.testing.assert_array_equal(examples._labels["test"][1], data.load("digits").test_labels)


def test_the_learning_rate_that_validates_best_at_any_epoch_is_chosen():
    config = NoiseConfig(learning_rates=(1.0, 0.1, 0.3), validation=0.2)
    valid = {("sgd", 1.0): (0.9, 0.1), ("sgd", 0.1): (0.7, 0.8), ("m3", 0.1): (0.5, 0.6), ("m3", 0.3): (0.6, 0.2)}
    rows = [
        {"tuning": True, "method": method, "learning_rate": rate, "valid": value}
        for (method, rate), values in valid.items()
        for value in values
    ]
    rows.append({"method": "sgd", "learning_rate": 0.3, "valid": 1.0})  # reported, and no part of the choice
    assert chosen(config, ["m3", "sgd"], rows) == {"m3": 0.1, "sgd": 1.0}  # of equals the first
    assert chosen(dataclasses.replace(config, learning_rates=(0.3,)), ["m3"], []) == {"m3": 0.3}
    assert chosen(dataclasses.replace(config, learning_rates=()), ["m3"], []) == {"m3": config.learning_rate}


def test_learning_rates_are_chosen_on_a_seed_that_is_not_reported():
    for seed, want in ((0, 2**32 - 1), (7, 6)):
        config = NoiseConfig(seed=seed, seeds=3, learning_rates=(0.1, 0.3), validation=0.2)
        tunings = comparison.tunings(config, ["sgd", "m3"], Noise(), {})
        assert {each.marks["seed"] for each in tunings} == {want}
        assert [(each.method, each.changes["learning_rate"]) for each in tunings] == [
            *[("sgd", 0.1), ("sgd", 0.3), ("m3", 0.1), ("m3", 0.3)]
        ]
    assert comparison.tunings(NoiseConfig(learning_rates=(0.1,)), ["sgd"], Noise(), {}) == []


TUNED = [
    *("noise", *DIGITS, "--epochs", "2", "--methods", "sgd", "geomed", "--learning-rates", "0.01", "0.3"),
    *("--validation", "0.2", "--rare", "0.2", "--noise-kind", "class", "--noise", "0.4", "--no-coherence"),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main([*TUNED, "--save-every", "5", "--out", str(out)]) == 0
    return out


def test_a_tuned_run_reports_the_rate_that_validated_best(tuned):
    rows = _rows(tuned)
    tunings, reported = [row for row in rows if "tuning" in row], [row for row in rows if "tuning" not in row]
    assert set(tunings[0]) == {"tuning", "method", "seed", "learning_rate", "step", "epoch", "valid"}
    for method in ("sgd", "geomed"):
        best = max((row for row in tunings if row["method"] == method), key=lambda row: row["valid"])
        assert {row["learning_rate"] for row in reported if row["method"] == method} == {best["learning_rate"]}
    assert {row["seed"] for row in reported} == {0}
    assert all({"valid", "rare", "corrupt_true"} <= set(row) and "loss" not in row for row in reported)
    assert reported[0]["corrupt_share"] == pytest.approx(0.4, abs=0.03)
    (section,) = json.loads((tuned / "summary.json").read_text())["sections"]
    assert section["tables"][0]["title"] == "At the epoch of the best validation accuracy"
    assert section["tables"][0]["columns"][:3] == ["method", "learning rate", "epoch"]
    assert "Coherence is not measured." in section["paragraphs"]


def test_a_run_that_stops_while_it_tunes_goes_on(tuned, tmp_path, monkeypatch):
    """Killed in its first training, of four that tune: the choice comes out the same."""

    class Killed(BaseException):
        pass

    out, steps, trainer = tmp_path / "run", [], loop.trainer

    def failing(*arguments):
        method = trainer(*arguments)

        def step(*state):
            steps.append(0)
            if len(steps) == 60:
                raise Killed
            return method.step(*state)

        return method._replace(step=step)

    options = [*TUNED, "--save-every", "5", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "trainer", failing)
        with pytest.raises(Killed):
            main(options)
    assert {row.get("tuning") for row in _rows(out)} == {True}
    assert main(options) == 0
    assert (out / "metrics.jsonl").read_bytes() == (tuned / "metrics.jsonl").read_bytes()
    assert (out / "summary.json").read_bytes() == (tuned / "summary.json").read_bytes()


def test_without_wrong_labels_nothing_is_corrupt(tmp_path):
    out = tmp_path / "run"
    assert main(["noise", *DIGITS, "--epochs", "1", "--noise", "0", "--methods", "sgd", "m3", "--out", str(out)]) == 0
    rows = _rows(out)
    assert {(row["corrupt"], row["corrupt_true"]) for row in rows} == {(None, None)}
    assert all(row["pristine"] == row["train"] for row in rows)
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    assert all("memorised" not in claim["statement"] for claim in section["claims"])


SMOKE = ["robust", "--smoke", "--methods", "sgd", "mean3", "clip"]


def test_robust_leaves_a_whole_folder_and_is_drawn_again(tmp_path):
    out = tmp_path / "run"
    assert main([*SMOKE, "--out", str(out)]) == 0
    rows = _rows(out)
    assert {(row["cell"], row["method"]) for row in rows if "tuning" not in row} == {
        (cell, method) for cell in ("uniform40", "rare40") for method in ("sgd", "mean3", "clip")
    }
    assert {row["cell"] for row in rows if "tuning" in row} == {"uniform40"}
    assert all(("rare" in row) == (row["cell"] == "rare40") for row in rows if "tuning" not in row)
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    assert {table["title"] for table in section["tables"]} >= {"Learning rates", "40% redrawn"}
    assert sorted(each["file"] for each in section["figures"]) == ["accuracy.png", "curves.png", "memorised.png"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "timings.jsonl"}
    (out / "timings.jsonl").unlink()
    assert main(["figures", str(out)]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_every_method_has_a_smoke_test(tmp_path):
    assert main(["robust", "--smoke", "--out", str(tmp_path / "run")]) == 0
    (section,) = json.loads((tmp_path / "run" / "summary.json").read_text())["sections"]
    (table,) = [table for table in section["tables"] if table["title"] == "40% redrawn"]
    assert len(table["rows"]) == len(RobustConfig().methods)
    assert all(row[1] != "not measured" for row in table["rows"])


def _cell(better="clip", rare=False):
    rows = []
    for seed in range(3):
        for method in ("sgd", "mean3", "m3", "gaf", "clip", "winsorized"):
            for epoch, valid in ((0, 0.1), (1, 0.6), (2, 0.5)):
                test = 0.8 if method == better else 0.5 + epoch / 10
                rows.append(
                    {
                        "cell": "uniform40", "method": method, "seed": seed, "learning_rate": 0.1, "step": epoch,
                        "epoch": float(epoch), "valid": valid, "test": test + seed / 1000, "pristine": 0.95,
                        "corrupt": 0.1 if method == better else 0.2, "corrupt_true": 0.5, "train": 0.5,
                    } | ({"rare": 0.0 if method == better else 0.9} if rare else {})
                )  # fmt: skip
    return rows


def test_claims_of_a_cell_follow_the_numbers():
    results = {each.statement: each.verdict for each in moments.claims(frame(_cell(rare=True)), "Here: ")}
    subjects = {text: text.split(" has")[0].split(" recognises")[0] for text in results}
    of_clip = {text: verdict for text, verdict in results.items() if "clip" in subjects[text]}
    # Three moments against each of three rivals, early stopping, and the rare class at two moments.
    assert len(of_clip) == 3 * 3 + 1 + 2
    assert set(of_clip.values()) == {"holds"}
    stopped = "Here: At the last epoch clip has a higher test accuracy than SGD has at its selected epoch."
    assert of_clip[stopped] == "holds"
    rare = "Here: At its selected epoch clip recognises fewer examples of the rare class than mean of 3 (control)."
    assert of_clip[rare] == "holds"
    reversed_ = {each.statement: each.verdict for each in moments.claims(frame(_cell("mean3")))}
    against = [verdict for text, verdict in reversed_.items() if "clip has" in text and text.endswith("(control).")]
    assert against == ["contradicted"] * 3


def test_where_labels_are_right_the_price_is_predicted():
    table = frame(_cell()).assign(corrupt=np.nan)
    results = {each.statement: each for each in moments.claims(table)}
    assert all("lower test accuracy" in text and text.endswith("(control).") for text in results)
    assert results["At the last epoch clip has a lower test accuracy than mean of 3 (control)."].predicted == (
        "difference below 0"
    )


def test_the_selected_epoch_is_the_first_that_validates_best():
    rows = _cell()
    for row in rows:
        row["valid"] = {0.0: 0.3, 1.0: 0.6, 2.0: 0.6}[row["epoch"]]
    assert set(moments.moments(frame(rows), "selected")["epoch"]) == {1.0}
    assert moments.whens(frame(rows)) == ("selected", "last", "learnt")


def test_only_finished_trainings_are_reported(tmp_path):
    config = RobustConfig(methods=("sgd", "mean3", "m3", "gaf", "clip", "winsorized"), epochs=2, seeds=3)
    rows = [row for row in _cell() if (row["method"], row["seed"]) != ("winsorized", 2)]
    labels = {"uniform40": "40% redrawn", "clean": "no wrong labels"}
    section = robust_report.section(config, labels, rows, tmp_path)
    table = section.tables[-1]
    assert [row[:2] for row in table.rows][-2:] == [
        ("clip, at the median norm", "0.1"),
        ("winsorised mean, a quarter per side", "not measured"),
    ]
    assert "over 3 seed(s)" in table.note
    cut = [row for row in rows if (row["method"], row["seed"], row["epoch"]) != ("m3", 1, 2.0)]
    assert "over 2 seed(s)" in robust_report.section(config, labels, cut, tmp_path).tables[-1].note
    assert robust_report.section(config, labels, [], tmp_path).tables == ()


def test_seconds_are_those_between_the_first_and_the_last_line_of_the_fastest_training(tmp_path):
    lines = [{"tuning": True, "cell": "clean", "method": "sgd", "seed": 9, "step": 9, "training": 99.0}]
    clock = 0.0
    for seed, spent in ((0, 5.0), (1, 1.0), (2, 2.0)):
        lines += [
            {"cell": "clean", "method": "sgd", "seed": seed, "step": step, "training": clock + step / 10 * spent}
            for step in (0, 5, 10)
        ]
        clock += spent
    lines.append({"cell": "clean", "method": "sgd", "seed": 3, "step": 0, "training": clock})
    (tmp_path / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert from_timings(tmp_path / "timings.jsonl") == {"sgd": 1.0}
    keep_seconds(tmp_path)
    (tmp_path / "timings.jsonl").unlink()
    assert seconds_of(tmp_path) == {"sgd": 1.0}
    assert seconds_of(tmp_path / "none") == {}


def test_a_cell_says_what_it_does_to_the_training_set():
    config = RobustConfig()
    check(config)
    assert {cell: config.noise(cell) for cell in ("clean", "class40", "rare40")} == {
        "clean": Noise(validation=0.2),
        "class40": Noise(0.4, kind="class", validation=0.2),
        "rare40": Noise(0.4, rare=0.05, validation=0.2),
    }
    assert {each.tuned for each in CELLS.values()} <= set(CELLS)


def test_shares_of_nothing_are_no_numbers():
    labels = np.array([1, 2])
    assert pd.isna(comparison.shares(labels, labels, labels)["corrupt"])
    assert moments.in_percent(pd.Series([np.nan])) == "–"


@pytest.mark.slow
def test_two_processes_choose_the_same_learning_rates(tmp_path):
    """The second has no rows of what was measured before they went on: it is told the choice."""
    out, metrics = tmp_path / "run", b""
    for again in (False, True):
        cluster = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
        start = [sys.executable, "-m", "experiments", *TUNED, "--epochs", "1", "--save-every", "10"]
        commands = [[*start, *cluster, p, "--out", folder] for p, folder in enumerate((out, tmp_path / "none"))]
        with running(commands, [ENVIRONMENT] * 2) as started:
            said = outputs(started)[0][1]
        if not again:
            metrics = (out / "metrics.jsonl").read_bytes()
            shutil.rmtree(max((out / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    assert "of training 6." in said
    assert (out / "metrics.jsonl").read_bytes() == metrics
