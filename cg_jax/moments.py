"""GradMoments, the sufficient statistic of coherence, and `merge`, which combines two."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat, trees
from cg_jax._types import PyTree


class GradMoments(NamedTuple):
    """Sums over the per-example gradients gᵢ of a set of examples, all at one point of parameter space.

    It holds sums and no ratios, so that sets can be merged: see `merge`, and `cg_jax.coherence` for the ratios. Leaves
    are float32 (float64 if the parameters are). Integer leaves of the parameters are None here.
    """

    count: jax.Array  # number of examples, int32 scalar
    sum_losses: jax.Array  # Σ ℓᵢ, scalar
    sum_grads: PyTree  # S = Σ gᵢ, like the parameters
    sum_sq_norms: PyTree  # Q = Σ ‖gᵢ‖², one scalar for each tensor of the parameters

    def __add__(self, other: Any) -> "GradMoments":  # type: ignore[override]
        """`merge`, instead of the concatenation of tuples."""
        return merge(self, other)

    @classmethod
    def zeros(
        cls, params: PyTree, loss_dtype: Any = jnp.float32, *, axis_name: str | tuple[str, ...] | None = None
    ) -> "GradMoments":
        """The moments of no examples: the neutral element of `merge`, and the start of a loop over batches.

        Args:
            params: The parameters (arrays or `jax.ShapeDtypeStruct`s) whose gradients are summed.
            loss_dtype: The dtype of the losses.
            axis_name: Inside `jax.shard_map`, the axes that the examples are sharded over. Each device can then add the
                moments of its own examples in a scan, whose carry must keep its type. None means all axes of the
                shard_map.

        Examples:
            >>> import functools, jax, jax.numpy as jnp, cg_jax as cg
            >>> moments = cg.grad_moments(lambda w, x: 0.5 * (w - x) ** 2)
            >>> def step(total, batch):
            ...     return cg.merge(total, moments(0.0, batch)), None
            >>> total, _ = jax.lax.scan(step, cg.GradMoments.zeros(0.0), jnp.array([[1.0, 4.0], [7.0, 0.0]]))
            >>> int(total.count), float(total.sum_grads)
            (4, -12.0)
        """
        kept, _ = trees.partition(params)
        axes = _compat.tracked_axes()
        if axis_name is not None:
            axes &= {axis_name} if isinstance(axis_name, str) else set(axis_name)

        def zero(shape: tuple[int, ...], dtype: Any, *like: Any) -> jax.Array:
            varying = axes | _compat.varying_axes(*like)
            return _compat.vary(jnp.zeros(shape, trees.accumulator_dtype(dtype)), varying)

        return cls(
            count=_compat.vary(jnp.zeros((), jnp.int32), axes),
            sum_losses=zero((), loss_dtype),
            sum_grads=jax.tree.map(lambda p: zero(np.shape(p), jnp.result_type(p), p), kept),
            sum_sq_norms=jax.tree.map(lambda p: zero((), jnp.result_type(p), p), kept),
        )


def require_moments(name: str, value: Any) -> None:
    """TypeError unless `value` is a GradMoments."""
    if isinstance(value, GradMoments):
        return
    remedy = (
        "call what grad_moments(loss_fn) returns" if callable(value) else "take grad_moments(loss_fn)(params, batch)"
    )
    raise TypeError(f"Expected {name} to be a GradMoments, got {type(value).__name__}; {remedy}.")


def merge(a: GradMoments, b: GradMoments) -> GradMoments:
    """Moments of the union of two disjoint sets of examples: the sum, field by field.

    `merge` is associative and commutative up to rounding. `GradMoments.zeros(params)` is neutral. Both arguments must
    be moments at the same parameters.

    Raises:
        TypeError: a or b is not a GradMoments.
        ValueError: The two belong to parameters of different structure.

    Examples:
        >>> import jax, cg_jax as cg
        >>> moments = cg.grad_moments(lambda w, x: w * x)
        >>> both = cg.merge(moments(1.0, jax.numpy.array([1.0, 4.0])), moments(1.0, jax.numpy.array([7.0])))
        >>> int(both.count), float(both.sum_grads), float(both.sum_sq_norms)
        (3, 12.0, 66.0)
    """
    require_moments("a", a)
    require_moments("b", b)
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            "Expected moments of the same parameters, got structures "
            f"{jax.tree.structure(a.sum_grads)} and {jax.tree.structure(b.sum_grads)}."
        )
    return trees.add(a, b)
