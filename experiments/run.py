"""The folder of a run: what was asked, where it ran, what was measured, what follows."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from experiments.configs import Cluster
from experiments.devices import writes

_ROOT = Path(__file__).resolve().parent.parent


class RunFolder:
    """A folder with config.json, env.json, metrics.jsonl and, at the end, summary.json, figures/ and report.html.

    Every line of metrics.jsonl is written whole, so that an interrupted run leaves valid files. Of several processes
    only the first writes.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self.path = path
        self.figures = path / "figures"
        self.rows: list[dict[str, Any]] = []
        self._metrics = path / "metrics.jsonl"
        if not writes():
            return
        self.figures.mkdir(parents=True, exist_ok=True)
        self._metrics.touch()
        write_json(path / "config.json", _plain(config))
        write_json(path / "env.json", environment(config))

    def add(self, **row: Any) -> None:
        """Append one measurement."""
        self.rows.append(row)
        if not writes():
            return
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")


def new_folder(out: Path | None, name: str) -> Path:
    """The folder to write to; FileExistsError if it holds something already."""
    if out is None:
        now = datetime.datetime.now(datetime.UTC)
        return Path("runs") / f"{name}-{now:%Y%m%d-%H%M%S}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "which holds something" if out.is_dir() else "which is a file"
        raise FileExistsError(f"Expected out to be a new or empty folder, got out={out}, {what}.")
    return out


def write_json(path: Path, value: Any) -> None:
    """Write `value`, replacing the file in one move."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(config: Any) -> dict[str, Any]:
    here = {field.name for field in dataclasses.fields(Cluster)}  # not what is measured, but on which machines
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in here}
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


def environment(config: Any) -> dict[str, Any]:
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
    """The commit of this checkout, with "+" where files were changed since; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", _ROOT, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
