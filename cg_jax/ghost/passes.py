"""What one pass over a batch left: all that is known of single examples' gradients is a function of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from cg_jax import trees
from cg_jax._loss import LossFn
from cg_jax.ghost.backward import Traces
from cg_jax.ghost.capture import Program

PyTree = Any
# The parameter's index among the differentiable leaves → what was asked for.
ByParameter = dict[int, jax.Array]


class Tensors(Protocol):
    """Some parameters, and how their statistics follow from a pass; each parameter belongs to one such object."""

    def sq_norms(self, of: "Pass") -> ByParameter:
        """‖gᵢ‖² [B] of each parameter, in the accumulator dtype."""
        ...

    def sums(self, of: "Pass") -> ByParameter:
        """Σ gᵢ of each parameter, in the accumulator dtype."""
        ...

    def weighted_sums(self, of: "Pass", weights: jax.Array) -> ByParameter:
        """Σ wᵢ gᵢ of each parameter, with any real weights [B]."""
        ...

    def along(self, of: "Pass", direction: ByParameter) -> list[jax.Array]:
        """⟨gᵢ, v⟩ [B], of each parameter or of all together, v in the accumulator dtype."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """What went in and what came back at every use of a parameter, for every example.

    gᵢ is the gradient of example i's loss; of a row that is masked it is zero.
    """

    program: Program
    env: dict[Any, Any]  # the values of all that does not depend on the example
    loss: LossFn  # loss(kept, example) → (loss, aux)
    kept: PyTree  # the differentiable parameters
    batch: PyTree
    keep: jax.Array | None  # [B], 0 where masked
    losses: jax.Array  # [B]
    aux: PyTree  # [B, ...], or None
    traces: Traces
    inside: dict[int, tuple[jax.Array, jax.Array]]  # of tensors whose norms were taken inside: (‖gᵢ‖² [B], Σ gᵢ)
    tensors: tuple[Tensors, ...]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), done once for each key: where one computation yields norms and sums, it is shared.

        Not for what is computed in a branch or a body of its own, whose values must not leave it.
        """
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def dtype(self, parameter: int) -> Any:
        """The accumulator dtype of a parameter."""
        return trees.accumulator_dtype(jax.tree.leaves(self.kept)[parameter].dtype)
