"""What an estimator of coherence is: how a batch is summed up, and what follows from the sums."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._loss import LossFn
from cg_jax.metrics import Coherence
from cg_jax.moments import GradMoments

PyTree = Any


class Problem(NamedTuple):
    """What every batch is measured with."""

    loss_fn: LossFn  # loss_fn(params, example), or of a batch
    params: PyTree
    arrays: PyTree  # the estimator's own, of `Estimator.split`
    has_aux: bool  # loss_fn returns (loss, aux); aux is dropped
    axis: str | None  # the axis of the shard_map that this runs in, if any


class OfRows(NamedTuple):
    """What a batch says of each of its rows, [B]."""

    is_bad: jax.Array  # whether its loss or gradient is not finite
    values: jax.Array  # what `Estimator.revisit` needs of it, such as ‖gᵢ‖²


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """How coherence is estimated: `init`, `update` and `finalize` of a state, a NamedTuple of sums.

    The state begins at zero. `of_batch` sums up a batch, and `update` adds its sums to the state. Estimators
    `by_example` see one shard of a batch on every device, and the sums of all devices are added up at the end: their
    `update` is addition. The others see a whole batch.

    Subclasses are frozen dataclasses, whose fields are their options. `register_estimator` gives a subclass its name.
    """

    by_example: ClassVar[bool] = True
    """loss_fn is the loss of one example; else loss_fn(params, batch) is the mean loss of a batch without padding."""
    flags_examples: ClassVar[bool] = False
    """`OfRows.is_bad` tells single examples apart, so that a batch without the bad ones is worth another try."""
    like_params: ClassVar[tuple[str, ...]] = ("sum_grads",)
    """The fields of the state that are like the differentiable parameters, and sharded as they are."""

    def split(self) -> tuple[Self, PyTree]:
        """(what programs are compiled for, arrays that they take): options that compile nothing again are arrays."""
        return self, None

    @property
    def revisits(self) -> bool:
        """Whether the data is read a second time, by `revisit`."""
        return False

    @abc.abstractmethod
    def of_batch(self, problem: Problem, rows: PyTree, ids: jax.Array) -> tuple[Any, OfRows]:
        """(the sums of a batch, what it says of its rows), given rows [B, ...] and their ids [B], −1 where masked."""

    def init(self, sums: Any) -> Any:
        """The shapes of a state, given the shapes of the sums of one batch."""
        return sums

    def update(self, state: Any, sums: Any) -> Any:
        """The state with the sums of one more batch. Estimators by example add."""
        return trees.add(state, sums)

    @abc.abstractmethod
    def moments(self, state: Any) -> GradMoments:
        """The moments that the state holds or estimates, so that all ratios follow from moments."""

    @abc.abstractmethod
    def finalize(self, state: Any, num_skipped: Any) -> Coherence:
        """The coherence that follows from the sums of all batches."""

    def revisit(self, problem: Problem, measured: PyTree, rows: PyTree, ids: jax.Array, values: jax.Array) -> jax.Array:
        """A sum over a batch, given `measured` = (mean gradient, α, mean ‖gᵢ‖²) and the `OfRows.values`.

        `conclude` makes a standard error of the sum over all batches.
        """
        raise NotImplementedError

    def conclude(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """alpha_stderr, given the sum of `revisit` over all batches and the number of examples."""
        raise NotImplementedError


def all_finite(*values: PyTree) -> jax.Array:
    """Whether all values are finite; their sum may not be."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values)]).all()


def of_few(error: jax.Array, number: jax.Array) -> jax.Array:
    """A standard error that was estimated from `number` squares: their root is too small on average, for normal numbers
    by √(2/n) Γ((n + 1)/2) / Γ(n/2), which is 0.80 for one square and 0.92 for three.
    """
    n = number.astype(error.dtype)
    gammas = jax.scipy.special.gammaln((n + 1) / 2) - jax.scipy.special.gammaln(n / 2)
    return error / (jnp.sqrt(2 / n) * jnp.exp(gammas))


def where_squares_fit(size: jax.Array, error: jax.Array) -> jax.Array:
    """`error`, NaN where squares of numbers of that size leave the range of the dtype."""
    limits = jnp.finfo(size.dtype)
    low, high = limits.tiny**0.5 * 100, limits.max**0.5 / 100
    return jnp.where((size > low) & (size < high), error, jnp.nan)
