"""`python -m experiments.reproduce [NAMES]`: the committed results again, each by its one command.

A run goes into runs/results/NAME, where it can be killed at any moment and goes on when the same command is started
again. When it is complete, what it measured is copied into experiments/results/NAME and the page of all results is
written again. What is complete is not run again until its folder in runs/results is removed; it is drawn again.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from . import __main__, claims_page
from .committed import COMMITTED, RESULTS
from .errors import OF_INPUTS, first_line
from .run_folder import require_usable
from .runner import INTERRUPTED, draw_again
from .seconds import keep_total

RUNS = Path("runs") / "results"
_LEFT = shutil.ignore_patterns("checkpoints", "timings.jsonl", "report.html", ".lock", "*.tmp")
_Name = tyro.extras.literal_type_from_choices(tuple(COMMITTED))
_Names = Annotated[tuple[str, ...], tyro.conf.arg(constructor_factory=lambda: tuple[_Name, ...])]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the committed results again, one experiment after another."""

    names: tyro.conf.Positional[_Names] = ()
    """Which; without any, all."""
    smoke: bool = False
    """Run each as small as it can be, into a folder that is deleted at the end."""


def asked(name: str, *more: str) -> Any:
    """The config of the committed run of that name."""
    return tyro.cli(__main__.choice(), args=[*COMMITTED[name], *more])


def complete(folder: Path) -> bool:
    """Whether a run came to its end."""
    summary = folder / "summary.json"
    return summary.is_file() and json.loads(summary.read_text(encoding="utf-8"))["complete"]


def run(name: str, out: Path, *more: str) -> int:
    """Run the command of that name; the exit status."""
    arguments = [*COMMITTED[name], *more, "--out", str(out)]
    print(f"\npython -m experiments {' '.join(arguments)}", flush=True)
    status = __main__.main(arguments)
    jax.clear_caches()  # the programs of thirteen experiments are more than one process may hold
    return status


def keep(out: Path, kept: Path, seconds: float) -> None:
    """Copy what a complete run measured; notes written by hand stay, figures that it no longer draws go."""
    for figures in [*kept.rglob("figures")]:
        shutil.rmtree(figures)
    shutil.copytree(out, kept, ignore=_LEFT, dirs_exist_ok=True)
    keep_total(out, kept, seconds)


def reproduced(name: str) -> int:
    """Run that one where it is not complete, and keep it; the exit status."""
    out, begun = RUNS / name, time.perf_counter()
    require_usable(out, asked(name))
    if complete(out):
        draw_again(out)
    elif status := run(name, out):
        return status
    keep(out, RESULTS / name, time.perf_counter() - begun)
    claims_page.write()
    return 0


def smoked(name: str) -> int:
    """Run that one tiny; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        return run(name, Path(folder) / "run", "--smoke")


def failed(config: Config) -> Iterator[tuple[str, int]]:
    """The names that did not come to their end, with their exit status; the rest is run all the same."""
    for name in config.names or COMMITTED:
        try:
            status = smoked(name) if config.smoke else reproduced(name)
        except OF_INPUTS as error:
            print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
            status = 1
        if status:
            yield name, status
        if status == INTERRUPTED:
            return


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    statuses = dict(failed(tyro.cli(Config, prog="python -m experiments.reproduce", args=arguments)))
    if statuses:
        print(f"Not complete: {', '.join(statuses)}. The same command goes on.", file=sys.stderr)
    return max(statuses.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
