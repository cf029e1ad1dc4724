"""Processes that a test starts."""

import contextlib
import os
import socket
import subprocess


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(commands, environments=None):
    """A process for each command, its output kept; none outlives the test."""
    started = []
    try:
        for i, command in enumerate(commands):
            environ = os.environ | (environments[i] if environments else {})
            pipe = subprocess.PIPE
            started.append(subprocess.Popen([*map(str, command)], env=environ, stdout=pipe, stderr=pipe, text=True))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def outputs(started, timeout=300):
    """[(standard output, standard error)] of processes that all end well."""
    found = [process.communicate(timeout=timeout) for process in started]
    for process, (_, err) in zip(started, found, strict=True):
        assert process.returncode == 0, err
    return found
