"""The figures of the benchmarks, from their JSON files, and how the engine works.

python -m benchmarks.figures [--results benchmarks/results] [--docs docs]
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.patches import FancyBboxPatch

SIDES = {"cg_jax": "#1b6ca8", "vmap": "#d1495b", "micro_grad": "#edae49"}
LABELS = {"cg_jax": "cg_jax", "vmap": "vmap(grad)", "micro_grad": "optax micro_grad, best size"}

WEIGHTED = {
    "clip_norm": ("clip_norm", "#1b6ca8"),
    "clip_quantile": ("clip_quantile", "#4a90c2"),
    "normalize": ("normalize", "#8fbcd9"),
    "agreement": ("agreement(0.5)", "#2a9d8f"),
    "geometric_median": ("geometric_median(4)", "#8ac926"),
    "recipe": ("clip_norm: norms, then a second backward pass", "#999999"),
    "optax": ("clip_norm: optax on vmap(grad)", "#edae49"),
    "jax_privacy": ("clip_norm: jax_privacy, best microbatch", "#d1495b"),
}
WEIGHTED_AT = {"MLP": 128, "CNN": 128, "ResNet-8": 32, "ResNet-18": 32, "ViT": 32, "GPT": 8}


def costs(results: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of every side over the plain gradient's, model by model, over batch sizes."""
    every = [row["name"] for row in results]
    names = [name for name in dict.fromkeys(every) if every.count(name) > 1]
    fig, axes = plt.subplots(2, len(names), figsize=(3.1 * len(names), 6), sharey="row", layout="constrained")
    for column, name in enumerate(names):
        rows = [row for row in results if row["name"] == name]
        for side, color in SIDES.items():
            have = [row for row in rows if f"{side}_ratio" in row]
            batch = [row["batch_size"] for row in have]
            time = [row[f"{side}_ratio"] for row in have]
            memory = [row[f"{side}_temp_mb"] / row["plain_temp_mb"] for row in have]
            for axis, values in zip(axes[:, column], (time, memory), strict=True):
                axis.plot(batch, values, "o-", color=color, label=LABELS[side])
        for axis in axes[:, column]:
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted({row["batch_size"] for row in rows}))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[0, column].set_title(
            name.replace(" GroupNorm", "\nGroupNorm").replace(", dim", "\ndim").replace("GPT ", "GPT\n"), fontsize=9
        )
        axes[1, column].set_xlabel("batch size (examples)")
    axes[0, 0].set_ylabel("time / that of a plain gradient")
    axes[1, 0].set_ylabel("temporary memory / same")
    axes[0, -1].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def scaling(measured: dict[str, Any], path: Path) -> None:
    """Time over examples and over parameters, and bytes over devices."""
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 3.8), layout="constrained")
    for axis, rows, x, label in (
        (
            axes[0],
            measured["examples"],
            "examples",
            "examples m ({:,} parameters)".format(measured["examples"][0]["parameters"]),
        ),
        (axes[1], measured["parameters"], "parameters", "parameters (256 examples in batches of 64)"),
    ):
        for side, color, name in (
            ("measure", "#1b6ca8", "measure_coherence"),
            ("gradients", "#333333", "plain gradients"),
        ):
            ms = [row[f"{side}_ms"] for row in rows]
            axis.plot([row[x] for row in rows], ms, "o-" if side == "measure" else "s:", color=color, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds, one device")
        axis.legend(fontsize=8)
    names = {"on every device": "#1b6ca8", "fully sharded": "#d1495b", "tensor parallel": "#edae49"}
    for layout, color in names.items():
        rows = [row for row in measured["devices"] if row["layout"] == layout and row["examples"] == 1024]
        rows = [row for row in rows if row["devices"] > 1]
        for part, style in (("batch", "o-"), ("end", "s:")):
            bytes_ = [max(sum(row[part].values()), 1) / row["parameter_bytes"] for row in rows]
            text = f"{layout}: {'each batch' if part == 'batch' else 'at the end'}"
            axes[2].plot([row["devices"] for row in rows], bytes_, style, color=color, label=text, markersize=4)
    axes[2].set(
        xscale="log", yscale="log", xlabel="devices", ylabel="bytes that collectives yield\n/ bytes of the parameters"
    )
    axes[2].set_xticks([2, 4, 8], ["2", "4", "8"])
    axes[2].minorticks_off()
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def weighted(measured: dict[str, Any], path: Path) -> None:
    """Time of every side over the plain gradient's, model by model at one batch size, with the goals."""
    rows = [row for row in measured["results"] if row["batch_size"] == WEIGHTED_AT[row["name"].split()[0]]]
    fig, axis = plt.subplots(figsize=(13.5, 4.6), layout="constrained")
    width, goals = 0.88 / len(WEIGHTED), []
    for number, (side, (label, color)) in enumerate(WEIGHTED.items()):
        places = [i + (number - (len(WEIGHTED) - 1) / 2) * width for i in range(len(rows))]
        have = [(x, row["sides"][side]) for x, row in zip(places, rows, strict=True) if side in row["sides"]]
        axis.bar([x for x, _ in have], [entry["ratio"] for _, entry in have], width, color=color, label=label)
        for x, entry in have:
            top = 1.1 * max(entry["ratio"], entry.get("goal", 0))
            axis.text(x, top, f"{entry['ratio']:.3g}", fontsize=6.5, rotation=90, ha="center", va="bottom")
        goals += [(x, entry["goal"]) for x, entry in have if "goal" in entry]
    axis.hlines([goal for _, goal in goals], [x - width / 2 for x, _ in goals], [x + width / 2 for x, _ in goals],
                color="black", linewidth=2, label="goal")  # fmt: skip
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    names = [row["name"].replace(" ", "\n", 1) + f"\nbatch {row['batch_size']}" for row in rows]
    axis.set(yscale="log", ylabel="time / that of a plain gradient", xticks=range(len(rows)))
    axis.set_xticklabels(names, fontsize=8)
    axis.set_ylim(0.5, 3 * max(entry["ratio"] for row in rows for entry in row["sides"].values()))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(fontsize=8, ncols=5, loc="upper right")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _box(axis: Any, x: float, y: float, text: str, color: str, width: float = 2.7) -> None:
    style: dict[str, Any] = {
        "boxstyle": "round,pad=0.02,rounding_size=0.15",
        "facecolor": color,
        "edgecolor": "#333333",
        "linewidth": 0.8,
    }
    patch = FancyBboxPatch((x - width / 2, y - 0.42), width, 0.84, **style)
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center", fontsize=8.5)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0})
    if label:
        level = start[1] == end[1]
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axis.text(x if level else x + 0.15, y + 0.15 * level, label, fontsize=7.5, ha="center" if level else "left",
                  va="bottom" if level else "center")  # fmt: skip


def how_it_works(path: Path) -> None:
    """The way from a loss to S and Q, for one dense layer."""
    fig, axis = plt.subplots(figsize=(10.5, 5.6), layout="constrained")
    axis.set(xlim=(0, 14), ylim=(-0.1, 7.0))
    axis.axis("off")
    grey, blue, green = "#eeeeee", "#d6e6f2", "#dcefdc"
    _box(axis, 2.1, 6.4, "loss_fn(params, example)\none example, traced once", grey, 3.2)
    _box(axis, 7, 6.4, "uses: equations in which a\nparameter meets the example", grey, 3.6)
    _box(axis, 11.9, 6.4, "plan: a rule, a form and\na chunk for every tensor", grey, 3.4)
    _arrow(axis, (3.75, 6.4), (5.15, 6.4), "capture")
    _arrow(axis, (8.85, 6.4), (10.15, 6.4), "rules")
    _box(axis, 1.9, 4.2, "input  x [B, T, D]", blue)
    _box(axis, 5.3, 4.2, "y = x @ W", blue, 1.9)
    _box(axis, 8.6, 4.2, "y' = tap(y)", blue, 2.1)
    _box(axis, 12, 4.2, "Σᵢ ℓᵢ", blue, 1.6)
    for start, end in ((3.3, 4.3), (6.3, 7.5), (9.7, 11.15)):
        _arrow(axis, (start, 4.35), (end, 4.35))
        _arrow(axis, (end, 4.05), (start, 4.05))
    axis.text(0.1, 5.15, "one forward and ONE backward pass over the whole batch", fontsize=8.5, style="italic")
    _box(axis, 3.6, 1.9, "A: what went in\n[B, T, D]", green, 2.3)
    _box(axis, 8.6, 1.9, "B: cotangent of the tap\n[B, T, P]", green, 2.7)
    _arrow(axis, (2.2, 3.75), (3.3, 2.35), "handed out")
    _arrow(axis, (8.6, 3.75), (8.6, 2.35), "no sum over examples")
    _box(axis, 6.2, 0.5, "gᵢ = AᵢᵀBᵢ a few examples at a time (or never):   Q += ‖gᵢ‖²,   S += gᵢ", green, 8.6)
    _arrow(axis, (3.6, 1.45), (4.4, 0.95))
    _arrow(axis, (8.6, 1.45), (7.8, 0.95))
    axis.text(10.9, 0.5, "W is not differentiated:\nS is its gradient", fontsize=8.5, va="center")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(results: Path = Path("benchmarks/results"), docs: Path = Path("docs")) -> None:
    """Draw results/engine.png, scaling.png and weighted.png from their JSON files, and docs/engine.png."""
    docs.mkdir(parents=True, exist_ok=True)
    how_it_works(docs / "engine.png")
    costs(json.loads((results / "engine.json").read_text())["results"], results / "engine.png")
    scaling(json.loads((results / "scaling.json").read_text()), results / "scaling.png")
    weighted(json.loads((results / "weighted.json").read_text()), results / "weighted.png")


if __name__ == "__main__":
    tyro.cli(main)
