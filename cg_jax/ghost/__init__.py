"""The one-pass engine: exact per-example gradient statistics of any JAX function, no per-example gradient built.

`capture` traces the loss and finds where parameters meet values of the example, `rules` (`product`, `convolution`,
`tables`) says how the squared norm of a gradient follows at such a place, `plan` chooses for each tensor, `backward`
runs the one backward pass, `engine` draws norms and sums from what it leaves (by `products` and `chunks`); `instances`
is the fallback. docs/engine.md explains.
"""

from cg_jax.ghost.engine import statistics
from cg_jax.ghost.explanation import Explanation, TensorPlan, explain
from cg_jax.ghost.product import Product
from cg_jax.ghost.rules import RULES, Norm, register_rule

__all__ = ["RULES", "Explanation", "Norm", "Product", "TensorPlan", "explain", "register_rule", "statistics"]
