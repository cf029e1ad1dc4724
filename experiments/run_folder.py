"""The folder of a run: what was asked, where it ran, what was measured, what follows."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .checkpoint import Checkpoints, Position
from .configs import Cluster, RunConfig
from .devices import writes
from .lock import LOCK

_PACKAGE = Path(__file__).resolve().parent

# Options that change no result: a run can go on with others.
_FREE = ("data_dir", "read_threads", "save_every")


class RunFolder:
    """A folder with config.json, env.json, metrics.jsonl, timings.jsonl, checkpoints/ and, at the end, summary.json,
    figures/ and report.html.

    metrics.jsonl holds no clock value: a run that was killed and goes on writes the file that it would have written.
    Every line is written whole. Of several processes only the first writes.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.figures = path / "figures"
        self.rows: list[dict[str, Any]] = []
        self._metrics = path / "metrics.jsonl"
        if not writes():
            return
        write_json(path / "config.json", plain(config))  # the first of all files: by it a run is known
        self.figures.mkdir(exist_ok=True)
        self._metrics.touch()
        write_json(path / "env.json", environment(config))
        self._checkpoints = Checkpoints(path / "checkpoints")

    def add(self, **row: Any) -> None:
        """Append one measurement."""
        row = _finite(row)
        self.rows.append(row)
        if writes():
            _append(self._metrics, row)

    def time(self, **row: Any) -> None:
        """Append how long it took until now."""
        if writes():
            _append(self.path / "timings.jsonl", row)

    def save(self, position: Position, state: Any) -> None:
        """Write a checkpoint of `state` and of the metrics until now."""
        if writes():
            self._checkpoints.save(position._replace(metrics_bytes=self._metrics.stat().st_size), state)

    def restore(self) -> tuple[Position, list[np.ndarray]] | None:
        """(how far the last checkpoint is, the leaves of its state), metrics.jsonl cut back to it."""
        restored = self._checkpoints.restore(self._metrics.stat().st_size)
        size = restored[0].metrics_bytes if restored else 0
        try:
            self.rows = [json.loads(line) for line in self._metrics.read_bytes()[:size].splitlines()]
        except ValueError as error:
            what = f"a damaged one ({error}): name another folder"
            raise ValueError(f"Expected {self._metrics} as an earlier run wrote it, got {what}.") from None
        os.truncate(self._metrics, size)
        if restored and restored[0].step >= 0:
            print(f"Going on from step {restored[0].step} of training {restored[0].part + 1}.", file=sys.stderr)
        return restored


def new_folder(name: str) -> Path:
    """Make a folder in runs/, called after the time, that no other run has made."""
    now = datetime.datetime.now(datetime.UTC)
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{now:%Y%m%d-%H%M%S}{f'-{number}' if number > 1 else ''}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def require_usable(out: Path, config: RunConfig) -> None:
    """Check that a folder is new, empty, or that of an earlier run of the same config, which will be gone on with.

    Raises:
        FileExistsError: It holds something else.
        ValueError: It holds a run of another config.
    """
    if (out / "config.json").is_file():
        new = plain(config)
        # An option that was not there yet had the value that is its default now.
        old = _defaults(config) | config_of(out)
        for key in new | old:
            if key not in _FREE and old.get(key) != new.get(key):
                change = f"{key}={new.get(key)} where it was begun with {key}={old.get(key)}"
                raise ValueError(f"Expected the options that the run in out={out} was begun with, got {change}.")
    elif out.exists() and not out.is_dir():
        raise _unusable(out, "which is a file")
    elif out.exists() and any(path.name not in ("config.tmp", LOCK) for path in out.iterdir()):
        raise _unusable(out, "which holds something else")


def _defaults(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps({field.name: field.default for field in _asked(config)}, default=str))


def config_of(out: Path) -> dict[str, Any]:
    """config.json of a run."""
    try:
        content = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unusable(out, f"whose config.json is damaged ({error})") from None
    if not isinstance(content, dict) or "experiment" not in content:
        raise _unusable(out, "which holds something else: its config.json is not that of a run")
    return content


def _unusable(out: Path, what: str) -> FileExistsError:
    return FileExistsError(f"Expected out to be a new or empty folder, or that of a run, got out={out}, {what}.")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value`, replacing the file in one move; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(config: RunConfig) -> dict[str, Any]:
    """What config.json holds: what is measured."""
    fields = {field.name: getattr(config, field.name) for field in _asked(config)}
    return json.loads(json.dumps({"experiment": config.name} | fields, default=str))


def _asked(config: RunConfig) -> list[dataclasses.Field[Any]]:
    """The fields that say what is measured, not on which machines and where to."""
    here = {field.name for field in dataclasses.fields(Cluster)} | {"out", "name"}
    return [field for field in dataclasses.fields(config) if field.name not in here]


def environment(config: RunConfig) -> dict[str, Any]:
    """Versions, devices, commit and seeds; nothing that names the machine."""
    packages = ("cg_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "commit": _commit(),
        "first_seed": getattr(config, "seed", 0),
        "seeds": config.seeds,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    if package == "cg_jax":
        import cg_jax

        return cg_jax.__version__
    return importlib.metadata.version(package)


def _commit() -> str | None:
    """The commit of this checkout, with "+" where files were changed since; None where this is an installed package."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # the repository around may be another
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", _PACKAGE, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
