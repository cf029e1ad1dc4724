"""How long trainings took, by method: from timings.jsonl of a run, and kept beside its metrics."""

import json
from pathlib import Path

import pandas as pd

from .devices import writes
from .run_folder import write_json

_FILE = "seconds.json"


def keep_seconds(folder: Path) -> None:
    """Write seconds.json, from which reports can be made again where timings.jsonl is no longer there."""
    if writes():
        write_json(folder / _FILE, from_timings(folder / "timings.jsonl"))


def seconds_of(folder: Path) -> dict[str, float]:
    """The seconds of the fastest training of each method, without measuring and saving; {} where none were kept.

    The fastest, since the first one compiles its step too, and others may have shared their core with other programs.
    """
    timings, kept = folder / "timings.jsonl", folder / _FILE
    if timings.is_file():
        return from_timings(timings)
    return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}


def from_timings(path: Path) -> dict[str, float]:
    """By method: the last line of each training less its first; the least of all that are reported."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    table = pd.DataFrame([line for line in lines if not line.get("tuning")])
    if table.empty:
        return {}
    runs = table.groupby(["cell", "method", "seed"])
    steps = runs["step"].agg("last")
    whole = steps == steps.groupby(["cell", "method"]).transform("max")
    spent = (runs["training"].agg("last") - runs["training"].agg("first"))[whole]
    return {str(name): round(float(value), 3) for name, value in spent.groupby("method").min().items()}
