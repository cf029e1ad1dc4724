"""What per-example gradient norms cost in BackPACK and Opacus, against their own plain backward pass (PyTorch, CPU).

    python -m benchmarks.peers [--repeats 10] [--out benchmarks/results/peers.json] [--models MLP ViT]

The models are those of benchmarks/models.py, written in PyTorch. Four sides run in one process on the same weights and
batch, in turn: plain (forward and backward of the mean loss), BackPACK's `BatchL2Grad`, Opacus' `GradSampleModule` and
the norms of every `grad_sample`, and Opacus' `GradSampleModuleFastGradientClipping` with ghost clipping as far as
`get_norm_sample`, without the second backward pass that would clip. Every side but the first yields the norms beside
the gradient of the mean loss. A ratio is that of the medians, on two threads, in float32 and eager mode. Two threads
need two idle cores: the load of the machine at the start is written beside the results.

The norms are compared with a loop over two examples. A peer that cannot do a model has null, and its message in
the note. JAX is not needed here, but torch, backpack-for-pytorch and opacus are.
"""

import copy
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import tyro
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.timing import alternate

_THREADS = 2
_LOOPED, _RTOL = 2, 1e-4  # examples that the norms are compared on, and how closely
# opt-einsum: torch.einsum takes it, where it is installed, for the order of BackPACK's products.
_PACKAGES = ("torch", "backpack-for-pytorch", "opacus", "opt-einsum")


def mlp() -> nn.Module:
    hidden = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def cnn() -> nn.Module:
    first = (nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


class ResidualBlock(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """norm-ReLU-conv twice, beside the input."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels, eps=1e-6), nn.GroupNorm(8, features, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        changes = channels != features or stride > 1
        self.shortcut = nn.Conv2d(channels, features, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, height, width] → [B, features, height/stride, width/stride]."""
        y = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


def resnet(width: int, stages: int, blocks: int) -> nn.Module:
    """Pre-activation residual network with GroupNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    channels = width
    for stage in range(stages):
        for block in range(blocks):
            layers.append(ResidualBlock(channels, width * 2**stage, 2 if stage and not block else 1))
            channels = width * 2**stage
    layers += [nn.GroupNorm(8, channels, eps=1e-6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 10))


class Block(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """Pre-norm transformer block: attention, then an MLP four times as wide."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] → [B, T, dim]."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """ViT or GPT. Positions come from an `nn.Embedding`: a module with a bare parameter Opacus takes by vmap, whole."""

    def __init__(self, embed: nn.Module, head: nn.Module, length: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.length, self.images = length, isinstance(embed, nn.Conv2d)
        self.embed, self.head = embed, head
        self.position = nn.Embedding(length, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=not self.images) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, channels, height, width] → logits [B, 10]; tokens [B, T] → logits [B, T, vocabulary]."""
        ids = torch.arange(self.length).repeat(x.shape[0], 1)
        x = self.embed(x)
        if self.images:
            x = x.flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x + self.position(ids)))
        return self.head(x.mean(1) if self.images else x)


def vit() -> nn.Module:
    return Transformer(nn.Conv2d(3, 192, 4, 4), nn.Linear(192, 10), 64, 192, 6, 3)


def gpt() -> nn.Module:
    embed, head = nn.Embedding(8192, 256), nn.Linear(256, 8192, bias=False)
    nn.init.normal_(embed.weight, std=1 / 16)
    head.weight = embed.weight
    return Transformer(embed, head, 256, 256, 4, 4)


# Name → how to build it, the shape of one image or (tokens,), the batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-512-512-10": (mlp, (1, 28, 28), 128),
    "CNN 5x5 (16, 32)": (cnn, (1, 28, 28), 128),
    "ResNet-8 GroupNorm": (lambda: resnet(16, 3, 1), (3, 32, 32), 32),
    "ResNet-18 GroupNorm": (lambda: resnet(64, 4, 2), (3, 32, 32), 32),
    "ViT patch 4, dim 192, 6 blocks": (vit, (3, 32, 32), 32),
    "GPT dim 256, 4 blocks, tied": (gpt, (256,), 8),
}

Run = Callable[[], Any]  # one run of a side: its norms [B]


def batch_of(example: tuple[int, ...], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels), random."""
    torch.manual_seed(0)
    if len(example) > 1:
        return torch.randn(batch_size, *example), torch.randint(0, 10, (batch_size,))
    tokens = torch.randint(0, 8192, (batch_size, *example))
    return tokens, tokens.roll(-1, 1)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the batch, and over tokens where there are any."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, norms: Any, context: Any = nullcontext) -> Run:
    """Forward, backward within `context()`, and what `norms()` yields thereafter."""

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        with context():
            loss_of(model(x), y).backward()
        return norms()

    return run


def backpack_norms(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    """BackPACK's, of the gradients of the mean: B times those are the examples' own."""
    params: list[Any] = list(model.parameters())

    def norms() -> torch.Tensor:
        return len(x) * torch.stack([p.batch_l2 for p in params]).sum(0).sqrt()

    return step(extend(model), x, y, norms, lambda: backpack(BatchL2Grad()))


def opacus_norms(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    """Opacus with per-example gradients, then their norms."""
    params: list[Any] = list(model.parameters())

    def norms() -> torch.Tensor:
        return torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in params]).norm(dim=0)

    return step(GradSampleModule(model), x, y, norms)


def ghost_norms(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    """Opacus with norms by Gram matrices where it has them; elsewhere it instantiates layer by layer."""
    wrapped = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=True)
    return step(wrapped, x, y, wrapped.get_norm_sample)


SIDES = {"BackPACK": backpack_norms, "Opacus": opacus_norms, "Opacus ghost": ghost_norms}


def looped_norms(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Norms of the first examples' gradients, one by one; summed in float64, for float32 loses four digits here."""
    losses = [loss_of(model(x[i : i + 1]), y[i : i + 1]) for i in range(_LOOPED)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in grad]).norm(dtype=torch.float64) for grad in grads])


def attempt(side: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Run | None, dict[str, Any]]:
    """(the side, or None where it fails; what is known of it before it is timed)."""
    record: dict[str, Any] = {"ms": None, "ratio": None, "note": ""}
    try:
        with warnings.catch_warnings():
            # BackPACK warns of a layer that it has no rule for and leaves its parameters out. It warns of containers as
            # well, whose parts have rules or not by themselves.
            warnings.filterwarnings("ignore", message="Extension saving to")
            warnings.filterwarnings("error", message=r"Extension saving to.*class 'torch\.nn\.")
            run = SIDES[side](copy.deepcopy(model), x, y)
            norms = run()[:_LOOPED].detach().double()
    except Exception as error:
        record["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None, record
    if side == "Opacus ghost":
        kinds = {type(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
        others = sorted(kind.__name__ for kind in kinds - set(GradSampleModuleFastGradientClipping.NORM_SAMPLERS))
        record["note"] = "instantiates " + ", ".join(others) if others else ""
    expected = looped_norms(model, x, y)
    record["max_relative_error"] = ((norms - expected).abs() / expected).max().item()
    record["agrees"] = torch.allclose(norms, expected, rtol=_RTOL, atol=0)
    return run, record


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Medians and ratios of all sides on one model."""
    build, example, batch_size = MODELS[name]
    x, y = batch_of(example, batch_size)
    model = build()
    runs, sides = {"plain": step(copy.deepcopy(model), x, y, lambda: None)}, {}
    for side in SIDES:
        run, sides[side] = attempt(side, model, x, y)
        if run is not None:
            runs[side] = run
    times = alternate(runs, repeats)
    for side in runs.keys() & sides.keys():
        sides[side] |= {"ms": times[side], "ratio": times[side] / times["plain"]}
    return {"name": name, "batch_size": batch_size, "plain_ms": times["plain"], "sides": sides}


def lines(row: dict[str, Any]) -> str:
    """One line of the table, and the notes below it; `!` marks norms that differ from the loop's."""
    text = f"{row['name']:32}{row['batch_size']:5}{row['plain_ms']:10.1f}"
    for side in row["sides"].values():
        text += f"{'–':>14}" if side["ratio"] is None else f"{side['ratio']:13.2f}{' ' if side['agrees'] else '!'}"
    return text + "".join(f"\n    {name}: {side['note']}" for name, side in row["sides"].items() if side["note"])


def host() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def main(repeats: int = 10, out: Path | None = None, models: tuple[str, ...] = ()) -> None:
    """Measure every model, print a table of ratios, and write it to `out`; `models`: names to begin with."""
    torch.set_num_threads(_THREADS)
    warnings.filterwarnings("ignore", message="Full backward hook")  # of a first layer, whose input has no gradient
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    record: dict[str, Any] = {"machine": host(), "versions": versions, "repeats": repeats, "results": []}
    print(f"{'model':32}{'B':>5}{'plain ms':>10}" + "".join(f"{side:>13} " for side in SIDES))
    for name in tqdm([name for name in MODELS if not models or name.startswith(models)], desc="peers", leave=False):
        record["results"].append(measure(name, repeats))
        tqdm.write(lines(record["results"][-1]))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
