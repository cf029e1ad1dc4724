"""What clipped averages cost in Opacus, against its own plain backward pass (PyTorch, CPU).

    python -m benchmarks.peers_clipping [--repeats 10] [--out benchmarks/results/peers_clipping.json] [--models MLP ViT]

The models, batches and conditions are those of benchmarks/peers.py. Three sides run in one process on the same weights
and batch, in turn: plain (forward and backward of the mean loss); ghost clipping complete, which is
`GradSampleModuleFastGradientClipping` under its own loss: a backward pass for the norms, and a second one of the
weighted loss; and clipping of materialised gradients, `GradSampleModule` and `DPOptimizer.clip_and_accumulate`. No side
adds noise or takes a step.

Σ min(1, C/‖gᵢ‖) gᵢ is compared with a loop over the batch. A peer that cannot do a model has null, and its message
in the note. fastDP (MixOpt) is in no package index under `fastdp` or `fast-differential-privacy`, so it is not here.
"""

import copy
import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import tyro
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from tqdm.auto import tqdm

from benchmarks.peers import MODELS, Run, batch_of, host, loss_of, step
from benchmarks.timing import alternate

_MAX_NORM, _RTOL, _THREADS = 1.0, 1e-4, 2
_NOTE = "fastDP (MixOpt) was not measured: no package fastdp or fast-differential-privacy on the index."


def _optimizer(kind: Any, model: nn.Module, batch_size: int) -> Any:
    """A DP optimizer, which is never stepped."""
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    return kind(inner, noise_multiplier=0.0, max_grad_norm=_MAX_NORM, expected_batch_size=batch_size)


def ghost_clipping(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    """Opacus' two backward passes; the sum of the clipped gradients."""
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=_MAX_NORM, use_ghost_clipping=True)
    optimizer = _optimizer(DPOptimizerFastGradientClipping, wrapped, len(x))
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        logits = wrapped(x)
        shape = logits.shape if logits.ndim > 2 else None
        loss(logits.flatten(0, -2), y.flatten(), shape=shape).backward()
        return [p.grad for p in wrapped.parameters()]

    return run


def clipped_samples(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    """Opacus' per-example gradients, clipped and added up."""
    wrapped = GradSampleModule(model)
    optimizer = _optimizer(DPOptimizer, wrapped, len(x))

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss_of(wrapped(x), y).backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in wrapped.parameters()]

    return run


SIDES = {"Opacus ghost clipping": ghost_clipping, "Opacus clipped samples": clipped_samples}


def looped(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Σ min(1, C/‖gᵢ‖) gᵢ, flat, one example after another, added up in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_of(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in grads]).double()
        total = total + flat * min(1.0, _MAX_NORM / flat.norm().item())
    return total


def attempt(side: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor, expected: torch.Tensor) -> Any:
    """(the side, or None where it fails; what is known of it before it is timed)."""
    record: dict[str, Any] = {"ms": None, "ratio": None, "note": ""}
    try:
        run = SIDES[side](copy.deepcopy(model), x, y)
        grads = torch.cat([g.flatten() for g in run()]).detach().double()
    except Exception as error:
        record["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None, record
    record["difference"] = ((grads - expected).norm() / expected.norm()).item()
    record["agrees"] = record["difference"] <= _RTOL
    return run, record


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Medians and ratios of all sides on one model."""
    build, example, batch_size = MODELS[name]
    x, y = batch_of(example, batch_size)
    model = build()
    expected = looped(model, x, y)
    runs: dict[str, Run] = {"plain": step(copy.deepcopy(model), x, y, lambda: None)}
    sides: dict[str, Any] = {}
    for side in SIDES:
        run, sides[side] = attempt(side, model, x, y, expected)
        if run is not None:
            runs[side] = run
    times = alternate(runs, repeats)
    for side in runs.keys() & sides.keys():
        sides[side] |= {"ms": times[side], "ratio": times[side] / times["plain"]}
    return {"name": name, "batch_size": batch_size, "plain_ms": times["plain"], "sides": sides}


def lines(row: dict[str, Any]) -> str:
    """One line of the table, and the notes below it; `!` marks sums that differ from the loop's."""
    text = f"{row['name']:32}{row['batch_size']:5}{row['plain_ms']:10.1f}"
    for side in row["sides"].values():
        text += f"{'–':>25}" if side["ratio"] is None else f"{side['ratio']:24.2f}{' ' if side['agrees'] else '!'}"
    return text + "".join(f"\n    {name}: {side['note']}" for name, side in row["sides"].items() if side["note"])


def main(repeats: int = 10, out: Path | None = None, models: tuple[str, ...] = ()) -> None:
    """Measure every model, print a table of ratios, and write it to `out`; `models`: names to begin with."""
    torch.set_num_threads(_THREADS)
    warnings.filterwarnings("ignore", message="Full backward hook")  # of a first layer, whose input has no gradient
    versions = {name: importlib.metadata.version(name) for name in ("torch", "opacus")}
    record: dict[str, Any] = {"machine": host(), "versions": versions, "repeats": repeats, "max_norm": _MAX_NORM}
    record |= {"note": _NOTE, "results": []}
    print(f"{'model':32}{'B':>5}{'plain ms':>10}" + "".join(f"{side:>24} " for side in SIDES))
    for name in tqdm([name for name in MODELS if not models or name.startswith(models)], desc="peers", leave=False):
        record["results"].append(measure(name, repeats))
        tqdm.write(lines(record["results"][-1]))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
