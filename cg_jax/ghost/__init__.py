"""The one-pass engine: exact per-example gradient statistics of any JAX function, no per-example gradient built.

`primitives` is the table of all that is known of each primitive. `capture` traces the loss and finds where parameters
meet values of the example, as far as gradients pass (`activity`). `rules` says how the squared norm of a gradient
follows at such a place (`product`, `norm`); `uses` (`views`, `factors`) brings it back to the parameter. `plan` and
`cost` choose for each tensor, `backward` runs the one backward pass (`inline`: norms inside it), and `engine` makes a
`Pass` of what it leaves, of which norms, sums, weighted sums and alignments are functions (`tensors`, `scalars`;
`products`, `chunks`). `instances` is the fallback. docs/engine.md explains.
"""

from cg_jax.ghost.engine import alignments, one_pass, sq_norms, sums, weighted_sums
from cg_jax.ghost.explanation import Explanation, TensorPlan, explain
from cg_jax.ghost.norm import Norm
from cg_jax.ghost.passes import Pass
from cg_jax.ghost.product import Product
from cg_jax.ghost.rules import Registration, register_rule

__all__ = [
    "Explanation",
    "Norm",
    "Pass",
    "Product",
    "Registration",
    "TensorPlan",
    "alignments",
    "explain",
    "one_pass",
    "register_rule",
    "sq_norms",
    "sums",
    "weighted_sums",
]
