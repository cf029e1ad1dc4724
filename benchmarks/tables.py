"""The tables of docs/weighting.md, from the JSON files of the benchmarks.

python -m benchmarks.tables [--results benchmarks/results] [--docs docs]

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks.figures import WEIGHTED

_OURS = ("clip_norm", "clip_quantile", "normalize", "agreement", "geometric_median")


def weighted(record: Mapping[str, Any]) -> str:
    """Ratios to a plain gradient of every side, and temporary memory. A ratio above its goal is marked by !."""
    head = ["model", "batch", "plain, ms", *(WEIGHTED[side][0].removeprefix("clip_norm: ") for side in WEIGHTED)]
    head += ["temporary MB: plain, clip_norm, geometric_median(4), jax_privacy"]
    lines = [head, ["---"] * len(head)]
    for row in record["results"]:
        sides = row["sides"]
        cells = [row["name"], str(row["batch_size"]), f"{row['plain_ms']:,.3g}"]
        cells += [_ratio(row, side) for side in WEIGHTED]
        memory = [row["plain_temp_mb"]]
        memory += [sides.get(side, {}).get("temp_mb") for side in ("clip_norm", "geometric_median", "jax_privacy")]
        lines.append([*cells, ", ".join("–" if mb is None else f"{mb:.3g}" for mb in memory)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _ratio(row: Mapping[str, Any], side: str) -> str:
    entry = row["sides"].get(side)
    if entry is None:
        return "–"
    text = f"{entry['ratio']:.3g}"
    if side in _OURS:
        return f"**{text}**" if entry["met"] else f"{text} !"
    if side != "jax_privacy":
        return text
    return f"{text} ({min(row['microbatch_ms'], key=row['microbatch_ms'].get)})"


def coordinatewise(record: Mapping[str, Any]) -> str:
    """The median of the examples, coordinate by coordinate, and jnp.median of materialised gradients."""
    measured = record["coordinatewise"]
    lines = ["| | ms | temporary MB |\n", "|---|---|---|\n"]
    names = {
        "plain": "plain gradient",
        "coordinatewise": "`cg.coordinatewise_grads(loss_fn, cg.median())`",
        "jnp.median": "`jnp.median` of `vmap(grad)`",
    }
    for side, name in names.items():
        entry = measured["sides"][side]
        lines.append(f"| {name} | {entry['ms']:,.4g} | {entry['temp_mb']:.3g} |\n")
    return "".join(lines)


def peers_clipping(record: Mapping[str, Any]) -> str:
    """Ratios of Opacus to its own plain backward pass."""
    sides = list(record["results"][0]["sides"])
    lines = [f"| model, batch | {' | '.join(sides)} |\n", f"|---|{'---|' * len(sides)}\n"]
    for row in record["results"]:
        ratios = [row["sides"][side]["ratio"] for side in sides]
        cells = ["–" if ratio is None else f"{ratio:.3g}" for ratio in ratios]
        lines.append(f"| {row['name']}, {row['batch_size']} | {' | '.join(cells)} |\n")
    return "".join(lines)


# Name of a table → the file of its numbers and what writes it.
TABLES = {
    "weighted": ("weighted.json", weighted),
    "coordinatewise": ("weighted.json", coordinatewise),
    "peers_clipping": ("peers_clipping.json", peers_clipping),
}


def filled(text: str, results: Path) -> str:
    """A page with its tables as the JSON files have them. A table without a file stays."""
    for name, (file, write) in TABLES.items():
        if (results / file).exists():
            table = write(json.loads((results / file).read_text()))
            between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
            text = between.sub(lambda at, table=table: f"{at[1]}\n{table}\n{at[2]}", text)
    return text


def main(results: Path = Path("benchmarks/results"), docs: Path = Path("docs")) -> None:
    """Write the tables into docs/weighting.md."""
    page = docs / "weighting.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
