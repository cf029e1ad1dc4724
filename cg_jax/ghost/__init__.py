"""The one-pass engine: exact per-example gradient statistics of any JAX function, no per-example gradient built.

`capture` traces the loss and finds where parameters meet values of the example, `rules` says how the squared norm of a
gradient follows at such a place, `plan` chooses for each tensor, `engine` runs it.
"""

from cg_jax.ghost.engine import statistics

__all__ = ["statistics"]
