"""The examples run, and say what is so."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.kills import ENVIRONMENT
from examples.dp_sgd import Config, epsilon, train

ROOT = Path(__file__).parent.parent


def test_a_private_training_learns_and_clipping_and_noise_cost_accuracy():
    few = Config(steps=60)
    private = train(few)
    assert 0.6 < private < train(Config(steps=60, noise_multiplier=0.0))
    assert train(Config(steps=60, noise_multiplier=100.0)) < private


@pytest.mark.skipif(find_spec("dp_accounting") is None, reason="dp-accounting is in the extra bench")
def test_epsilon_is_between_none_and_that_of_whole_batches():
    import dp_accounting

    config = Config(steps=20)
    bound = dp_accounting.get_epsilon_gaussian(config.noise_multiplier / config.steps**0.5, 1e-4)
    assert 0 < epsilon(config) < bound
    assert epsilon(Config(steps=20, noise_multiplier=4.0)) < epsilon(config)


@pytest.mark.skipif(find_spec("dp_accounting") is not None, reason="dp-accounting is installed")
def test_without_dp_accounting_epsilon_is_unknown():
    assert math.isnan(epsilon(Config()))


def test_the_command_prints_accuracy_and_epsilon():
    command = [sys.executable, "-m", "examples.dp_sgd", "--steps", "3"]
    printed = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("test accuracy 0.")
    assert "epsilon " in printed
