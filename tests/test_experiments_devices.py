"""Experiments on several devices, and as several processes: the same numbers, written once."""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, outputs, running

from experiments import checks, devices
from experiments.__main__ import main
from experiments.noise import NoiseConfig

SMALL = [
    "--data",
    "digits",
    "--num-train",
    "360",
    "--width",
    "16",
    "--batch-size",
    "20",
    "--methods",
    "sgd",
    "m3",
    "rm3",
]


def _command(out, *more):
    return [sys.executable, "-m", "experiments", "noise", *SMALL, "--out", out, *more]


ON_ONE_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def _cluster(port, process, number=2):
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", number, "--process-id", process]


def _open_mpi(port, process):
    """What Open MPI tells a process that it starts; JAX makes the port out of the number of the job."""
    job = (port - (65535 - 2**12 + 1)) * 2**12
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    with running([_command(out, "--epochs", 1)], [ON_ONE_CPU]) as started:
        outputs(started)
    return _rows(out)


def _check_same(rows, alone):
    assert len(rows) == len(alone)
    for row, want in zip(rows, alone, strict=True):
        assert row.keys() == want.keys()
        assert (row["method"], row["epoch"]) == (want["method"], want["epoch"])
        for name in ("loss", "r"):
            np.testing.assert_allclose(row[name], want[name], rtol=1e-3)


@pytest.mark.parametrize("told", ["by options", pytest.param("by Open MPI", marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does_and_the_first_writes(told, alone, tmp_path):
    out, apart, port = tmp_path / "out", tmp_path / "apart", free_port()
    if told == "by Open MPI":
        port = 65535 - 2**12 + 1 + port % 2**12
    options = [_cluster(port, p) if told == "by options" else [] for p in range(2)]
    environments = [ON_ONE_CPU | (_open_mpi(port, p) if told == "by Open MPI" else {}) for p in range(2)]
    commands = [_command(folder, "--epochs", 1, *options[p]) for p, folder in enumerate((out, apart))]
    with running(commands, environments) as started:
        outs = outputs(started)
    _check_same(_rows(out), alone)
    assert json.loads((out / "env.json").read_text())["processes"] == 2
    assert "coordinator" not in json.loads((out / "config.json").read_text())
    assert (out / "report.html").exists()
    assert not apart.exists()
    assert "Report:" in outs[0][0]
    assert "Report:" not in outs[1][0]
    assert "step" not in outs[1][1]  # no bar


def _wait_for_rows(out):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and len(_rows(out)) > 1):
        time.sleep(0.2)


@pytest.mark.slow
def test_where_the_writing_process_dies_the_other_ends(tmp_path):
    out, port = tmp_path / "out", free_port()
    commands = [_command(out, "--epochs", 5000, *_cluster(port, p)) for p in range(2)]
    with running(commands, [ON_ONE_CPU] * 2) as started:
        _wait_for_rows(out)
        started[0].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, err = started[1].communicate(timeout=60)
        assert time.monotonic() - start < 30
        assert started[1].returncode != 0
    assert err.strip()


def test_a_folder_that_holds_something_ends_all_processes(tmp_path):
    (tmp_path / "precious").write_text("data")
    port = free_port()
    with running([_command(tmp_path, *_cluster(port, p)) for p in range(2)], [ON_ONE_CPU] * 2) as started:
        outs = [worker.communicate(timeout=120) for worker in started]
        assert [worker.returncode for worker in started] == [1, 1]
    assert "Expected out to be a new or empty folder" in outs[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_processes_that_were_told_different_things_do_not_start(tmp_path):
    out, port = tmp_path / "out", free_port()
    commands = [_command(out, *_cluster(port, p), "--learning-rate", 0.1 * (p + 1)) for p in range(2)]
    with running(commands, [ON_ONE_CPU] * 2) as started:
        errors = [worker.communicate(timeout=120)[1] for worker in started]
        assert [worker.returncode for worker in started] == [1, 1]
    for error in errors:
        assert "got learning_rate=0.1 in process 0 and learning_rate=0.2 in process 1" in error
    assert not out.exists()


@pytest.mark.slow
def test_a_port_that_is_taken_or_a_process_that_does_not_come_is_an_error(tmp_path):
    with socket.create_server(("", 0)) as taken, socket.create_server(("", 0)) as other:
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        commands = [_command(tmp_path / "out", *_cluster(each, 0), "--wait", 4) for each in (port, free)]
        with running(commands, [ON_ONE_CPU] * 2) as started:
            errors = [worker.communicate(timeout=60)[1] for worker in started]
            assert all(worker.returncode for worker in started)
    assert f"Expected a free port for coordinator, got 127.0.0.1:{port}" in errors[0]
    assert f"waits for 2 processes to meet at 127.0.0.1:{free}, for up to 4 s" in errors[1]


@pytest.mark.slow
def test_sigterm_ends_all_processes(tmp_path):
    out, port = tmp_path / "out", free_port()
    commands = [_command(out, "--epochs", 5000, *_cluster(port, p)) for p in range(2)]
    with running(commands, [ON_ONE_CPU] * 2) as started:
        _wait_for_rows(out)
        started[1].send_signal(signal.SIGTERM)
        started[1].communicate(timeout=30)
        start = time.monotonic()
        started[0].communicate(timeout=60)
        assert time.monotonic() - start < 30
        assert all(worker.returncode for worker in started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, r"together, got no coordinator and no process_id"),
        ({"coordinator": "a:1", "num_processes": 2}, r"together, got no process_id"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, r"as HOST:PORT, got coordinator=a"),
        ({"coordinator": ":1", "num_processes": 2, "process_id": 0}, r"as HOST:PORT, got coordinator=:1"),
        ({"coordinator": "a:b", "num_processes": 2, "process_id": 0}, r"as HOST:PORT, got coordinator=a:b"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, r"num_processes >= 1, got num_processes=0"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"process_id < num_processes, got process_id=2"),
        ({"wait": 0}, r"Expected wait >= 1, got wait=0"),
    ],
)
def test_what_tells_of_other_processes_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        checks.check(NoiseConfig(**options))


def test_a_wrong_cluster_is_one_line_on_the_terminal(capsys):
    assert main(["demo", "--num-processes", "2"]) == 1
    assert "Expected coordinator, num_processes and process_id together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SLURM_STEP_NUM_TASKS", "4", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("TPU_WORKER_HOSTNAMES", "a,b", True),
        ("TPU_PROCESS_ADDRESSES", "a:1,b:1", True),
        ("JOB_COMPLETION_INDEX", "0", True),
        ("UNRELATED", "1", False),
    ],
)
def test_launchers_are_known_by_their_environment(name, value, told, monkeypatch):
    if name == "JOB_COMPLETION_INDEX":
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv(name, value)
    assert devices._told_by_environment() is told


def test_rows_that_do_not_divide_are_everywhere():
    on = devices.devices()
    assert on.mesh is not None
    assert on.spread(np.zeros((16, 3))).sharding.spec == jax.sharding.PartitionSpec("data")
    assert on.spread(np.zeros((12, 3))).sharding.is_fully_replicated
    alone = devices.Devices(None)
    assert alone.spread(jnp.zeros(16)).sharding.num_devices == 1
