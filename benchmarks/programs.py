"""The compiled programs of a measurement, and what they move between devices."""

import math
import re
from typing import Any, NamedTuple

from cg_jax import measure_coherence, stream
from cg_jax.metrics import Coherence

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(program: Any) -> list[tuple[str, int]]:
    """[(kind, bytes of what it yields on one device)] of the collective operations of a compiled program."""
    operations = []
    for result, kind in _COLLECTIVE.findall(program.as_text()):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        size = sum(_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)
        operations.append((kind, size))
    return operations


def moved(program: Any, *kinds: str) -> int:
    """Bytes that the collectives of these kinds (all, if none is named) yield on one device."""
    return sum(size for kind, size in collectives(program) if not kinds or kind in kinds)


class Programs(NamedTuple):
    """The result of a measurement, and the programs that it ran: one for every batch, one at the end."""

    result: Coherence
    batch: Any
    end: Any


def of_measurement(*arguments: Any, **options: Any) -> Programs:
    """The programs of `cg_jax.measure_coherence(*arguments, **options)`."""
    compiled, step, finish = {}, stream.step, stream.finish

    def noting(name: str, f: Any) -> Any:
        def call(*given: Any) -> Any:
            if name not in compiled:
                compiled[name] = f.lower(*given).compile()
            return f(*given)

        return call

    stream.step, stream.finish = noting("batch", step), noting("end", finish)
    try:
        result = measure_coherence(*arguments, **options)
    finally:
        stream.step, stream.finish = step, finish
    return Programs(result, compiled["batch"], compiled["end"])
