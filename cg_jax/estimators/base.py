"""The base class of estimators of coherence: the sums of a batch, and the coherence that follows from them."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from cg_jax import trees
from cg_jax._loss import LossFn
from cg_jax._types import PyTree
from cg_jax.metrics import Coherence, coherence
from cg_jax.moments import GradMoments


class Problem(NamedTuple):
    """The inputs that all batches share."""

    loss_fn: LossFn  # loss_fn(params, example), or of a batch
    params: PyTree
    arrays: PyTree  # the estimator's own, from `Estimator.split`
    has_aux: bool  # whether loss_fn returns (loss, aux); aux is dropped
    axis: str | None  # the axis of the shard_map that this runs in, if any


class OfRows(NamedTuple):
    """The results for each row of a batch, [B]."""

    is_bad: jax.Array  # whether its loss or gradient is not finite
    values: jax.Array  # the value that `Estimator.revisit` needs, such as ‖gᵢ‖²


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """An estimator of coherence: `init`, `update` and `finalize` of a state, a NamedTuple of sums.

    The state starts at zero. `of_batch` computes the sums of a batch, and `update` adds them to the state. An estimator
    with `by_example` receives one shard of a batch on every device. The sums of all devices are added at the end, so
    its `update` is addition. Any other estimator receives a whole batch.

    Subclasses are frozen dataclasses. Their fields are their options. `register_estimator` gives a subclass its name.
    """

    by_example: ClassVar[bool] = True
    """Whether loss_fn is the loss of one example. If not, loss_fn(params, batch) is the mean loss of a whole batch."""
    flags_examples: ClassVar[bool] = False
    """Whether `OfRows.is_bad` marks single examples, so that a batch can be repeated without the bad ones."""
    like_params: ClassVar[tuple[str, ...]] = ("sum_grads",)
    """The fields of the state with the structure of the differentiable parameters. They are sharded like them."""

    def split(self) -> tuple[Self, PyTree]:
        """(static part, arrays). Options that need no new program are arrays; programs are compiled for the rest."""
        return self, None

    @property
    def revisits(self) -> bool:
        """Whether the data is read a second time, by `revisit`."""
        return False

    @abc.abstractmethod
    def of_batch(self, problem: Problem, rows: PyTree, ids: jax.Array) -> tuple[Any, OfRows]:
        """(the sums of a batch, the results of its rows), given rows [B, ...] and their ids [B], −1 where masked."""

    def init(self, sums: Any) -> Any:
        """The shapes of the state, given the shapes of the sums of one batch."""
        return sums

    def update(self, state: Any, sums: Any) -> Any:
        """The state with the sums of one more batch added."""
        return trees.add(state, sums)

    @abc.abstractmethod
    def moments(self, state: Any) -> GradMoments:
        """The moments that the state holds or estimates. All ratios follow from them."""

    def finalize(self, state: Any, num_skipped: Any) -> Coherence:
        """The coherence that follows from the sums of all batches."""
        return coherence(self.moments(state), num_skipped=num_skipped)

    def revisit(self, problem: Problem, measured: PyTree, rows: PyTree, ids: jax.Array, values: jax.Array) -> jax.Array:
        """A sum over a batch, given `measured` = (mean gradient, α, mean ‖gᵢ‖²) and the `OfRows.values`.

        `conclude` turns the sum over all batches into a standard error.
        """
        raise NotImplementedError

    def conclude(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """alpha_stderr from the sum of `revisit` over all batches and the number of examples."""
        raise NotImplementedError


def all_finite(*values: PyTree) -> jax.Array:
    """Whether all values are finite. Their sum may still be non-finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values)]).all()


def of_few(error: jax.Array, number: jax.Array) -> jax.Array:
    """Correct a standard error that was estimated from `number` squares.

    The root of their mean is too small on average. For normal numbers the factor is √(2/n) Γ((n + 1)/2) / Γ(n/2), which
    is 0.80 for one square and 0.92 for three.
    """
    n = number.astype(error.dtype)
    gammas = jax.scipy.special.gammaln((n + 1) / 2) - jax.scipy.special.gammaln(n / 2)
    return error / (jnp.sqrt(2 / n) * jnp.exp(gammas))


def where_squares_fit(size: jax.Array, error: jax.Array) -> jax.Array:
    """`error`, or NaN if squares of numbers of this size leave the range of the dtype."""
    limits = jnp.finfo(size.dtype)
    low, high = limits.tiny**0.5 * 100, limits.max**0.5 / 100
    return jnp.where((size > low) & (size < high), error, jnp.nan)
