"""What exact per-example statistics cost: `grad_moments` against one plain gradient of the mean loss.

    python -m benchmarks.engine [--repeats 40] [--out benchmarks/results/engine.json]

Both sides, and vmap(grad) as the plain reference, run in one process on the same model and batch, in turn; the ratio is
that of the medians. Memory is what the compiled programs say they need beside arguments and results, in 10^6 bytes,
against the size of an array of batch × parameters.
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm.auto import tqdm

import cg_jax as cg
from experiments import models


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch."""

    name: str
    model: str
    image: tuple[int, int, int]
    batch_size: int


CASES = (
    Case("MLP 784-512-512-10", "mlp", (28, 28, 1), 128),
    Case("CNN 5x5 (16, 32)", "cnn", (28, 28, 1), 128),
    Case("ResNet-8 GroupNorm", "resnet", (32, 32, 3), 32),
)


def sides(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """(name → run once, sizes) of the compiled programs of a case."""
    model = models.build(case.model, None, None, 10)
    loss_fn = models.loss_of(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(case.batch_size, *case.image)), jnp.float32)
    batch = (images, jnp.asarray(rng.integers(0, 10, case.batch_size), jnp.int32))
    params = jax.jit(model.init)(jax.random.key(0), images[:1])

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jax.vmap(loss_fn, in_axes=(None, 0))(p, batch).mean())(params)

    functions = {
        "plain": plain,
        "ghost": lambda p, b: cg.grad_moments(loss_fn)(p, b),
        "vmap": lambda p, b: cg.grad_moments(loss_fn, method="vmap")(p, b),
    }
    compiled = {name: jax.jit(function).lower(params, batch).compile() for name, function in functions.items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {"num_params": count, "batch_times_params_mb": case.batch_size * count * 4 / 1e6}
    for name, program in compiled.items():
        memory = program.memory_analysis()
        sizes[f"{name}_temp_mb"] = float("nan") if memory is None else memory.temp_size_in_bytes / 1e6
    runs = {
        name: lambda program=program: jax.block_until_ready(program(params, batch))
        for name, program in compiled.items()
    }
    return runs, sizes


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each side, taken in turn, and their ratios to the plain gradient."""
    runs, sizes = sides(case)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for repeat in tqdm(range(repeats), desc=case.name, leave=False):
        for name, run in runs.items():
            if name == "vmap" and repeat % 4:
                continue
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    ratios = {f"{name}_ratio": medians[f"{name}_ms"] / medians["plain_ms"] for name in ("ghost", "vmap")}
    return dataclasses.asdict(case) | medians | ratios | sizes


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
    }


def main(repeats: Annotated[int, tyro.conf.arg(help="Runs of each side.")] = 40, out: Path | None = None) -> None:
    """Measure every case, print a table, and write it to `out`."""
    results = []
    print(f"{'model':24}{'B':>5}{'plain ms':>10}{'ghost ms':>10}{'ratio':>7}{'vmap ratio':>12}{'temp MB: plain':>16}"
          f"{'ghost':>8}{'vmap':>8}{'B x P':>8}")  # fmt: skip
    for case in CASES:
        r = measure(case, repeats)
        results.append(r)
        print(f"{r['name']:24}{r['batch_size']:5}{r['plain_ms']:10.2f}{r['ghost_ms']:10.2f}{r['ghost_ratio']:7.2f}"
              f"{r['vmap_ratio']:12.1f}{r['plain_temp_mb']:16.1f}{r['ghost_temp_mb']:8.1f}{r['vmap_temp_mb']:8.1f}"
              f"{r['batch_times_params_mb']:8.1f}")  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "repeats": repeats, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
