"""`python -m experiments <name> [options]`: run an experiment and write its folder."""

import contextlib
import dataclasses
import functools
import inspect
import operator
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import devices
from .errors import OF_INPUTS, first_line
from .registry import EXPERIMENTS
from .runner import INTERRUPTED, draw_again, start


@dataclasses.dataclass(frozen=True)
class FiguresConfig:
    """Draw the figures of runs again, and write summary.json and report.html, from their metrics.jsonl alone."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, those of experiments/results too."""


def choice() -> Any:
    """What the command line can be told: every experiment, with the options of its config."""
    subcommands = [
        Annotated[
            type(each.config),
            tyro.conf.subcommand(name, default=each.config, description=inspect.cleandoc(each.help) or None),
        ]
        for name, each in EXPERIMENTS.items()
    ]
    figures = Annotated[FiguresConfig, tyro.conf.subcommand("figures")]
    return functools.reduce(operator.or_, [*subcommands, figures])


def main(arguments: list[str] | None = None, prog: str = "python -m experiments") -> int:
    """Run what the command line asks for; the exit status."""
    config = tyro.cli(choice(), prog=prog, args=arguments)
    try:
        with contextlib.ExitStack() as locks:
            if isinstance(config, FiguresConfig):
                for folder in config.folders:
                    draw_again(folder)
                return 0
            return start(config, locks)
    except OF_INPUTS as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def command(prog: str) -> None:
    """The whole of a process."""
    devices.exit_with(lambda: main(prog=prog))


if __name__ == "__main__":
    command("python -m experiments")
