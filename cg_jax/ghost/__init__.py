"""The one-pass engine: exact per-example gradient statistics of any JAX function, without per-example gradients.

`primitives` is the table of primitives. `capture` traces the loss and finds the sites where parameters meet values of
the example and gradients pass (`activity`). `rules` gives the squared norm of a gradient at a site (`product`, `norm`).
`uses` (`views`, `factors`) maps it back to the parameter. `plan` and `cost` choose a method for each tensor. `backward`
runs the one backward pass (`inline`: with norms inside it). `engine` returns a `Pass`, of which norms, sums, weighted
sums and alignments are functions (`tensors`, `scalars`, `products`, `chunks`). `columns` cuts gradients into blocks of
coordinates. `instances` is the fallback. See docs/engine.md.
"""

from cg_jax.ghost.columns import by_columns
from cg_jax.ghost.engine import (
    alignments,
    filled,
    mutual_alignments,
    one_pass,
    sq_norms,
    sums,
    weighted_sums,
    without_rows,
)
from cg_jax.ghost.explanation import Explanation, TensorPlan, explain
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.passes import Pass
from cg_jax.ghost.product import Product
from cg_jax.ghost.rules import Registration, register_rule
from cg_jax.ghost.tensors import selected

__all__ = [
    "Explanation",
    "Norm",
    "Pass",
    "Product",
    "Registration",
    "TensorPlan",
    "alignments",
    "by_columns",
    "explain",
    "filled",
    "mutual_alignments",
    "one_pass",
    "register_rule",
    "selected",
    "sq_norms",
    "sums",
    "weighted_sums",
    "without_rows",
]
