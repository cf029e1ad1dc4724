"""Coherence of a whole data set: batches of one shape are streamed through one compiled step."""

import contextlib
import functools
import itertools
import types
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _validate, trees
from cg_jax.metrics import Coherence, coherence
from cg_jax.moments import GradMoments, merge
from cg_jax.per_example import LossFn, checked_loss
from cg_jax.statistics import METHODS, batch_statistics, to_moments

PyTree = Any

NONFINITE = ("raise", "skip", "propagate")


class _Batch(NamedTuple):
    """One batch, padded to the common size."""

    start: int  # index of its first example in the data set
    rows: PyTree  # leaves [batch_size, ...]
    mask: np.ndarray  # boolean [batch_size], False where padded


def _pad(batch: PyTree, start: int, size: int, batch_size: int) -> _Batch:
    """`batch` of `size` rows, its last row repeated up to `batch_size`, so that one shape compiles."""
    mask = np.arange(batch_size) < size
    if size < batch_size:
        rows = np.minimum(np.arange(batch_size), size - 1)
        batch = jax.tree.map(lambda leaf: leaf[rows], batch)
    return _Batch(start, batch, mask)


def _array_batches(data: PyTree, size: int, batch_size: int) -> Iterator[_Batch]:
    """The batches of arrays with leading axis `size`."""
    for start in range(0, size, batch_size):
        stop = min(start + batch_size, size)
        rows = jax.tree.map(lambda leaf, lo=start, hi=stop: leaf[lo:hi], data)
        yield _pad(rows, start, stop - start, batch_size)


def _iterable_batches(data: Iterable[PyTree], batch_size: int) -> Iterator[_Batch]:
    """The batches of an iterable of batches, each of at most `batch_size` rows."""
    start = 0
    for batch in data:
        size = _validate.leading_axis("batch", batch)
        if size > batch_size:
            raise ValueError(f"Expected batches of at most batch_size={batch_size} examples, got one of {size}.")
        yield _pad(batch, start, size, batch_size)
        start += size
    if start == 0:
        raise ValueError("Expected data to hold at least one batch, got an empty iterable.")


def _batches(data: PyTree, batch_size: int) -> tuple[Iterator[_Batch], int | None]:
    """(the batches, their number where it is known)."""
    if _is_arrays(data):
        size = _validate.leading_axis("data", data)
        return _array_batches(data, size, batch_size), -(-size // batch_size)
    if not isinstance(data, Iterable):
        raise TypeError(f"Expected data to be a pytree of arrays or an iterable of batches, got {type(data).__name__}.")
    return _iterable_batches(data, batch_size), len(data) if isinstance(data, Sized) else None


def _is_arrays(data: Any) -> bool:
    """Whether `data` is a pytree of arrays; a list is none: it means batches."""
    if isinstance(data, list | Iterator):
        return False
    leaves = jax.tree.leaves(data)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(
    loss_fn: LossFn, method: str, guard: bool, params: PyTree, moments: GradMoments, batch: PyTree, mask: jax.Array
) -> tuple[GradMoments, jax.Array]:
    """(moments with the batch merged in, which rows are not finite). With `guard`, a batch with any is left out."""
    statistics = batch_statistics(loss_fn, params, batch, mask, method)
    bad = ~jnp.isfinite(trees.total(statistics.sq_norms) + statistics.losses)
    merged = merge(moments, to_moments(statistics, mask.sum()))
    if guard:
        merged = jax.tree.map(lambda new, old: jnp.where(bad.any(), old, new), merged, moments)
    return merged, bad


@functools.partial(jax.jit, static_argnums=0)
def _zeros(loss_fn: LossFn, params: PyTree, batch: PyTree) -> GradMoments:
    """The moments of no examples, in the dtypes that `_step` will add."""
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    kept, rest = trees.partition(params)
    return GradMoments.zeros(params, jax.eval_shape(checked_loss(loss_fn, rest), kept, example).dtype)


def _raise_nonfinite(bad: np.ndarray, batch: _Batch) -> None:
    first = batch.start + int(np.argmax(bad))
    raise FloatingPointError(
        f"Expected finite losses and gradients, got {int(bad.sum())} of {int(batch.mask.sum())} examples in one batch "
        f"that are not, the first at index {first}. nonfinite='skip' leaves such examples out and counts them; "
        "nonfinite='propagate' lets them through."
    )


@contextlib.contextmanager
def _bar(progress: bool, total: int | None) -> Iterator[Any]:
    """A progress bar over batches, or what stands in for one."""
    if not progress:
        yield types.SimpleNamespace(update=lambda: None)
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True draws its bar with tqdm: pip install tqdm.") from None
    with tqdm(total=total, desc="coherence", unit="batch", leave=False) as bar:
        yield bar


def measure_coherence(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree | Iterable[PyTree],
    *,
    batch_size: int,
    method: str = "ghost",
    nonfinite: str = "raise",
    progress: bool = False,
) -> Coherence:
    """Coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of all m examples of `data` at `params`, streamed in batches.

    The result does not depend on batch_size but for rounding. One program is compiled for each (loss_fn, shapes): pass
    the same function object again, for a fresh lambda compiles again.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example.
        params: Any pytree of arrays; integer leaves are held fixed.
        data: A pytree (tuple, dict, …) of host or device arrays that share a leading axis m, any m; or an iterable (a
            list, a generator, a loader) of batches, each such a pytree of at most batch_size rows.
        batch_size: Examples in one batch; a shorter batch is padded by repeating a row, and the padding is masked.
        method: "ghost", or "vmap" for the plain reference.
        nonfinite: What a loss or gradient that is not finite does. "raise": FloatingPointError with how many and the
            first index. "skip": the example is left out and counted in `num_skipped`. "propagate": the result is NaN.
        progress: Draw a bar (needs tqdm).

    Returns:
        A `Coherence`; its scalars are arrays on the device.

    Raises:
        ValueError: batch_size < 1, unknown method or nonfinite, empty data, leading axes that disagree, a batch larger
            than batch_size, or a loss that does not depend on params.
        TypeError: loss_fn does not return a real scalar, or data is no pytree of arrays and cannot be iterated.
        FloatingPointError: With nonfinite="raise".

    References:
        Chatterjee & Zielinski, On the Generalization Mystery in Deep Learning, 2022, https://arxiv.org/abs/2203.10036.

    Examples:
        >>> import numpy as np, cg_jax as cg
        >>> def loss_fn(w, x):
        ...     return 0.5 * (w - x) ** 2
        >>> result = cg.measure_coherence(loss_fn, 0.0, np.array([1.0, 4.0, 7.0], np.float32), batch_size=2)
        >>> print(f"α = {result.alpha:.4f} over {result.count} examples")
        α = 0.7273 over 3 examples
    """
    batch_size = _validate.at_least("batch_size", batch_size, 1)
    _validate.one_of("method", method, METHODS)
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    batches, number = _batches(data, batch_size)
    guard = nonfinite != "propagate"
    first = next(batches)
    moments, skipped = _zeros(loss_fn, params, first.rows), 0
    # Flags are read one batch late, so that the device computes while the host cuts the next batch.
    pending: list[tuple[_Batch, jax.Array]] = []
    with _bar(progress, number) as bar:
        for batch in itertools.chain([first], batches):
            moments, bad = _step(loss_fn, method, guard, params, moments, batch.rows, batch.mask)
            pending = [*pending, (batch, bad)] if guard else []
            if len(pending) > 1:
                moments, more = _settle(loss_fn, method, nonfinite, params, moments, *pending.pop(0))
                skipped += more
            bar.update()
        for batch, bad in pending:
            moments, more = _settle(loss_fn, method, nonfinite, params, moments, batch, bad)
            skipped += more
    return _finish(moments, skipped)


_finish = jax.jit(lambda moments, skipped: coherence(moments, num_skipped=skipped))


def _settle(
    loss_fn: LossFn,
    method: str,
    nonfinite: str,
    params: PyTree,
    moments: GradMoments,
    batch: _Batch,
    flags: jax.Array,
) -> tuple[GradMoments, int]:
    """(moments, examples skipped), once the flags of a batch that was left out for them are dealt with."""
    skipped = 0
    mask, bad = batch.mask, np.asarray(flags)
    while bad.any():
        if nonfinite == "raise":
            _raise_nonfinite(bad, batch)
        skipped += int(bad.sum())
        mask = mask & ~bad
        moments, again = _step(loss_fn, method, True, params, moments, batch.rows, mask)
        bad = np.asarray(again)
    return moments, skipped
