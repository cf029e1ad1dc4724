"""A run that is stopped goes on as if it had never been; what cannot be written or read is said at once."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, outputs, running

from benchmarks import kills
from experiments.__main__ import main
from experiments.checkpoint import Checkpoints, Position, require_space

SMALL = ["coherence", "--data", "digits", "--width", "16", "--batch-size", "20", "--epochs", "2", "--save-every", "20"]


def _run(out, *more):
    return main([*SMALL, *more, "--out", str(out)])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_measures_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills.finish(whole, 2)
    rng = random.Random(7)
    for _ in range(3):
        found = kills.kill(killed, 2, rng.uniform(0, kills.MOST_DELAY))
        assert found["killed"], found
    said = kills.finish(killed, 2)
    assert "Going on from step" in said
    metrics = (whole / "metrics.jsonl").read_bytes()
    assert len(metrics.splitlines()) == 5 * 3
    assert (killed / "metrics.jsonl").read_bytes() == metrics
    assert (killed / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    assert not any(word in metrics.decode() for word in ("time", "seconds", "training"))
    times = [json.loads(line) for line in (killed / "timings.jsonl").read_text().splitlines()]
    assert all(row["training"] + row["measuring"] + row["saving"] > 0 for row in times)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert _run(out) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _newest(run):
    return sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name))[-1]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def _largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _no_state(newest):
    shutil.rmtree(newest / "state")


def _cut(newest):
    path = _largest_file(newest)
    os.truncate(path, path.stat().st_size // 2)


def _unfinished(newest):
    (newest / "sha256").unlink()


@pytest.mark.parametrize("damage", [lambda newest: _flip(_largest_file(newest)), _cut, _no_state, _unfinished])
def test_the_checkpoint_before_a_damaged_one_is_used(finished, run, damage, capsys):
    damage(_newest(run))
    assert _run(run) == 0
    said = capsys.readouterr().err
    assert "Checkpoint 1000000139 is damaged" in said
    assert "The one before is used: 1000000121." in said
    assert "Going on from step 120 of training 2." in said
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert _newest(run).name == "1000000139"


def test_a_checkpoint_that_was_being_written_is_passed_over(finished, run):
    newest = _newest(run)
    newest.rename(newest.with_name(newest.name + ".orbax-checkpoint-tmp-0"))
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"labels": "rand')
    assert _run(run) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_where_no_checkpoint_can_be_read_nothing_is_lost(finished, run, capsys):
    for each in (run / "checkpoints").iterdir():
        _flip(_largest_file(each))
    assert _run(run) == 1
    assert "no whole checkpoint: name another folder, or delete that" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_damaged_metrics_are_one_line_and_nothing_is_lost(run, capsys):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"x" + metrics.read_bytes()[1:])
    shutil.rmtree(_newest(run))
    before = metrics.read_bytes()
    assert _run(run) == 1
    message = f"ValueError: Expected {metrics} as an earlier run wrote it, got a damaged one (Expecting value"
    assert capsys.readouterr().err.startswith(message)
    assert metrics.read_bytes() == before


def test_a_finished_run_only_reports_again(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    (run / "report.html").unlink()
    assert _run(run) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "report.html").exists()
    out = capsys.readouterr().out
    assert "Time of run: " in out
    assert all(f"{what} " in out for what in ("training", "measuring", "saving"))


def test_options_that_change_no_result_may_change(run):
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(_newest(run))
    assert _run(run, "--save-every", "7", "--read-threads", "3") == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_changed_option_is_an_error_and_nothing_is_lost(run, capsys):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert _run(run, "--learning-rate", "0.2") == 1
    message = "got learning_rate=0.2 where it was begun with learning_rate=0.1"
    assert message in capsys.readouterr().err
    assert main(["noise", *SMALL[1:], "--out", str(run)]) == 1
    assert "got experiment=noise where it was begun with experiment=coherence" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_was_killed_while_it_made_its_folder_starts(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.tmp").write_text('{"exper')
    assert _run(out) == 0
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_folder_that_cannot_be_made_is_an_error(capsys):
    assert _run(Path("/proc/nowhere/run")) == 1  # holds for root too
    assert "/proc/nowhere" in capsys.readouterr().err


def test_a_disk_that_is_full_is_known_before_training(tmp_path):
    """No file may grow beyond 4 kB, which is less than the network; Python ignores the signal that goes with it."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    start = limited + "from experiments.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *SMALL, "--out", tmp_path / "run"]
    with running([command], [kills.ENVIRONMENT]) as started:
        _, said = started[0].communicate(timeout=120)
        assert started[0].returncode == 1, said
    assert f"OSError: Expected to write a checkpoint to {tmp_path / 'run' / 'checkpoints'}" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_too_little_space_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"Expected 2,000,000,000,008 MB free for a checkpoint in .*, got [\d,]+ MB"):
        require_space(tmp_path, 10**18)


def test_a_checkpoint_holds_every_kind_of_leaf(tmp_path):
    state = {
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "count": jnp.int32(3),
        "empty": jnp.zeros((0, 4)),
        "nan": jnp.float32(np.nan),
        "pair": (jnp.arange(4.0), None),
    }
    position = Position(1, 20, 0, {"training": 1.5})
    Checkpoints(tmp_path).save(position, state)
    restored = Checkpoints(tmp_path).restore(0)
    assert restored is not None
    found, leaves = restored
    assert found == position
    for leaf, want in zip(leaves, jax.tree.leaves(state), strict=True):
        assert leaf.dtype == want.dtype
        np.testing.assert_array_equal(leaf, want)


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path):
    """The second has no folder: it is told what the first has read."""
    out, metrics = tmp_path / "run", b""
    for again in (False, True):
        port = free_port()
        cluster = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
        start = [sys.executable, "-m", "experiments", *SMALL, "--epochs", "1"]
        commands = [[*start, *cluster, p, "--out", folder] for p, folder in enumerate((out, tmp_path / "none"))]
        with running(commands, [kills.ENVIRONMENT] * 2) as started:
            said = outputs(started)[0][1]
        if not again:
            metrics = (out / "metrics.jsonl").read_bytes()
            shutil.rmtree(_newest(out))
    assert "Going on from step 60 of training 2." in said
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert not (tmp_path / "none").exists()
