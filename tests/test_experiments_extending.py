"""An experiment is one file and one line; a method, a data set and a network are one entry each."""

import dataclasses
import json

import flax.linen as nn
import numpy as np
import optax
import pytest

import cg_jax as cg
from experiments import data, figures, loop
from experiments.__main__ import main
from experiments.claims import Claim
from experiments.configs import Config, Hidden
from experiments.experiment import Experiment
from experiments.line import Line
from experiments.methods import METHODS, Method
from experiments.models import MODELS, Network
from experiments.registry import EXPERIMENTS
from experiments.section import Figure, Section, curve, frame

SMALL = ["--width", "8", "--batch-size", "20", "--epochs", "1"]


@dataclasses.dataclass(frozen=True)
class WidthConfig(Config):
    """Whether a wider network fits more in one epoch."""

    name: Hidden = "width"

    data: str = "digits"
    factor: int = 4
    """How much wider."""

    def check(self):
        if self.factor < 2:
            raise ValueError(f"Expected factor >= 2, got factor={self.factor}.")


def _measure(config, problem, folder):
    def measurement(examples, model, params):
        seen = examples.guess("train", model, params)
        return {"accuracy": float((seen.guess == seen.labels).mean()), "width": model.width}

    trainings = [
        loop.Training(
            f"width · {arm} · seed {seed}",
            {"arm": arm, "seed": seed},
            "sgd",
            (0.0, 0.0),
            measurement,
            lambda row: {"accuracy": f"{row['accuracy']:.2f}"},
            changes={"width": config.width * factor},
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for arm, factor in (("narrow", 1), ("wide", config.factor))
    ]
    loop.train_all(config, problem, folder, trainings)


def _section(config, rows, folder):
    table = frame(rows)
    last = table.groupby(["arm", "seed"])["accuracy"].last()
    claim = Claim("A wider network fits more in one epoch.", "training accuracy, wide less narrow", "points", 1)
    figure, axes = figures.grid(1, 1)
    for arm, line in (("narrow", Line("narrow", "black")), ("wide", Line("wide", "tab:blue", "--"))):
        figures.band(axes[0, 0], curve(table[table["arm"] == arm], "accuracy"), line)
    figures.save(figure, folder / "width.png")
    result = claim.compared(100 * last["wide"], 100 * last["narrow"])
    return Section(config.name, "Width", ("A text.",), (result,), (), (Figure("width.png", "A caption."),))


EXPERIMENT = Experiment(WidthConfig(), _measure, _section)


def _rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, EXPERIMENT.name, EXPERIMENT)  # the one line


def test_an_experiment_has_its_command_its_claims_and_its_figure(registered, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["width", *SMALL, "--seeds", "3", "--factor", "16", "--out", str(out)]
    assert main(options) == 0
    assert {(row["arm"], row["width"]) for row in _rows(out)} == {("narrow", 8), ("wide", 128)}
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    (claim,) = section["claims"]
    assert claim["verdict"] == "holds"
    assert 0 < claim["low"] < claim["effect"] < claim["high"]
    assert json.loads((out / "config.json").read_text())["experiment"] == "width"
    assert "A wider network fits more in one epoch." in (out / "report.html").read_text()
    assert "[holds] A wider network" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "report.html").unlink()
    (out / "figures" / "width.png").unlink()
    assert main(["figures", str(out)]) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main([*options, "--learning-rate", "0.2"]) == 1
    assert "got learning_rate=0.2 where it was begun with learning_rate=0.1" in capsys.readouterr().err


def test_its_own_options_are_checked_and_shown(registered, tmp_path, capsys):
    assert main(["width", "--factor", "1", "--out", str(tmp_path / "run")]) == 1
    assert "Expected factor >= 2, got factor=1." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["width", "--help"])
    shown = capsys.readouterr().out
    assert "--factor" in shown
    assert "--name" not in shown


def test_it_has_a_smoke_test(registered, tmp_path):
    assert main(["width", "--smoke", "--out", str(tmp_path / "run")]) == 0
    assert max(row["epoch"] for row in _rows(tmp_path / "run")) == 2


def _stripes():
    rng = np.random.default_rng(0)
    labels = np.arange(200, dtype=np.int32) % 2
    images = rng.random((200, 8, 8, 1), np.float32) / 2 + (labels[:, None, None, None] * np.eye(8)[..., None] / 2)
    images = images.astype(np.float32)
    return data.Dataset(images[:150], labels[:150], images[150:], labels[150:], 2)


def test_a_method_a_data_set_and_a_network_are_one_entry_each(monkeypatch, tmp_path, capsys):
    options = ["noise", "--data", "stripes", "--model", "linear", *SMALL, "--methods", "sgd", "trimmed"]
    with pytest.raises(SystemExit):
        main(options)
    assert "Invalid choice" in capsys.readouterr().err
    transform = lambda: optax.chain(cg.stacked(cg.trimmed_mean(1)))  # noqa: E731
    monkeypatch.setitem(METHODS, "trimmed", Method(Line("trimmed mean of 3", "tab:green", ":"), 3, transform, ("sgd",)))
    monkeypatch.setitem(data.DATASETS, "stripes", data.DatasetEntry(Line("stripes", "black"), lambda _: _stripes()))
    monkeypatch.setitem(MODELS, "linear", Network(Line("linear", "black"), _Linear, depths=()))
    out = tmp_path / "run"
    assert main([*options, "--out", str(out)]) == 0
    rows = _rows(out)
    assert {row["method"] for row in rows} == {"sgd", "trimmed"}
    assert {row["chance"] for row in rows} == {0.5}
    assert "At the last epoch trimmed mean of 3 has a higher test accuracy than SGD." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["noise", "--help"])
    assert "trimmed" in capsys.readouterr().out


class _Linear(nn.Module):
    width: int = 1
    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))
