"""How long runs took, and trainings by method: from timings.jsonl of a run, and kept beside its metrics."""

import json
from pathlib import Path

import pandas as pd

from .devices import writes
from .run_folder import write_json

_FILE, _TOTAL = "seconds.json", "time.json"
_SPENT = ("training", "measuring", "saving")


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


def keep_total(run: Path, kept: Path, whole: float) -> None:
    """Write time.json into `kept`: the seconds that a run spent, all its parts together, by what for.

    They are those of timings.jsonl, which count what was done before the run was stopped and went on. Of a run without
    them it is the seconds of the whole command, kept the first time.
    """
    total: dict[str, float] = {}
    for path in sorted(run.rglob("timings.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        for what in _SPENT if lines else ():
            total[what] = round(total.get(what, 0.0) + json.loads(lines[-1])[what], 1)
    if total or not (kept / _TOTAL).is_file():
        write_json(kept / _TOTAL, total or {"whole": round(whole, 1)})


def minutes_of(folder: Path) -> float | None:
    """How long a committed run took; None where that was not kept."""
    path = folder / _TOTAL
    return sum(json.loads(path.read_text(encoding="utf-8")).values()) / 60 if path.is_file() else None
