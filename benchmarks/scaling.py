"""How the cost of a measurement grows: with examples, with parameters, with devices.

    python -m benchmarks.scaling [--out benchmarks/results/scaling.json]

On synthetic data, float32. Times are of one device, medians after a run that is not counted; `gradients_ms` is that of
as many plain gradients of the mean loss as there are batches, in turn with it. Bytes are what the compiled programs
move and hold on one of 1 to 8 devices that one processor pretends to be: what the collectives of one batch and of the
last program yield (of a reduce-scatter its part of the result, 1/n of what was added up). Three layouts of the
parameters: on every device; divided over the devices that divide the examples (fully sharded); divided over a second
axis of 4 (tensor parallel).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

import cg_jax as cg
from benchmarks.programs import collectives, moved, of_measurement
from benchmarks.timing import alternate, machine

_EXAMPLES = (1_000, 10_000, 100_000, 1_000_000)
_WIDTHS = (316, 1_000, 3_162, 10_000)  # 1e5 to 1e8 parameters
_DEVICES = (1, 2, 4, 8)
_BATCH = 1_000


def loss_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One hidden layer of a width that the parameters say."""
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["hidden"]))


def make(width: int, inputs: int = 32) -> dict[str, jax.Array]:
    """Parameters."""
    keys = jax.random.split(jax.random.key(0))
    shapes = {"in": (inputs, width), "hidden": (width, width)}
    return {name: jax.random.normal(key, shapes[name]) / 10 for name, key in zip(shapes, keys, strict=True)}


@jax.jit
def gradient(params: Any, x: jax.Array) -> Any:
    """The plain gradient of the mean loss."""
    return jax.grad(lambda p: jax.vmap(loss_fn, (None, 0))(p, x).mean())(params)


def timed(width: int, m: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Time of a measurement of m examples, and of the plain gradients of its batches."""
    params, data = make(width), np.random.default_rng(0).normal(size=(m, 32)).astype(np.float32)

    def measured() -> None:
        jax.block_until_ready(cg.measure_coherence(loss_fn, params, data, batch_size=batch_size))

    def gradients() -> None:
        jax.block_until_ready([gradient(params, data[i : i + batch_size]) for i in range(0, m, batch_size)][-1])

    ms = alternate({"measure": measured, "gradients": gradients}, repeats)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": size, "examples": m, "batch_size": batch_size} | {f"{k}_ms": v for k, v in ms.items()}


LAYOUTS = {
    "on every device": {"in": P(), "hidden": P()},
    "fully sharded": {"in": P(None, "data"), "hidden": P(None, "data")},
    "tensor parallel": {"in": P(None, "model"), "hidden": P("model", None)},
}


def _by_kind(program: Any) -> dict[str, int]:
    return {kind: moved(program, kind) for kind, _ in collectives(program)}


def divided(layout: str, devices: int, m: int, width: int = 1_024) -> dict[str, Any]:
    """What the two programs of a measurement move and hold on one device."""
    shape = (devices // 4, 4) if layout == "tensor parallel" else (devices, 1)
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=kinds, devices=jax.devices()[:devices])
    specs = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS[layout].items()}
    params = jax.device_put(make(width), specs)
    data = np.random.default_rng(0).normal(size=(m, 32)).astype(np.float32)
    programs = of_measurement(loss_fn, params, data, batch_size=256, mesh=mesh)
    memory = programs.batch.memory_analysis()
    return {
        "layout": layout,
        "devices": devices,
        "examples": m,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "batch": _by_kind(programs.batch),
        "end": _by_kind(programs.end),
        "batch_argument_bytes": memory.argument_size_in_bytes,
        "batch_temp_bytes": memory.temp_size_in_bytes,
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """How the cost of a measurement grows: about 3 minutes on 2 CPU cores."""

    repeats: int = 5
    out: Path = Path("benchmarks/results/scaling.json")


def main(options: Options) -> None:
    """Measure, print and write."""
    jax.config.update("jax_num_cpu_devices", max(_DEVICES))
    examples = [timed(64, m, _BATCH, options.repeats) for m in tqdm(_EXAMPLES, desc="examples")]
    parameters = [timed(width, 256, 64, options.repeats) for width in tqdm(_WIDTHS, desc="parameters")]
    for row in [*examples, *parameters]:
        ratio = row["measure_ms"] / row["gradients_ms"]
        print(f"{row['parameters']:11,} parameters, {row['examples']:9,} examples: {row['measure_ms']:9.1f} ms", end="")
        print(f", {ratio:.2f} x as many plain gradients")
    cases = [(name, n, 1_024) for name in LAYOUTS for n in _DEVICES if name != "tensor parallel" or n >= 4]
    cases += [("on every device", 8, 16_384)]
    devices = [divided(*case) for case in tqdm(cases, desc="devices")]
    for row in devices:
        print(
            f"{row['layout']:16} {row['devices']} devices, {row['examples']:6,} examples, "
            f"P = {row['parameter_bytes']:,} B: in a batch {row['batch'] or 'nothing'}, "
            f"at the end {row['end'] or 'nothing'}"
        )
    written = {"machine": machine(), "examples": examples, "parameters": parameters, "devices": devices}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
