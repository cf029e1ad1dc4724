"""`python -m experiments <name> [options]`: run an experiment and write its folder."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import coherence, noise, report
from experiments.configs import CoherenceConfig, Config, DemoConfig, NoiseConfig, check
from experiments.run import RunFolder, new_folder, write_json
from experiments.run import environment as environment_of
from experiments.section import Section

Choice = (
    Annotated[CoherenceConfig, tyro.conf.subcommand("coherence")]
    | Annotated[NoiseConfig, tyro.conf.subcommand("noise")]
    | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    config: Any = tyro.cli(Choice, prog="python -m experiments", args=arguments)  # type: ignore[call-overload]
    try:
        parts = config.parts() if isinstance(config, DemoConfig) else (config,)
        for part in parts:
            check(part)
        name = {CoherenceConfig: "coherence", NoiseConfig: "noise", DemoConfig: "demo"}[type(config)]
        out = new_folder(config.out, name)
        return run(config, parts, out, title=f"cg_jax: {name}")
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def run(config: Any, parts: tuple[Config, ...], out: Path, title: str) -> int:
    """Measure the parts one after another; whatever ends it, report what was measured until then."""
    done: list[tuple[Path, Section]] = []
    status, interrupted = 0, False
    for part in parts:
        module = coherence if isinstance(part, CoherenceConfig) else noise
        folder = RunFolder(out / module.__name__.split(".")[-1] if len(parts) > 1 else out, part)
        try:
            module.measure(part, folder)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            print("Interrupted: the report is of what was measured until now.", file=sys.stderr)
            interrupted, status = True, 130
        except FloatingPointError as error:
            print(f"Training diverged: {error}", file=sys.stderr)
            interrupted, status = True, 1
        section = module.section(part, folder)  # type: ignore[arg-type]
        done.append((folder.path, section))
        if len(parts) > 1:
            report.write(folder.path, title, [(folder.path, section)], complete=not interrupted)
        if interrupted:
            break
    if len(parts) > 1:
        write_json(out / "config.json", {"seeds": config.seeds, "epochs": config.epochs, "width": config.width})
        write_json(out / "env.json", environment_of(config))
    report.write(out, title, done, complete=not interrupted)
    report.print_summary([section for _, section in done])
    print(f"\nReport: {out / 'report.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
