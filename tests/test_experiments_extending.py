"""An experiment is one file and one line; a method, a data set and a network are one entry each."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

import cg_jax as cg
from experiments import data
from experiments.__main__ import main
from experiments.line import Line
from experiments.methods import METHODS, Method
from experiments.models import MODELS, Network
from experiments.registry import EXPERIMENTS

ROOT = Path(__file__).parents[1]
SMALL = ["--width", "8", "--batch-size", "20", "--epochs", "1"]


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The experiment of the guide: its file, and the one line."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("extending*.md")]
    (code,) = re.findall(r'```python\n("""Whether a wider network.*?)```', "".join(pages), re.DOTALL)
    path = tmp_path / "width.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("experiments.width", path)
    width = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, width)
    spec.loader.exec_module(width)
    monkeypatch.setitem(EXPERIMENTS, width.EXPERIMENT.name, width.EXPERIMENT)


def _rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_an_experiment_has_its_command_its_claims_and_its_figure(registered, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["width", "--data", "digits", *SMALL, "--seeds", "3", "--factor", "16", "--out", str(out)]
    assert main(options) == 0
    assert {(row["arm"], row["seed"]) for row in _rows(out)} == {(a, b) for a in ("narrow", "wide") for b in range(3)}
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    (claim,) = section["claims"]
    assert claim["verdict"] == "holds"
    assert 0 < claim["low"] < claim["effect"] < claim["high"]
    assert json.loads((out / "config.json").read_text())["experiment"] == "width"
    assert "A wider network fits more." in (out / "report.html").read_text()
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
    assert "How much wider." in shown
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
    line = Line("trimmed mean of 3", "tab:green", ":")
    method = Method(line, 3, lambda: cg.stacked(cg.trimmed_mean(1)), rivals=("sgd",))
    monkeypatch.setitem(METHODS, "trimmed", method)
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
