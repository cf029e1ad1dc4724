"""`python -m experiments <name> [options]`: run an experiment and write its folder."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import coherence, devices, loop, noise, report
from experiments.checks import check, check_cluster
from experiments.configs import (
    CoherenceConfig,
    Config,
    DemoConfig,
    ImageNetCoherenceConfig,
    ImageNetNoiseConfig,
    NoiseConfig,
    smoked,
)
from experiments.errors import OF_INPUTS, first_line
from experiments.lock import locked
from experiments.run import RunFolder, environment, new_folder, plain, require_usable, write_json
from experiments.section import Section

Choice = (
    Annotated[CoherenceConfig, tyro.conf.subcommand("coherence")]
    | Annotated[NoiseConfig, tyro.conf.subcommand("noise")]
    | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[ImageNetCoherenceConfig, tyro.conf.subcommand("imagenet-coherence")]
    | Annotated[ImageNetNoiseConfig, tyro.conf.subcommand("imagenet-noise")]
)

_TINY_IMAGES = Path("runs") / "tiny_images"
_INTERRUPTED = 130  # the status of what was ended by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    config: Any = tyro.cli(Choice, prog="python -m experiments", args=arguments)  # type: ignore[call-overload]
    try:
        with contextlib.ExitStack() as locks:
            return _start(config, locks)
    except OF_INPUTS as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _INTERRUPTED


def _start(config: Any, locks: contextlib.ExitStack) -> int:
    """Check everything that can be known before a folder is made; then run."""
    smoke = getattr(config, "smoke", False)
    config = smoked(config, _TINY_IMAGES) if smoke else config
    parts = config.parts() if isinstance(config, DemoConfig) else (config,)
    check_cluster(config)
    for part in parts:
        check(part)
    devices.start(config)
    if smoke:
        devices.together(_prepare_tiny_images, lambda: None)

    def opened() -> list[loop.Problem]:
        return [loop.opened(part) for part in parts]

    problems = devices.together(opened, opened)
    out = devices.together(lambda: _folder(config, parts, locks), lambda: Path(config.name))
    return run(config, list(zip(parts, problems, strict=True)), out, f"cg_jax: {config.name}")


def _prepare_tiny_images() -> None:
    """Prepare what a smoke test reads, where it is not; one run does, while others wait."""
    with locked(_TINY_IMAGES, wait=True):
        if (_TINY_IMAGES / "tiny_images").exists():
            return
        command = [sys.executable, "-m", "experiments.tiny_images", str(_TINY_IMAGES.absolute())]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise FileNotFoundError(f"Expected to prepare tiny images, which needs the extra tfds, got: {said}")


def _folder(config: Any, parts: tuple[Config, ...], locks: contextlib.ExitStack) -> Path:
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


def _of_part(out: Path, part: Config) -> Path:
    """The folder of one of several parts."""
    return out / part.name


def run(config: Any, parts: list[tuple[Config, loop.Problem]], out: Path, title: str) -> int:
    """Measure the parts one after another; whatever ends it, report what was measured until then."""
    done: list[tuple[Path, Section]] = []
    status = 0
    for part, problem in parts:
        module = coherence if isinstance(part, CoherenceConfig) else noise
        folder = RunFolder(_of_part(out, part) if len(parts) > 1 else out, part)
        status = _measure(module, part, problem, folder)
        if devices.writes():
            section = module.section(part, folder)  # type: ignore[arg-type]
            done.append((folder.path, section))
            if len(parts) > 1:
                report.write(folder.path, title, [(folder.path, section)], complete=not status)
        if status:
            break
    if devices.writes():
        report.write(out, title, done, complete=not status)
        report.print_summary([section for _, section in done])
        print(f"\nReport: {out / 'report.html'}")
        if status == _INTERRUPTED:
            print(f"The same command with --out {out} goes on where it stopped.")
    return status


def _measure(module: Any, part: Config, problem: loop.Problem, folder: RunFolder) -> int:
    """Measure one part; the exit status."""
    try:
        module.measure(part, problem, folder)
    except KeyboardInterrupt:
        if devices.writes():
            print("Interrupted: the report is of what was measured until now.", file=sys.stderr)
        return _INTERRUPTED
    except FloatingPointError:  # its own advice is for those who call the library
        print("Training diverged: losses or gradients are not finite; try a smaller --learning-rate.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    devices.exit_with(main)
