"""From a config to a folder: check, open, lock, measure, report; and the report again from what was measured."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import devices, loop, report
from .checks import check, check_cluster
from .configs import TFDS, TINY_IMAGES, Config, RunConfig, SeededConfig, from_json, smoked
from .experiment import AnyExperiment, Experiment
from .lock import locked
from .registry import EXPERIMENTS
from .run_folder import RunFolder, config_of, environment, new_folder, plain, require_usable, write_json
from .section import Row, Section

INTERRUPTED = 130  # the status of what was ended by Ctrl-C


def start(config: RunConfig, locks: contextlib.ExitStack) -> int:
    """Check everything that can be known before a folder is made; then run."""
    parts: tuple[SeededConfig, ...] = EXPERIMENTS[config.name].parts(config)
    parts = tuple(smoked(part) if part.smoke else part for part in parts)
    check_cluster(config)
    for part in parts:
        check(part)
    devices.start(config)
    if any(part.smoke and isinstance(part, Config) and part.data.startswith(TFDS) for part in parts):
        devices.together(_prepare_tiny_images, lambda: None)

    def opened() -> list[loop.Problem | None]:
        return [loop.opened(part) if isinstance(part, Config) else None for part in parts]

    problems = devices.together(opened, opened)
    asked = parts[0] if isinstance(EXPERIMENTS[config.name], Experiment) else config
    out = devices.together(lambda: folder_of(asked, parts, locks), lambda: Path(config.name))
    return _run(list(zip(parts, problems, strict=True)), out, f"cg_jax: {config.name}")


def folder_of(config: RunConfig, parts: tuple[SeededConfig, ...], locks: contextlib.ExitStack) -> Path:
    """The folder for the results, locked until this run ends; those of its parts too."""
    out = config.out or new_folder(config.name)
    require_usable(out, config)  # before a lock is put into it
    locks.enter_context(locked(out))
    require_usable(out, config)  # what another run has begun since
    if len(parts) > 1:  # the folders of the parts have their own
        write_json(out / "config.json", plain(config))
        write_json(out / "env.json", environment(config))
        for part in parts:
            locks.enter_context(locked(_of_part(out, part)))
    return out


def _of_part(out: Path, part: SeededConfig) -> Path:
    """The folder of one of several parts."""
    return out / part.name


def _run(parts: list[tuple[SeededConfig, loop.Problem | None]], out: Path, title: str) -> int:
    """Measure the parts one after another; whatever ends it, report what was measured until then."""
    done: list[tuple[Path, Section]] = []
    status = 0
    for part, problem in parts:
        experiment = EXPERIMENTS[part.name]
        assert isinstance(experiment, Experiment)
        folder = RunFolder(_of_part(out, part) if len(parts) > 1 else out, part)
        status = _measure(experiment, part, problem, folder)
        if devices.writes():
            section = experiment.section(part, folder.rows, folder.figures)
            done.append((folder.path, section))
            if len(parts) > 1:
                report.write(folder.path, title, [(folder.path, section)], complete=not status)
        if status:
            break
    if devices.writes():
        report.write(out, title, done, complete=not status)
        report.print_summary([section for _, section in done])
        print(f"\nReport: {out / 'report.html'}")
        if status == INTERRUPTED:
            print(f"The same command with --out {out} goes on where it stopped.")
    return status


def _measure(experiment: Experiment[Any], part: SeededConfig, problem: loop.Problem | None, folder: RunFolder) -> int:
    """Measure one part; the exit status."""
    try:
        experiment.measure(part, problem, folder)
    except KeyboardInterrupt:
        if devices.writes():
            print("Interrupted: the report is of what was measured until now.", file=sys.stderr)
        return INTERRUPTED
    except FloatingPointError:  # its own advice is for those who call the library
        print("Training diverged: losses or gradients are not finite; try a smaller --learning-rate.", file=sys.stderr)
        return 1
    return 0


def _prepare_tiny_images() -> None:
    """Prepare what a smoke test reads, where it is not; one run does, while others wait."""
    with locked(TINY_IMAGES, wait=True):
        if (TINY_IMAGES / "tiny_images").exists():
            return
        package = Path(__file__).resolve().parent
        command = [sys.executable, "-m", f"{package.name}.tiny_images", str(TINY_IMAGES.absolute())]
        done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise FileNotFoundError(f"Expected to prepare tiny images, which needs the extra tfds, got: {said}")


def draw_again(folder: Path) -> None:
    """Draw the figures of a run, and write summary.json and report.html, from config.json and metrics.jsonl alone.

    Raises:
        OSError: The folder holds no run.
        ValueError: It holds one of an experiment that is not known, or of other options.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected the folder of a run, got {folder}, which has no config.json.")
    experiment, config = _asked(folder)
    summary = folder / "summary.json"
    complete = summary.is_file() and json.loads(summary.read_text(encoding="utf-8"))["complete"]
    title = f"cg_jax: {config.name}"
    with locked(folder):
        if isinstance(experiment, Experiment):
            done = [(folder, _section(folder))]
        else:
            paths = [_of_part(folder, part) for part in experiment.parts(config)]
            done = [(path, _section(path)) for path in paths if (path / "config.json").is_file()]
            for path, section in done:
                report.write(path, title, [(path, section)], complete=complete)
        report.write(folder, title, done, complete=complete)
    print(f"Report: {folder / 'report.html'}")


def _asked(folder: Path) -> tuple[AnyExperiment, Any]:
    """The experiment of a run, and what it was asked."""
    values = config_of(folder)
    if values["experiment"] not in EXPERIMENTS:
        raise ValueError(f"Expected a run of one of {(*EXPERIMENTS,)}, got {values['experiment']} in {folder}.")
    experiment = EXPERIMENTS[values["experiment"]]
    return experiment, from_json(experiment.config, values)


def _section(folder: Path) -> Section:
    """The section of one experiment, from the whole lines of its metrics.jsonl."""
    experiment, config = _asked(folder)
    assert isinstance(experiment, Experiment)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows: list[Row] = [json.loads(line) for line in lines]
    return experiment.section(config, rows, folder / "figures")
