"""The result of one pass over a batch. Every per-example gradient statistic is a function of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from cg_jax import trees
from cg_jax._loss import LossFn
from cg_jax._types import PyTree
from cg_jax.ghost.backward import Traces
from cg_jax.ghost.capture import Program

# Index of a parameter among the differentiable leaves → requested value.
ByParameter = dict[int, jax.Array]


class Tensors(Protocol):
    """Computes the statistics of some parameters from a pass. Each parameter belongs to one such object."""

    def sq_norms(self, of: "Pass") -> ByParameter:
        """‖gᵢ‖² [B] of each parameter, in the accumulator dtype."""
        ...

    def sums(self, of: "Pass") -> ByParameter:
        """Σ gᵢ of each parameter, in the accumulator dtype."""
        ...

    def weighted_sums(self, of: "Pass", weights: ByParameter) -> ByParameter:
        """Σ wᵢ gᵢ of each parameter, with any real weights [B] for each."""
        ...

    def along(self, of: "Pass", direction: ByParameter) -> list[jax.Array]:
        """⟨gᵢ, v⟩ [B], for each parameter or summed over all, with v in the accumulator dtype."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """The inputs and cotangents at every use of a parameter, for every example.

    gᵢ is the gradient of the loss of example i. It is zero for a masked row.
    """

    program: Program
    env: dict[Any, Any]  # the values that do not depend on the example
    loss: LossFn  # loss(kept, example) → (loss, aux)
    kept: PyTree  # the differentiable parameters
    batch: PyTree
    keep: jax.Array | None  # [B], 0 where masked
    losses: jax.Array  # [B]
    aux: PyTree  # [B, ...], or None
    traces: Traces
    inside: dict[int, tuple[jax.Array, jax.Array]]  # (‖gᵢ‖² [B], Σ gᵢ) of tensors whose norms are taken inside
    tensors: tuple[Tensors, ...]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), called once for each key, so that norms and sums share one computation.

        Do not use it inside a branch or a body, whose values must not leave it.
        """
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def dtype(self, parameter: int) -> Any:
        """The accumulator dtype of a parameter."""
        return trees.accumulator_dtype(jax.tree.leaves(self.kept)[parameter].dtype)
