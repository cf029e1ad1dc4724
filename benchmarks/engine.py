"""What exact per-example statistics cost: `grad_moments` against one plain gradient of the mean loss.

    python -m benchmarks.engine [--repeats 10] [--out benchmarks/results/engine.json] [--models MLP ViT]

Four sides run in one process on the same model and batch, in turn: the plain gradient, cg_jax, vmap(grad), and
optax.microbatching.micro_grad with the best of several `microbatch_size`s. Each but the first yields the sum and the
squared norms of the per-example gradients. A ratio is that of the medians. The slow sides take their turns apart from
the two fast ones, beside further runs of the plain gradient, so that what they leave in the caches disturbs neither.

Memory is what the compiled programs need beside arguments and results, in 10^6 bytes. Compile time is tracing, lowering
and compiling, in seconds.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from optax import microbatching
from tqdm.auto import tqdm

import cg_jax as cg
from benchmarks.models import MODELS, Model, make
from benchmarks.timing import alternate, machine

# Above this size of an array of batch × parameters, vmap(grad) is left out: it would not fit.
_VMAP_BYTES = 3e9
# The slow sides are left out where a plain gradient takes longer than this, and run a few times where not.
_SLOW_LIMIT_MS = 1500
_SLOW_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled side, and what it took to compile it."""

    run: Callable[[], Any]
    temp_mb: float
    compile_s: float


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """`function`, compiled for `arguments`, from empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    temp = float("nan") if memory is None else memory.temp_size_in_bytes / 1e6
    return Program(lambda: jax.block_until_ready(program(*arguments)), temp, seconds)


def micro(loss_fn: Callable[..., jax.Array], size: int) -> Callable[..., Any]:
    """Sum and squared norms by optax's own micro-batched per-example gradients."""
    return microbatching.micro_grad(
        loss_fn,
        keep_batch_dim=False,
        microbatch_size=size,
        metrics_fn=lambda grads: jax.tree.map(lambda g: (g * g).sum(), grads),
    )


def tuned_micro(loss_fn: Callable[..., jax.Array], params: Any, batch: Any, batch_size: int, largest: int) -> Any:
    """(the fastest micro_grad, its microbatch_size), each timed once after a run that is not counted."""
    best: tuple[float, int, Program] | None = None
    for size in sorted({n for n in (1, 4, 16, batch_size) if n <= largest and batch_size % n == 0}):
        program = compiled(micro(loss_fn, size), params, batch)
        ms = alternate({"it": program.run}, 1)["it"]
        if best is None or ms < best[0]:
            best = (ms, size, program)
    assert best is not None
    return best[2], best[1]


def measure(model: Model, batch_size: int, repeats: int) -> dict[str, Any]:
    """Medians, ratios, memory and compile times of all sides on one model and batch."""
    loss_fn, params, batch = make(model, batch_size)

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jax.vmap(loss_fn, in_axes=(None, 0))(p, batch).mean())(params)

    fast = {
        "plain": compiled(plain, params, batch),
        "cg_jax": compiled(lambda p, b: cg.grad_moments(loss_fn)(p, b), params, batch),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    row: dict[str, Any] = {"repeats": repeats, "slow_repeats": _SLOW_REPEATS}
    row |= {"num_params": count, "batch_times_params_mb": batch_size * count * 4 / 1e6}
    times = alternate({name: program.run for name, program in fast.items()}, repeats)
    largest = max(1, int(_VMAP_BYTES // (4 * count)))
    slow: dict[str, Program] = {}
    if batch_size <= largest and times["plain"] <= _SLOW_LIMIT_MS:
        slow["vmap"] = compiled(lambda p, b: cg.grad_moments(loss_fn, method="vmap")(p, b), params, batch)
    if times["plain"] <= _SLOW_LIMIT_MS:
        slow["micro_grad"], row["microbatch_size"] = tuned_micro(loss_fn, params, batch, batch_size, largest)
    beside = alternate(
        {"plain": fast["plain"].run, **{name: program.run for name, program in slow.items()}}, _SLOW_REPEATS
    )
    for name, program in (fast | slow).items():
        against = times if name in times else beside
        row |= {
            f"{name}_ms": against[name],
            f"{name}_ratio": against[name] / against["plain"],
            f"{name}_temp_mb": program.temp_mb,
            f"{name}_compile_s": program.compile_s,
        }
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    vmap = f"{row['vmap_ratio']:8.2f}" if "vmap_ratio" in row else "       –"
    micro = (
        f"{row['micro_grad_ratio']:8.2f} ({row['microbatch_size']:3})" if "micro_grad_ratio" in row else f"{'–':>14}"
    )
    temp = "".join(f"{row.get(f'{side}_temp_mb', float('nan')):8.0f}" for side in ("plain", "cg_jax", "vmap"))
    return (f"{name:32}{row['batch_size']:5}{row['plain_ms']:10.1f}{row['cg_jax_ratio']:8.2f}{vmap}{micro}{temp}"
            f"{row['cg_jax_compile_s'] / row['plain_compile_s']:9.1f}")  # fmt: skip


def main(repeats: int = 10, out: Path | None = None, models: tuple[str, ...] = ()) -> None:
    """Measure every model at every batch size, print a table, and write it to `out`.

    With `models`, only those whose names begin so; rows of others that are in `out` already stay.
    """
    old = json.loads(out.read_text())["results"] if models and out is not None and out.exists() else []
    results = [row for row in old if not row["name"].startswith(models)]
    print(f"{'model':32}{'B':>5}{'plain ms':>10}{'cg_jax':>8}{'vmap':>8}{'micro (size)':>14}"
          f"{'MB: plain':>8}{'cg_jax':>8}{'vmap':>8}{'compile':>8}")  # fmt: skip
    cases = [
        (name, size)
        for name, model in MODELS.items()
        for size in model.batch_sizes
        if not models or name.startswith(models)
    ]
    for name, batch_size in tqdm(cases, desc="engine", leave=False):
        row = {"name": name, "batch_size": batch_size} | measure(MODELS[name], batch_size, repeats)
        results.append(row)
        tqdm.write(line(name, row))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine(), "optax": optax.__version__, "results": results}
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
