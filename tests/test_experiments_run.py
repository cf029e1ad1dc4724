"""Whole runs on scikit-learn's digits, as a user starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments.__main__ import main

SMALL = ["--data", "digits", "--width", "32", "--batch-size", "20"]


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _check_report(folder, pictures):
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == pictures
    assert not re.findall(r'(?:src|href)="(?!data:|https://arxiv\.org)', page)
    assert "<script" not in page


def test_coherence_leaves_a_whole_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["coherence", *SMALL, "--epochs", "2", "--seeds", "2", "--out", str(out)]) == 0
    rows = _rows(out)
    assert {(row["labels"], row["seed"]) for row in rows} == {(a, b) for a in ("real", "random") for b in (0, 1)}
    start = [row for row in rows if row["step"] == 0 and row["labels"] == "real"]
    assert start[0]["train"]["count"] == 1400
    assert start[0]["test"]["count"] == 397
    assert start[0]["train"]["r"] != start[1]["train"]["r"]
    parts = start[0]["per_tensor"].values()
    alpha = sum(part["share"] * part["alpha"] for part in parts)
    assert alpha == pytest.approx(start[0]["train"]["alpha"], rel=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] is True
    assert len(summary["sections"][0]["claims"]) == 6
    assert json.loads((out / "config.json").read_text())["seeds"] == 2
    environment = (out / "env.json").read_text()
    assert json.loads(environment)["versions"]["jax"]
    assert socket.gethostname() not in environment
    _check_report(out, 2)
    assert "Report:" in capsys.readouterr().out


@pytest.mark.slow
def test_noise_leaves_a_whole_folder(tmp_path):
    out = tmp_path / "run"
    assert main(["noise", *SMALL, "--epochs", "2", "--out", str(out)]) == 0
    rows = _rows(out)
    assert [row["epoch"] for row in rows if row["method"] == "m3"] == [0, 1, 2]
    # One start for all methods: the same network and the same labels.
    assert len({(row["loss"], row["test"]) for row in rows if row["epoch"] == 0}) == 1
    assert len({row["loss"] for row in rows if row["epoch"] == 2}) == 5
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["sections"][0]["claims"]) == 12
    assert len(summary["sections"][0]["tables"]) == 3
    _check_report(out, 1)


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("data")
    assert main(["coherence", *SMALL, "--out", str(tmp_path)]) == 1
    assert "Expected out to be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["coherence", "--epoch-count", "3"])
    assert stopped.value.code == 2
    assert "epoch-count" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupting_leaves_valid_files(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "experiments", "coherence", *SMALL, "--epochs", "2000", "--out", str(out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and len(_whole_lines(out)) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(_rows(out)) > 3
    assert json.loads((out / "summary.json").read_text())["complete"] is False
    assert "interrupted" in (out / "report.html").read_text()
    assert f"The same command with --out {out} goes on where it stopped." in said.decode()


def _whole_lines(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def test_divergence_is_reported_and_what_was_measured_stays(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*SMALL, "--epochs", "3", "--learning-rate", "1e20", "--out", str(out)]
    assert main(["coherence", *arguments]) == 1
    said = capsys.readouterr().err
    assert "Training diverged: losses or gradients are not finite; try a smaller --learning-rate.\n" in said
    assert "nonfinite" not in said
    assert len(_rows(out)) >= 1
    assert json.loads((out / "summary.json").read_text())["complete"] is False
