"""A run that is killed again and again against one that is not: the same metrics, bit for bit?"""

import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.timing import machine

# On one device, so that the sums are made in one order.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
_SECONDS = 120
# Short enough that the run does not end before its last kill.
MOST_DELAY = 0.6
# All methods, so that every kind of state is saved, every 10 of the 253 steps of an epoch of them all.
OPTIONS = ["noise", "--data", "digits", "--width", "32", "--batch-size", "20", "--save-every", "10"]


def _command(out: Path, epochs: int) -> list[str]:
    return [sys.executable, "-m", "experiments", *OPTIONS, "--epochs", str(epochs), "--out", str(out)]


def newest_checkpoint(out: Path) -> int:
    """The number of the newest whole checkpoint; −1 where there is none."""
    folder = out / "checkpoints"
    return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=-1) if folder.is_dir() else -1


def wait_for_checkpoint(out: Path, process: subprocess.Popen, after: int) -> None:
    """Wait until there is a checkpoint beyond that number, or the process has ended."""
    start = time.monotonic()
    while process.poll() is None and newest_checkpoint(out) <= after and time.monotonic() - start < _SECONDS:
        time.sleep(0.005)


def finish(out: Path, epochs: int) -> str:
    """Run to the end; what it said on standard error."""
    done = subprocess.run(_command(out, epochs), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Expected the run to end well, got status {done.returncode}:\n{done.stderr}")
    return done.stderr


def kill(out: Path, epochs: int, delay: float) -> dict[str, object]:
    """Start the run, or go on with it, and kill it `delay` seconds after its first new checkpoint."""
    before, start, silent = newest_checkpoint(out), time.monotonic(), subprocess.DEVNULL
    with subprocess.Popen(_command(out, epochs), env=ENVIRONMENT, stdout=silent, stderr=silent) as process:
        wait_for_checkpoint(out, process, before)
        time.sleep(delay)
        process.kill()
    metrics = out / "metrics.jsonl"
    return {
        "killed": process.returncode == -signal.SIGKILL,
        "seconds": time.monotonic() - start,
        "metrics_bytes": metrics.stat().st_size,
        "checkpoint": newest_checkpoint(out),
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Twenty SIGKILLs at random moments: about 5 minutes on 2 CPU cores."""

    kills: int = 20
    epochs: int = 6
    seed: int = 0
    """Of the moments at which the run is killed."""
    out: Path = Path("benchmarks/results/kills.json")


def main(options: Options) -> None:
    """Run whole, run and kill, compare, print and write."""
    rng, kills = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(whole, options.epochs)
        for number in range(options.kills):
            kills.append(kill(killed, options.epochs, rng.uniform(0, MOST_DELAY)))
            print(number + 1, kills[-1], flush=True)
        finish(killed, options.epochs)
        texts = [(each / "metrics.jsonl").read_bytes() for each in (whole, killed)]
        results = [json.loads((each / "summary.json").read_text()) for each in (whole, killed)]
    comparison = {
        "command": shlex.join(["python", "-m", "experiments", *OPTIONS, "--epochs", str(options.epochs)]),
        "metrics_bytes": len(texts[0]),
        "same_metrics": texts[0] == texts[1],
        "same_summary": results[0] == results[1],
    }
    print(comparison)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), **comparison, "kills": kills}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
