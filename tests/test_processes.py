"""Several real processes on this machine, each with its own part of the data and devices of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

_WORKER = Path(__file__).with_name("worker.py")
# The coordination service gives a process that no longer answers 10 seconds (see worker.py), and looks now and then.
_UNTIL_ENDED = 30


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def processes(number, **environment):
    """The running workers; none outlives the test."""
    address, started = f"127.0.0.1:{free_port()}", []
    try:
        for process in range(number):
            arguments = [sys.executable, _WORKER, *([address, number, process] if number > 1 else [])]
            pipe = subprocess.PIPE
            environ = os.environ | environment
            started.append(subprocess.Popen(map(str, arguments), stdout=pipe, stderr=pipe, text=True, env=environ))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def alone():
    return _found(1)


def _found(number):
    with processes(number) as workers:
        outs = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, err) in zip(workers, outs, strict=True):
        assert worker.returncode == 0, err
    found = [json.loads(out.splitlines()[-1]) for out, _ in outs]
    assert all(each == found[0] for each in found), "every process is told the same"
    return found[0]


@pytest.mark.parametrize("number", [2, 4])
def test_the_result_of_several_processes_is_that_of_one(number, alone):
    found = _found(number)
    assert found.keys() == alone.keys()
    for name, wanted in alone.items():
        if name == "error":
            process, index = 7 % number, 7 // number
            assert (
                f"got 1 of 16 examples in one batch that are not, the first at index {index} of process {process}'s"
                in found[name]
            )
            continue
        for field, value in wanted.items():
            np.testing.assert_allclose(found[name][field], value, rtol=2e-5, err_msg=f"{name}: {field}")


@pytest.mark.parametrize("dies", [1, 0])
def test_where_one_process_dies_the_others_end_with_a_message(dies):
    stays = 1 - dies
    with processes(2, HANG_AFTER="arrays", GOES_ON=str(stays)) as workers:
        for worker in workers:
            assert any(line == "measured\n" for line in worker.stdout)
        workers[dies].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, message = workers[stays].communicate(timeout=_UNTIL_ENDED)
        assert time.monotonic() - start < _UNTIL_ENDED
    assert workers[stays].returncode != 0
    assert message.strip()
