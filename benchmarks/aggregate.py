"""What a robust average costs in a training step, and by itself.

    python -m benchmarks.aggregate [--repeats 30] [--out benchmarks/results/aggregate.json]

Training steps of SGD with donated state, all sides in turn in one process on the same model and batch; a ratio is that
of the medians. "m3" steps along the median of three micro-batches (`micro_batch_grads`, `median_of_k(3)`), against the
unrolled mean of the same three, and against `jnp.median` in its place. "rm3" steps along the median of the last three
gradients, against plain SGD. "rule" is the median of three gradients alone, on one buffer of [3, parameters], against
`jnp.median` and, where PyTorch is installed, `torch.median` of a stack.

`rm3_bound` is what its traffic alone would make of the ratio: RM3 reads two slots more and writes one, 3 P bytes, at
the speed at which this machine adds up two arrays of P bytes (3 P bytes too), measured in the same run.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

import cg_jax as cg
from benchmarks.models import MODELS, make
from benchmarks.timing import alternate, machine

_MODELS = ("MLP 784-512-512-10", "CNN 5x5 (16, 32)")
_BATCH_SIZES = (50, 128, 512)


def jnp_median(values: jax.Array) -> jax.Array:
    """The rule as JAX has it: by a sort."""
    return jnp.median(values, axis=0)


class Step:
    """A compiled training step that goes on from its own last state."""

    def __init__(self, optimizer: optax.GradientTransformation, gradient: Callable[..., Any], params: Any, batch: Any):
        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradient(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        self.batch = batch
        self.state = jax.tree.map(jnp.array, params), optimizer.init(params)
        self.program = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, batch).compile()

    def __call__(self) -> None:
        """One more step."""
        self.state = jax.block_until_ready(self.program(*self.state, self.batch))

    def memory(self) -> dict[str, float]:
        """MB of temporaries, and of arguments that results are written over."""
        analysis = self.program.memory_analysis()
        if analysis is None:  # not every backend tells
            return {"temp_mb": float("nan"), "alias_mb": float("nan")}
        return {"temp_mb": analysis.temp_size_in_bytes / 1e6, "alias_mb": analysis.alias_size_in_bytes / 1e6}


def steps(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Training steps of one model."""
    loss_fn, params, batch = make(MODELS[name], batch_size)
    thrice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[::-1], leaf]), batch)

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jax.vmap(loss_fn, (None, 0))(p, batch).mean())(params)

    sgd, three = optax.sgd(0.01), cg.micro_batch_grads(loss_fn, 3)
    rules = {"mean3": cg.mean(), "m3": cg.median(), "m3_jnp": jnp_median}
    sides = {side: Step(optax.chain(cg.stacked(rule), sgd), three, params, thrice) for side, rule in rules.items()}
    sides |= {"sgd": Step(sgd, plain, params, batch), "rm3": Step(optax.chain(cg.rm3(), sgd), plain, params, batch)}
    ms = alternate({side: lambda step=step: step() for side, step in sides.items()}, repeats)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    add = jax.jit(jnp.add, donate_argnums=0)
    buffers = [jnp.ones(size), jnp.ones(size)]

    def traffic() -> None:
        buffers[0] = jax.block_until_ready(add(*buffers))

    add_ms = alternate({"add": traffic}, repeats)["add"]
    row: dict[str, Any] = {"name": name, "batch_size": batch_size, "parameters_mb": 4 * size / 1e6}
    row |= {f"{side}_ms": value for side, value in ms.items()} | {"add_ms": add_ms}
    row |= {"m3_ratio": ms["m3"] / ms["mean3"], "m3_jnp_ratio": ms["m3_jnp"] / ms["mean3"]}
    row |= {"rm3_ratio": ms["rm3"] / ms["sgd"], "rm3_bound": 1 + add_ms / ms["sgd"]}
    row |= {f"{side}_{key}": mb for side in ("sgd", "rm3") for key, mb in sides[side].memory().items()}
    return row


def rules(size: int, repeats: int) -> dict[str, Any]:
    """The median of three gradients of `size` numbers, and its rivals, alone."""
    values = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    given = jnp.asarray(values)
    sides: dict[str, Callable[[], Any]] = {}
    for side, rule in {"median": cg.median(), "mean": cg.mean(), "jnp_median": jnp_median}.items():
        program = jax.jit(rule)
        sides[side] = lambda program=program: jax.block_until_ready(program(given))
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed (pip install .[bench]): its median is left out.")
    else:
        grads = list(torch.from_numpy(values))
        sides["torch_median"] = lambda: torch.median(torch.stack(grads), dim=0).values
    ms = alternate(sides, repeats)
    return {"numbers": size} | {f"{side}_ms": value for side, value in ms.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a robust average costs in a training step, and by itself: about 6 minutes on 2 CPU cores."""

    repeats: int = 30
    out: Path = Path("benchmarks/results/aggregate.json")


def main(options: Options) -> None:
    """Measure, print and write."""
    cases = [(name, size) for name in _MODELS for size in _BATCH_SIZES]
    rows = [steps(*case, options.repeats) for case in tqdm(cases, desc="training steps")]
    for row in rows:
        print(
            f"{row['name']:22} batch {row['batch_size']:4}: M3 {row['m3_ratio']:.3f} x the mean of three (jnp.median "
            f"{row['m3_jnp_ratio']:.2f}), RM3 {row['rm3_ratio']:.3f} x SGD (traffic alone {row['rm3_bound']:.3f}); "
            f"temporary MB {row['sgd_temp_mb']:.1f}, RM3 {row['rm3_temp_mb']:.1f}, aliased {row['rm3_alias_mb']:.1f}"
        )
    alone = [rules(size, options.repeats) for size in (700_000, 10_000_000)]
    for row in alone:
        sides = (f"{side.removesuffix('_ms')} {ms:.1f} ms" for side, ms in row.items() if side.endswith("_ms"))
        print(f"of three gradients of {row['numbers']:,} numbers: {', '.join(sides)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(), "repeats": options.repeats, "steps": rows, "rules": alone}
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
