"""Several real processes on this machine, each with its own part of the data and devices of its own."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import free_port, outputs, running

_WORKER = Path(__file__).with_name("worker.py")
# The coordination service gives a process that no longer answers 10 seconds (see worker.py), and looks now and then.
_UNTIL_ENDED = 30


def workers(number, **environment):
    """The running workers."""
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, _WORKER, *([address, number, p] if number > 1 else [])] for p in range(number)]
    return running(commands, [environment] * number)


# What is said where processes disagree: by all of them, or by process 1 and by process 0.
_DISAGREE = {
    "disagreement": ("Expected the same in every process, got batch_size=", None),
    "other rows": ("Expected the same in every process, got batch_size=16 and rows of ('float32[", None),
    "no data": ("got an empty data", "got an error in process 1; it says why"),
}


@pytest.fixture(scope="module")
def alone():
    return _found(1)


def _found(number):
    with workers(number) as started:
        found = [json.loads(out.splitlines()[-1]) for out, _ in outputs(started)]
    for name, (message, elsewhere) in _DISAGREE.items():
        said = [each.pop(name) for each in found]
        if number > 1:
            assert message in said[0 if elsewhere is None else 1]
            assert (elsewhere or message) in said[0]
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


@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_where_one_process_dies_the_others_end_with_a_message(dies):
    stays = 1 - dies
    with workers(2, HANG_AFTER="arrays", GOES_ON=str(stays)) as started:
        for worker in started:
            assert any(line == "measured\n" for line in worker.stdout)
        started[dies].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, message = started[stays].communicate(timeout=3 * _UNTIL_ENDED)
        assert time.monotonic() - start < _UNTIL_ENDED
    assert started[stays].returncode != 0
    assert message.strip()
