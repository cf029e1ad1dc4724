"""Trainings of five seeds in one program, vmapped over seeds, against one after another, a step at a time.

    python -m benchmarks.seeds [--out benchmarks/results/seeds.json]

Milliseconds of one step of one seed, medians over turns. On mnist5k, plain SGD; what the experiments do.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm.auto import tqdm

from benchmarks.timing import alternate, machine
from experiments import models
from experiments.arrays import InMemory, OnDevices
from experiments.configs import Config
from experiments.data import Noise
from experiments.stepping import Alone, Together
from experiments.train import Keys, Recipe, State, trainer

_SEEDS = 5
# Name, model, width, depth, batch size, steps of a turn.
_CASES = (
    ("MLP 784-32-32-10", "mlp", 32, 2, 50, 100),
    ("MLP 784-128-128-10", "mlp", 128, 2, 50, 100),
    ("MLP 784-256-256-256-10", "mlp", 256, 3, 100, 100),
    ("MLP 784-512-512-10", "mlp", 512, 2, 50, 100),
    ("CNN, 8 channels", "cnn", 8, None, 50, 5),
)


def measure(model: str, width: int, depth: int | None, batch_size: int, steps: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step of a seed, either way."""
    data, network = InMemory(Config(batch_size=batch_size)), models.build(model, width, depth, 10)
    keys = [Keys.of(seed) for seed in range(_SEEDS)]
    examples = [each for each in (data.noisy(key, Noise(0.5)) for key in keys) if isinstance(each, OnDevices)]
    method = trainer(network, "sgd", Recipe(batch_size, 0.1), data.num_train)

    def fresh() -> list[State]:
        return [jax.device_get(method.init(key.init, each.first)) for key, each in zip(keys, examples, strict=True)]

    together = Together(method, examples, 0)
    alone = [Alone(method, each, 0) for each in examples]
    states: dict[str, Any] = {"together": jax.tree.map(lambda *leaves: np.stack(leaves), *fresh()), "alone": fresh()}

    def run_together() -> None:
        states["together"] = jax.block_until_ready(together.advance(states["together"], steps, lambda _: None))

    def run_alone() -> None:
        states["alone"] = [
            jax.block_until_ready(each.advance(state, steps, lambda _: None))
            for each, state in zip(alone, states["alone"], strict=True)
        ]

    ms = alternate({"alone": run_alone, "together": run_together}, repeats)
    return {side: value / steps / _SEEDS for side, value in ms.items()}


def main(repeats: int = 7, out: Path | None = None) -> None:
    """Print, and write where asked, milliseconds of both and their ratio."""
    results: list[dict[str, Any]] = []
    for name, *case in tqdm(_CASES):
        ms = measure(*case, repeats)  # type: ignore[arg-type]
        ratio = ms["alone"] / ms["together"]
        results.append({"name": name, **{f"{k}_ms": round(v, 4) for k, v in ms.items()}, "ratio": round(ratio, 2)})
        print(results[-1], flush=True)
    if out:
        record = {"machine": machine(), "seeds": _SEEDS, "repeats": repeats, "results": results}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
