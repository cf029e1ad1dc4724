"""What a compiled program moves between devices."""

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(compiled):
    """[(kind, bytes of what it yields on one device)] of the collective operations of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if match and match[2].removesuffix("-start") in _KINDS:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)
            found.append((match[2].removesuffix("-start"), size))
    return found


def moved(compiled, *kinds):
    """Bytes that the collectives of these kinds (all, if none is named) yield on one device."""
    return sum(size for kind, size in collectives(compiled) if not kinds or kind in kinds)
