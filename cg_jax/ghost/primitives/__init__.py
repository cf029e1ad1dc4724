"""The table of primitives: one entry for each, with all that the engine knows about it.

`base` defines an entry. To support another primitive, add one entry in the file of its family: `matmul`, `convolution`,
`lookups`, `arithmetic`, `arranging`, `calls`. A primitive whose name differs between JAX releases has an entry under
each name.
"""

from cg_jax.ghost.primitives import arithmetic, arranging, calls, convolution, lookups, matmul
from cg_jax.ghost.primitives.base import (
    TABLE,
    Primitive,
    Read,
    Rule,
    RuleBuilder,
    Static,
    Step,
    add,
    named,
    of,
    operations,
)

for _family in (matmul, convolution, lookups, arithmetic, arranging, calls):
    add(_family.ENTRIES)

__all__ = [
    "TABLE",
    "Primitive",
    "Read",
    "Rule",
    "RuleBuilder",
    "Static",
    "Step",
    "named",
    "of",
    "operations",
]
