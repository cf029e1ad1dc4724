"""Two runs never write to one folder at once; the lock of a run that was killed is no lock."""

import contextlib
import fcntl
import json
import signal
import sys
import threading
import time

import pytest
from processes import free_port, outputs, running

from benchmarks.kills import ENVIRONMENT
from experiments.__main__ import main
from experiments.coherence import CoherenceConfig
from experiments.demo import DemoConfig
from experiments.lock import LOCK, locked
from experiments.run_folder import new_folder, require_usable
from experiments.runner import folder_of

SMALL = ["--data", "digits", "--width", "16", "--batch-size", "20", "--save-every", "20"]
LOCKED = "Expected out to be a folder that no other run writes to, got out="


def _command(*options):
    return [sys.executable, "-m", "experiments", *options]


def _rows(folder):
    """The rows of the whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _wait_for_rows(folder, number):
    deadline = time.monotonic() + 120
    while len(_rows(folder)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.json")}


def _check_refused(options, out, capsys):
    assert main([*options, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err == f"BlockingIOError: {LOCKED}{out}; wait for that run to end, or name another folder.\n"
    assert said.out == ""


def test_a_second_run_in_a_folder_gets_one_line_and_a_killed_one_leaves_no_lock(tmp_path, capsys):
    out, options = tmp_path / "run", ["coherence", *SMALL, "--epochs", "2000"]
    with running([_command(*options, "--out", out)], [ENVIRONMENT]) as (first,):
        _wait_for_rows(out, 3)
        before = _files(out)
        _check_refused(options, out, capsys)
        assert _files(out) == before
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = [row["step"] for row in _rows(out)]
    assert steps == sorted({*steps})
    assert (out / LOCK).exists()
    # That a run which was killed goes on is tested with the checkpoints.
    with locked(out):
        require_usable(out, CoherenceConfig(data="digits", width=16, batch_size=20, epochs=2000))


@pytest.mark.slow
def test_a_run_of_several_processes_gets_one_line_too(tmp_path):
    """Both are told the same folder, as on a shared file system; the first alone locks."""
    out, port = tmp_path / "run", free_port()
    cluster = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id"]
    commands = [_command("coherence", *SMALL, "--out", out, *cluster, process) for process in range(2)]
    with locked(out), running(commands, [ENVIRONMENT] * 2) as started:
        errors = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [1, 1]
    assert f"{LOCKED}{out}" in errors[0]
    assert "Process 0 could not go on, and says why." in errors[1]
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_the_folders_of_a_demos_parts_are_locked_with_it(tmp_path, capsys):
    config = DemoConfig(epochs=500, seeds=1, width=8, out=tmp_path)
    with contextlib.ExitStack() as locks:
        assert folder_of(config, config.parts(), locks) == tmp_path
        with contextlib.ExitStack() as others, pytest.raises(BlockingIOError, match=f"{LOCKED}{tmp_path}; wait"):
            folder_of(config, config.parts(), others)
        _check_refused(["noise", *SMALL], tmp_path / "noise", capsys)
        assert [path.name for path in (tmp_path / "noise").iterdir()] == [LOCK]
    refused = pytest.raises(BlockingIOError, match=f"{LOCKED}{tmp_path / 'coherence'}; wait")
    with contextlib.ExitStack() as locks, locked(tmp_path / "coherence"), refused:  # a run of one part alone
        folder_of(config, config.parts(), locks)


def test_of_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    config = CoherenceConfig(out=tmp_path / "run")
    start, end, refused = threading.Barrier(8), threading.Barrier(8), []

    def begin():
        start.wait()
        with contextlib.ExitStack() as locks:
            try:
                folder_of(config, (config,), locks)
            except BlockingIOError as error:
                refused.append(error)
            end.wait()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7


def test_a_folder_that_holds_nothing_but_a_lock_is_empty(tmp_path):
    """As one is left by a run that was killed before it wrote anything."""
    (tmp_path / LOCK).touch()
    require_usable(tmp_path, CoherenceConfig())
    (tmp_path / "precious").touch()
    with pytest.raises(FileExistsError, match="which holds something else"):
        require_usable(tmp_path, CoherenceConfig())


def test_threads_exclude_one_another_too(tmp_path):
    refused = []

    def lock():
        try:
            with locked(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=lock)
        thread.start()
        thread.join()
        assert len(refused) == 1
    lock()
    assert len(refused) == 1


def test_a_lock_ends_with_its_block_whatever_ends_that(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    with locked(tmp_path / "." / ".." / tmp_path.name):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    order = []

    def lock():
        with locked(tmp_path, wait=True):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=lock)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    """As on some network file systems, which no test can have."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"No lock on {tmp_path} ([Errno 38] Function not implemented): start no other run")


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_folder("noise") for _ in range(5)]
    assert len({*folders}) == 5
    assert all(folder.is_dir() for folder in folders)


def test_git_passes_a_lock_over():
    ignored = "experiments/results/demo/noise/.lock"
    with running([["git", "check-ignore", "--no-index", ignored]]) as started:
        assert outputs(started)[0][0].strip() == ignored
