"""`python -m experiments <name> [options]`: run an experiment and write its folder."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import coherence, devices, noise, report
from experiments.configs import (
    CoherenceConfig,
    Config,
    DemoConfig,
    ImageNetCoherenceConfig,
    ImageNetNoiseConfig,
    NoiseConfig,
    check,
    check_cluster,
    smoked,
)
from experiments.run import RunFolder, environment, folder_for, plain, write_json
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
        smoke = getattr(config, "smoke", False)
        config = smoked(config, _TINY_IMAGES) if smoke else config
        parts = config.parts() if isinstance(config, DemoConfig) else (config,)
        check_cluster(config)
        for part in parts:
            check(part)
        devices.start(config)
        out = _folder(config)
        if smoke:
            _prepare_tiny_images()
        return run(config, parts, out, title=f"cg_jax: {config.name}")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _prepare_tiny_images() -> None:
    """Prepare what a smoke test reads, where it is not."""
    error = None
    if devices.writes() and not (_TINY_IMAGES / "tiny_images").exists():
        command = [sys.executable, "-m", "experiments.tiny_images", str(_TINY_IMAGES.absolute())]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            error = FileNotFoundError(f"Expected to prepare tiny images, which needs the extra tfds, got: {lines[-1]}")
    devices.agreed(error)


def _folder(config: Any) -> Path:
    """The folder for the results, which the first process alone looks at."""
    out, error = Path(config.name), None
    if devices.writes():
        try:
            out = folder_for(config.out, config)
            if isinstance(config, DemoConfig):  # the folders of its parts have their own
                write_json(out / "config.json", plain(config))
                write_json(out / "env.json", environment(config))
        except (ValueError, OSError) as found:
            error = found
    devices.agreed(error)
    return out


def run(config: Any, parts: tuple[Config, ...], out: Path, title: str) -> int:
    """Measure the parts one after another; whatever ends it, report what was measured until then."""
    done: list[tuple[Path, Section]] = []
    status = 0
    for part in parts:
        module = coherence if isinstance(part, CoherenceConfig) else noise
        folder = RunFolder(out / module.__name__.split(".")[-1] if len(parts) > 1 else out, part)
        status = _measure(module, part, folder)
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


def _measure(module: Any, part: Config, folder: RunFolder) -> int:
    """Measure one part; the exit status."""
    try:
        module.measure(part, folder)
    except KeyboardInterrupt:
        if devices.writes():
            print("Interrupted: the report is of what was measured until now.", file=sys.stderr)
        return _INTERRUPTED
    except FloatingPointError as error:
        print(f"Training diverged: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    devices.exit_with(main)
