"""Gram or instantiate: what one product's norm and sum cost in either form, over the number of positions T.

    python -m benchmarks.crossover [--repeats 15] [--out benchmarks/results/crossover.json]

The gradient of one example is AᵀB with A [T, D] and B [T, P]. Both forms, and the sum alone as a plain gradient has it,
run in one process, in turn, on a batch of 32. The table says from which T on instantiating is the faster, beside the
limits by operations (T < D P / (D + P)), by memory (2 T² ≤ D P) and as the engine has it (T² (D + P) ≤ 20 D P).
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm.auto import tqdm

from benchmarks.timing import alternate, machine
from cg_jax.ghost import Product, products

SIZES = ((192, 192), (512, 512), (1024, 256), (2048, 512))
POSITIONS = (2, 4, 8, 16, 32, 64, 128)
BATCH = 32


def _product(t: int, d: int, p: int) -> Product:
    return Product(lambda a, b: (a[None], b[None]), lambda g: g[0], (1, t, d, p))


def _times(t: int, d: int, p: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(BATCH, t, size)), jnp.float32) for size in (d, p))
    product = _product(t, d, p)
    chunk = {form: products.product_chunk(product, form, 4, 2**26) for form in ("gram", "instantiate")}

    def gram(a: jax.Array, b: jax.Array) -> Any:
        norms = products.without_gradients(product, "gram", a, b, jnp.float32, chunk["gram"])
        return norms, products.sum_of_products(product, a, b, jnp.float32)

    def instantiate(a: jax.Array, b: jax.Array) -> Any:
        return products.instantiated(product, a, b, jnp.float32, chunk["instantiate"])

    def plain(a: jax.Array, b: jax.Array) -> Any:
        return products.sum_of_products(product, a, b, jnp.float32)

    sides = {"gram": gram, "instantiate": instantiate, "sum alone": plain}
    compiled = {name: jax.jit(side).lower(a, b).compile() for name, side in sides.items()}
    runs = {name: lambda program=program: jax.block_until_ready(program(a, b)) for name, program in compiled.items()}
    return alternate(runs, repeats)


def main(repeats: int = 15, out: Path | None = None) -> None:
    """Measure every size, print a table, and write it to `out`."""
    results = []
    for d, p in SIZES:
        for t in tqdm(POSITIONS, desc=f"{d} × {p}", leave=False):
            times = _times(t, d, p, repeats)
            results.append({"d": d, "p": p, "t": t, **{f"{name} ms": ms for name, ms in times.items()}})
        rows = [row for row in results if (row["d"], row["p"]) == (d, p)]
        faster = [row["t"] for row in rows if row["gram ms"] < row["instantiate ms"]]
        ours = max((t for t in POSITIONS if products.product_form(_product(t, d, p)) == "gram"), default=0)
        print(f"{d} × {p}: Gram is faster at T = {faster}; by operations T < {d * p // (d + p)}, by memory "
              f"T ≤ {int((d * p / 2) ** 0.5)}, the engine takes it up to T = {ours}")  # fmt: skip
        for row in rows:
            print("   " + "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key not in "dp"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "repeats": repeats, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
