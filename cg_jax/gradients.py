"""The per-example gradients of one batch, by the engine or materialised, as an object that answers for them."""

from typing import Protocol

import jax
import jax.numpy as jnp

from cg_jax import _compat, ghost, trees
from cg_jax._loss import LossFn, checked_pair, each_devices_own, require_dependence
from cg_jax._types import PyTree

METHODS = ("ghost", "vmap")


class ExampleGradients(Protocol):
    """The gradients gᵢ of the examples of a batch. They are zero for masked rows."""

    @property
    def losses(self) -> jax.Array:
        """ℓᵢ, [B]. Masked rows hold anything."""
        ...

    @property
    def aux(self) -> PyTree:
        """The auxiliary values of loss_fn, [B, ...], or None."""
        ...

    def sq_norms(self) -> PyTree:
        """‖gᵢ‖² [B] of each tensor, in the accumulator dtype."""
        ...

    def sums(self) -> PyTree:
        """Σ gᵢ, like the parameters, in the accumulator dtype."""
        ...

    def weighted_sums(self, weights: PyTree) -> PyTree:
        """Σ wᵢ gᵢ, like the parameters, in the accumulator dtype. Weights [B], or [B] for each tensor."""
        ...

    def alignments(self, direction: PyTree) -> jax.Array:
        """⟨gᵢ, v⟩ [B], v like the parameters."""
        ...

    def mutual_alignments(self, weights: jax.Array | None) -> jax.Array:
        """⟨gᵢ, Σ wⱼ gⱼ⟩ [B], weights [B], or None for ⟨gᵢ, Σ gⱼ⟩."""
        ...

    def without(self, keep: jax.Array) -> "ExampleGradients":
        """The same gradients, but zero for rows where `keep` is False, even if they are not finite."""
        ...


class _ByEngine:
    """Gradients by one pass of the engine."""

    def __init__(self, of: ghost.Pass) -> None:
        self.of, self.losses, self.aux = of, of.losses, of.aux

    def sq_norms(self) -> PyTree:
        return ghost.sq_norms(self.of)

    def sums(self) -> PyTree:
        return ghost.sums(self.of)

    def weighted_sums(self, weights: PyTree) -> PyTree:
        return ghost.weighted_sums(self.of, weights)

    def alignments(self, direction: PyTree) -> jax.Array:
        return ghost.alignments(self.of, direction)

    def mutual_alignments(self, weights: jax.Array | None) -> jax.Array:
        return ghost.mutual_alignments(self.of, weights)

    def without(self, keep: jax.Array) -> "_ByEngine":
        return _ByEngine(ghost.without_rows(self.of, keep))


class _Materialised:
    """Gradients by vmap(grad), of size B × parameters: the plain reference."""

    def __init__(self, losses: jax.Array, grads: PyTree, aux: PyTree) -> None:
        self.losses, self.grads, self.aux = losses, grads, aux

    def sq_norms(self) -> PyTree:
        return trees.row_sq_norms(self.grads)

    def sums(self) -> PyTree:
        return trees.row_sums(self.grads)

    def weighted_sums(self, weights: PyTree) -> PyTree:
        if isinstance(weights, jax.Array):
            weights = jax.tree.map(lambda _: weights, self.grads)

        def total(w: jax.Array, rows: jax.Array) -> jax.Array:
            return jnp.einsum("b,b...->...", w.astype(rows.dtype), rows, precision="highest")

        return jax.tree.map(total, weights, self.grads)

    def alignments(self, direction: PyTree) -> jax.Array:
        rows = _compat.varying_axes(self.losses)
        parts = jax.tree.map(lambda g, v: _compat.sum_over(trees.row_inner(g, v), rows), self.grads, direction)
        return trees.total(parts)

    def mutual_alignments(self, weights: jax.Array | None) -> jax.Array:
        return self.alignments(self.sums() if weights is None else self.weighted_sums(weights))

    def without(self, keep: jax.Array) -> "_Materialised":
        return _Materialised(self.losses, ghost.selected(keep, self.grads), self.aux)


def losses_and_grads(
    loss_fn: LossFn, params: PyTree, batch: PyTree, has_aux: bool = False
) -> tuple[jax.Array, PyTree, PyTree]:
    """(losses [B], gradients like params of [B, *param], auxiliary values [B, ...]), by vmap(value_and_grad)."""
    params = each_devices_own(loss_fn, params, batch, has_aux)
    kept, rest = trees.partition(params)
    require_dependence(loss_fn, params, batch, has_aux)
    pair = checked_pair(loss_fn, rest, has_aux=has_aux)
    (losses, aux), grads = jax.vmap(jax.value_and_grad(pair, has_aux=True), in_axes=(None, 0))(kept, batch)
    return losses, grads, aux


def example_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    method: str,
    max_bytes: int | None = None,
    has_aux: bool = False,
    norms_inside: bool = False,
) -> ExampleGradients:
    """The gradients of a batch by a method. Masked rows are replaced by a valid row and have no gradient.

    With `norms_inside` only norms and sums may be asked for. If all rows are masked, sums are arbitrary.
    """
    if mask is not None:
        batch = fill_masked(batch, mask)
    if method == "ghost":
        params = each_devices_own(loss_fn, params, batch, has_aux)
        weights = None if mask is None else mask.astype(jnp.float32)
        return _ByEngine(ghost.one_pass(loss_fn, params, batch, weights, max_bytes, has_aux, norms_inside))
    losses, grads, aux = losses_and_grads(loss_fn, params, batch, has_aux)
    of = _Materialised(losses, trees.accumulate(grads), aux)
    return of if mask is None else of.without(mask)


def fill_masked(batch: PyTree, mask: jax.Array) -> PyTree:
    """Replace each masked row by the first valid one.

    A zero or garbage row could turn its zero weight into 0·∞ = NaN inside the derivative of the loss.
    """
    return ghost.filled(batch, mask)


def zero_where(condition: jax.Array, tree: PyTree) -> PyTree:
    """Zeros where `condition` (a scalar, or [B] for leaves [B, ...]) holds. Random keys do not change."""

    def zeroed(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        shaped = (
            condition.reshape(condition.shape + (1,) * (leaf.ndim - condition.ndim)) if condition.ndim else condition
        )
        return jnp.where(shaped, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(zeroed, tree)
