"""What robust averages of per-example gradients cost, against one plain gradient of the mean loss.

    python -m benchmarks.weighted [--out benchmarks/results/weighted.json] [--models MLP ViT] [--sides clip_norm]

Every side yields one gradient: what a weighting reports beside it is dropped, and so not computed. The sides are the
plain gradient, `cg.weighted_grads` with five weightings, and for clip_norm also the recipe (norms by
`cg.per_example_sq_norms`, then the gradient of the weighted loss, in one jit), `optax.per_example_global_norm_clip` on
vmap(grad), and `jax_privacy.clipped_grad` with the best of several microbatch sizes. All that clip to one norm must
agree. `coordinatewise` compares `cg.coordinatewise_grads(loss_fn, cg.median())` with `jnp.median` of materialised
gradients.

The sides run in one process on the same model and batch, in turn; a ratio is that of the medians. The slow sides take
their turns apart from the fast ones, beside further runs of the plain gradient. Small models run more often than
`--repeats`: until the plain gradient alone would take two seconds, 200 times at most. Memory is what the compiled
programs need beside arguments and results, in 10^6 bytes. jax_privacy is left out where it is not installed (the extra
`bench` has it).
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm.auto import tqdm

import cg_jax as cg
from benchmarks.engine import Program, compiled
from benchmarks.models import MODELS, Model, make
from benchmarks.timing import alternate, machine

_MAX_NORM = 1.0
_MODELS = tuple(MODELS)[:6]
_WEIGHTINGS = {
    "clip_norm": cg.clip_norm(_MAX_NORM),
    "clip_quantile": cg.clip_quantile(0.5),
    "normalize": cg.normalize(),
    "agreement": cg.agreement(0.5),
    "geometric_median": cg.geometric_median(4),
}
FAST = (*_WEIGHTINGS, "recipe")
SLOW = ("optax", "jax_privacy")
_SAME = ("clip_norm", "recipe", *SLOW)  # the sides that compute the same gradient, and how closely
_RTOL = 1e-3
_COORDINATEWISE, _COORDINATEWISE_BATCH = "coordinatewise", 128
_TIME_GOAL, _MEMORY_GOAL = 1 / 20, 1 / 10  # over those of jnp.median of materialised gradients
_MICROBATCHES = (1, 2, 8, 32, None)

# Slow sides are left out above this time of a plain gradient or this size of an array of batch × parameters. The search
# for a microbatch size ends after one that takes longer than the third limit.
_SLOW_LIMIT_MS, _VMAP_BYTES, _SEARCH_LIMIT_MS = 1500, 3e9, 20_000
_SLOW_REPEATS, _ENOUGH_MS, _MOST_REPEATS = 3, 2000, 200


def goal_of(name: str, side: str) -> float | None:
    """The ratio to a plain gradient that is aimed at. The recipe and the peers have none."""
    if side in ("clip_norm", "clip_quantile", "normalize"):
        return 1.05 if name.startswith(("MLP", "ViT", "GPT")) else 1.3
    return {"agreement": 1.8, "geometric_median": 3.5}.get(side)


def losses(loss_fn: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """Of every example, [B]."""
    return jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)


def plain(loss_fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The gradient of the mean loss."""
    return lambda params, batch: jax.grad(lambda p: losses(loss_fn, p, batch).mean())(params)


def weighting(loss_fn: Callable[..., jax.Array], rule: Any) -> Callable[..., Any]:
    """The gradient alone of `cg.weighted_grads`."""
    weighted = cg.weighted_grads(loss_fn, rule)
    return lambda params, batch: weighted(params, batch)[0]


def recipe(loss_fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """clip_norm in three lines of JAX: norms, weights, and a second backward pass of the weighted loss."""

    def clipped(params: Any, batch: Any) -> Any:
        norms = jnp.sqrt(jnp.stack(jax.tree.leaves(cg.per_example_sq_norms(loss_fn)(params, batch))).sum(0))
        weights = jnp.minimum(1, _MAX_NORM / norms) / norms.size
        return jax.grad(lambda p: (weights * losses(loss_fn, p, batch)).sum())(params)

    return clipped


def by_optax(loss_fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """clip_norm by optax, from materialised gradients."""

    def clipped(params: Any, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch))
        total: Any = optax.per_example_global_norm_clip(leaves, _MAX_NORM)[0]
        return jax.tree.unflatten(structure, [leaf / leaves[0].shape[0] for leaf in total])

    return clipped


def by_jax_privacy(loss_fn: Callable[..., jax.Array], batch_size: int, size: int | None) -> Callable[..., Any]:
    """clip_norm by jax_privacy, `size` examples at a time."""
    import jax_privacy  # here, since only this side needs it

    return jax_privacy.clipped_grad(
        loss_fn, l2_clip_norm=_MAX_NORM, normalize_by=batch_size, keep_batch_dim=False, microbatch_size=size
    )


def tuned(loss_fn: Callable[..., jax.Array], params: Any, batch: Any, batch_size: int, largest: int) -> Any:
    """(the program of the fastest microbatch size, milliseconds by size), each timed once after a warm-up run."""
    best, tried = None, {}
    for size in _MICROBATCHES:
        if (size or batch_size) > largest or batch_size % (size or 1):
            continue
        program = compiled(by_jax_privacy(loss_fn, batch_size, size), params, batch)
        tried[str(size)] = alternate({"it": program.run}, 1)["it"]
        if tried[str(size)] <= min(tried.values()):
            best = program
        if tried[str(size)] > _SEARCH_LIMIT_MS:
            break
    return best, tried


def difference(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖."""
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, got, want))
    return float(distance / optax.tree.norm(want))


def repeats_of(program: Program, repeats: int) -> int:
    """At least `repeats`, and more of a program that takes few milliseconds."""
    ms = alternate({"it": program.run}, 3)["it"]
    return max(repeats, min(_MOST_REPEATS, int(_ENOUGH_MS / ms)))


def entries(name: str, programs: dict[str, Program], times: dict[str, float]) -> dict[str, dict[str, Any]]:
    """By side: time, ratio, memory, and the goal where there is one."""
    sides: dict[str, dict[str, Any]] = {}
    for side, program in programs.items():
        if side == "plain":
            continue
        goal, ratio = goal_of(name, side), times[side] / times["plain"]
        sides[side] = {"ms": times[side], "ratio": ratio, "temp_mb": program.temp_mb, "compile_s": program.compile_s}
        if goal is not None:
            sides[side] |= {"goal": goal, "met": ratio <= goal}
    return sides


def measure(name: str, model: Model, batch_size: int, wanted: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """The sides of one model and batch."""
    loss_fn, params, batch = make(model, batch_size)
    builders = {side: weighting(loss_fn, rule) for side, rule in _WEIGHTINGS.items()} | {"recipe": recipe(loss_fn)}
    chosen = {"plain": plain(loss_fn)} | {side: f for side, f in builders.items() if side in wanted}
    fast = {side: compiled(f, params, batch) for side, f in chosen.items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    runs = repeats_of(fast["plain"], repeats)
    times = alternate({side: program.run for side, program in fast.items()}, runs)
    row: dict[str, Any] = {"name": name, "batch_size": batch_size, "num_params": count, "repeats": runs}
    row |= {"plain_ms": times["plain"], "plain_temp_mb": fast["plain"].temp_mb, "slow_repeats": _SLOW_REPEATS}
    sides = entries(name, fast, times)
    slow: dict[str, Program] = {}
    if times["plain"] <= _SLOW_LIMIT_MS:
        largest = max(1, int(_VMAP_BYTES // (4 * count)))
        if "optax" in wanted and batch_size <= largest:
            slow["optax"] = compiled(by_optax(loss_fn), params, batch)
        if "jax_privacy" in wanted and importlib.util.find_spec("jax_privacy") is not None:
            slow["jax_privacy"], row["microbatch_ms"] = tuned(loss_fn, params, batch, batch_size, largest)
    if slow:
        beside = {"plain": fast["plain"].run} | {side: program.run for side, program in slow.items()}
        sides |= entries(name, {"plain": fast["plain"]} | slow, alternate(beside, _SLOW_REPEATS))
    same = {side: program.run() for side, program in (fast | slow).items() if side in _SAME}
    for side, grads in same.items():
        sides[side]["difference"] = difference(grads, next(iter(same.values())))
        if sides[side]["difference"] > _RTOL:
            raise ValueError(f"Expected {side} to agree within {_RTOL} on {name}, got {sides[side]['difference']}.")
    return row | {"sides": sides}


def coordinatewise() -> dict[str, Any]:
    """The coordinate-wise median of the examples of the MLP, and its peer."""
    name = _MODELS[0]
    loss_fn, params, batch = make(MODELS[name], _COORDINATEWISE_BATCH)

    def peer(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        return jax.tree.map(lambda g: jnp.median(g, axis=0), grads)

    programs = {
        "plain": compiled(plain(loss_fn), params, batch),
        _COORDINATEWISE: compiled(cg.coordinatewise_grads(loss_fn, cg.median()), params, batch),
        "jnp.median": compiled(peer, params, batch),
    }
    times = alternate({side: program.run for side, program in programs.items()}, _SLOW_REPEATS)
    ours, theirs = programs[_COORDINATEWISE], programs["jnp.median"]
    time, memory = times[_COORDINATEWISE] / times["jnp.median"], ours.temp_mb / theirs.temp_mb
    return {
        "name": name,
        "batch_size": _COORDINATEWISE_BATCH,
        "repeats": _SLOW_REPEATS,
        "sides": {side: {"ms": times[side], "temp_mb": program.temp_mb} for side, program in programs.items()},
        "difference": difference(ours.run(), theirs.run()),
        "time_ratio": time,
        "time_goal": _TIME_GOAL,
        "memory_ratio": memory,
        "memory_goal": _MEMORY_GOAL,
        "met": time <= _TIME_GOAL and memory <= _MEMORY_GOAL,
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table; `!` marks a missed goal."""
    text = f"{row['name']:32}{row['batch_size']:5}{row['plain_ms']:10.1f}"
    for side in (*FAST, *SLOW):
        entry = row["sides"].get(side)
        text += f"{'–':>17}" if entry is None else f"{entry['ratio']:16.2f}{' ' if entry.get('met', True) else '!'}"
    return text


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    names = {"optax": "optax", "jax_privacy": "jax-privacy"}
    return {
        package: importlib.metadata.version(package)
        for module, package in names.items()
        if importlib.util.find_spec(module) is not None
    }


def main(
    repeats: int = 10,
    out: Path | None = None,
    models: tuple[str, ...] = (),
    batch_sizes: tuple[int, ...] = (),
    sides: tuple[str, ...] = (*FAST, *SLOW, _COORDINATEWISE),
) -> None:
    """Measure every model at every batch size, print a table of ratios, and write it to `out`.

    `models`: names to begin with; rows of `out` that are not measured again stay. `batch_sizes`: all of a model's if
    none is given.
    """
    record: dict[str, Any] = {"results": []}
    if out is not None and out.exists() and (models or batch_sizes):
        record = json.loads(out.read_text())
    record |= {"machine": machine(), "versions": versions(), "max_norm": _MAX_NORM}

    def write() -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")

    cases = [
        (name, size)
        for name in _MODELS
        for size in MODELS[name].batch_sizes
        if (not models or name.startswith(models)) and (not batch_sizes or size in batch_sizes)
    ]
    print(f"{'model':32}{'B':>5}{'plain ms':>10}" + "".join(f"{side:>16} " for side in (*FAST, *SLOW)))
    for name, size in tqdm(cases, desc="weighted", leave=False):
        row = measure(name, MODELS[name], size, sides, repeats)
        kept = [old for old in record["results"] if (old["name"], old["batch_size"]) != (name, size)]
        record["results"] = sorted([*kept, row], key=lambda row: (_MODELS.index(row["name"]), row["batch_size"]))
        tqdm.write(line(row))
        write()
    if _COORDINATEWISE in sides and (not models or _MODELS[0].startswith(models)):
        record[_COORDINATEWISE] = coordinatewise()
        print(json.dumps(record[_COORDINATEWISE]))
        write()


if __name__ == "__main__":
    tyro.cli(main)
