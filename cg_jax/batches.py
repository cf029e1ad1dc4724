"""Batches of one shape for a measurement, from host arrays, device arrays or an iterable."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from cg_jax import _validate
from cg_jax._data import is_arrays
from cg_jax._types import PyTree
from cg_jax.sharding import Layout, OnMesh
from cg_jax.sharding.explicit_axes import auto_arrays


class PaddedBatch(NamedTuple):
    """One batch, padded to the common size by repeating a row."""

    rows: PyTree  # leaves [batch_size, ...]
    ids: Any  # int32 [batch_size]: index of each example in its process's data, −1 where padded
    sizes: tuple[int, ...]  # the number of examples from each process


class Batches(NamedTuple):
    """The batches of a measurement."""

    batches: Iterator[PaddedBatch]
    number: int | None  # of batches, if known
    share: int  # examples that each process gives to a whole batch

    def is_whole(self, batch: PaddedBatch) -> bool:
        """Whether the batch has no padding."""
        return all(size == self.share for size in batch.sizes)


def batches_of(data: Any, batch_size: int, layout: Layout, whole: bool) -> Batches:
    """The batches of `data`, on the devices of the layout. With `whole`, only whole batches."""
    data = auto_arrays(data) if is_arrays(data) else data
    if is_arrays(data) and isinstance(layout, OnMesh) and layout.holds(data):
        return _device_batches(data, _validate.leading_axis("data", data), batch_size, layout, whole)
    layout.require_own_rows()
    shape, several = _Shape.of(batch_size, layout), layout.spans_processes
    if is_arrays(data):
        size, sizes = _agreed(lambda: (_validate.leading_axis("data", data), data), batch_size, several)
        share = shape.rows(int(sizes.max()))
        number, batches = -(-int(sizes.max()) // share), _array_batches(data, size, share, sizes)
    else:
        number = None if several else _length(data)
        batches = _iterable_batches(data, shape, batch_size, several)
    return Batches(_put(layout, batches), number, shape.share)


class _Shape(NamedTuple):
    """The number of rows that a process gives to a batch."""

    share: int  # of a whole batch
    local: int  # devices along the data axis that the process feeds

    @classmethod
    def of(cls, batch_size: int, layout: Layout) -> "_Shape":
        return cls(-(-batch_size // layout.num_shards) * layout.local_shards, layout.local_shards)

    def rows(self, most: int) -> int:
        """The number of rows for `most` examples: the same on each device, and at most a whole batch."""
        return min(self.share, -(-most // self.local) * self.local)


def _length(data: Any) -> int | None:
    """The number of batches of an iterable, if known."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # loaders of streams define a length that raises
        return None


def _put(layout: Layout, batches: Iterator[PaddedBatch]) -> Iterator[PaddedBatch]:
    for batch in batches:
        rows, ids = layout.put((batch.rows, batch.ids))
        yield PaddedBatch(rows, ids, batch.sizes)


def _agreed(next_rows: Callable[[], tuple[int, PyTree]], batch_size: int, several: bool) -> tuple[int, np.ndarray]:
    """(number of examples that this process has next, the numbers of all processes); `next_rows` gives number and rows.

    An error in one process is raised in all, since the others would wait for it. Processes that disagree also raise.
    """
    if not several:
        size, _ = next_rows()
        return size, np.array([size])
    size, kind, error = -1, "", None
    try:
        size, rows = next_rows()
        kind = f"batch_size={batch_size} and rows of {jax.tree.map(_row_type, rows)}"
    except Exception as raised:
        error = raised
    mine = np.array([size, zlib.crc32(kind.encode()) >> 1], np.int32)
    sizes, kinds = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2).T
    if error is not None:
        raise error
    if (sizes < 0).any():
        raise ValueError(
            f"Expected data from every process, got an error in process {int(sizes.argmin())}; it says why."
        )
    if (kinds != kinds[0]).any():
        other = int((kinds != mine[1]).argmax())
        raise ValueError(f"Expected the same in every process, got {kind} here and something else in process {other}.")
    return size, sizes


def _row_type(leaf: Any) -> str:
    """Dtype and shape of one row on a device."""
    return f"{jax.dtypes.canonicalize_dtype(leaf.dtype)}{list(leaf.shape[1:])}"


def _pad(rows: PyTree, start: int, size: int, share: int, sizes: tuple[int, ...]) -> PaddedBatch:
    """Pad `size` rows to `share` by repeating the last one, so that one shape compiles."""
    places = np.arange(share)
    if jax.tree.leaves(rows)[0].shape[0] < share:
        last = jax.tree.leaves(rows)[0].shape[0] - 1
        rows = jax.tree.map(lambda leaf: leaf[np.minimum(places, last)], rows)
    return PaddedBatch(rows, np.where(places < size, start + places, -1).astype(np.int32), sizes)


def _array_batches(data: PyTree, size: int, share: int, sizes: np.ndarray) -> Iterator[PaddedBatch]:
    """The batches of arrays with leading axis `size`. Every process gives as many as the one with the most examples."""
    for start in range(0, int(sizes.max()), share):
        lo, hi = min(start, size - 1), min(start + share, size)
        rows = _validate.arrays("data", jax.tree.map(lambda leaf, lo=lo, hi=hi: leaf[lo:hi], data))
        now = tuple(int(n) for n in np.clip(sizes - start, 0, share))
        yield _pad(rows, start, max(size - start, 0), share, now)


def _iterable_batches(data: Iterable[PyTree], shape: _Shape, batch_size: int, several: bool) -> Iterator[PaddedBatch]:
    """The batches of an iterable. With several processes, one that has run out repeats its last rows, masked.

    Batches are padded to the size of the first. When a larger one comes, the padded size at least doubles, since each
    size is compiled.
    """
    start, rows, padded, iterator = 0, None, 0, iter(data)
    limit = shape.share if several else batch_size

    def next_rows() -> tuple[int, PyTree]:
        nonlocal rows
        more = next(iterator, None)
        if more is None and rows is None:
            raise ValueError(
                "Expected data to hold at least one batch, got an empty iterable; a generator can be read only once."
            )
        if more is None:
            return 0, rows
        rows = auto_arrays(_validate.arrays("batch", more))
        size = _validate.leading_axis("batch", rows)
        if size > limit:
            most = (
                f"{limit} examples, this process's share of batch_size" if several else f"batch_size={limit} examples"
            )
            raise ValueError(
                f"Expected batches of at most {most}, got one of {size}; a list or a loader is one of batches, and "
                "a tuple, (X, Y), one of arrays."
            )
        return size, rows

    while True:
        size, sizes = _agreed(next_rows, batch_size, several)
        if not sizes.any():
            return
        if sizes.max() > padded:
            padded = shape.rows(max(int(sizes.max()), 2 * padded))
        yield _pad(rows, start, size, padded, tuple(int(n) for n in sizes))
        start += size


def _device_batches(data: PyTree, size: int, batch_size: int, layout: OnMesh, whole: bool) -> Batches:
    """The batches of arrays on devices. Whole batches are of consecutive examples. Otherwise each device takes its own
    examples, in any order, and no data moves.
    """
    sizes: list[int]
    if whole:
        sizes = [batch_size] * (size // batch_size)
        arranged = _in_whole_batches(layout, batch_size, data) if sizes else data
        cut = functools.partial(_one_of, layout, batch_size)
    else:
        each = -(-size // layout.num_shards)
        chunk = min(-(-batch_size // layout.num_shards), each)
        cutter = _Cut(layout, size, each, chunk)
        sizes = [cutter.valid(step) for step in range(-(-each // chunk))]
        arranged, cut = _over_shards(layout, each, data), functools.partial(_own_rows, cutter)
    remainder = size % batch_size if whole else 0
    return Batches(_cut_all(cut, arranged, sizes, remainder), len(sizes), batch_size)


def _cut_all(
    cut: Callable[..., tuple[PyTree, jax.Array]], data: PyTree, sizes: list[int], remainder: int
) -> Iterator[PaddedBatch]:
    """The batches that `cut` makes of data on devices, and an empty one that counts the remainder."""
    for step, size in enumerate(sizes):
        rows, ids = cut(data, np.int32(step))
        yield PaddedBatch(rows, ids, (size,))
    if remainder:
        yield PaddedBatch(None, None, (remainder,))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_whole_batches(layout: OnMesh, batch_size: int, data: PyTree) -> PyTree:
    """[number, batch_size, ...], each batch sharded over the data axis. The remainder is dropped."""
    spec = PartitionSpec(None, layout.axis)

    def arrange(leaf: jax.Array) -> jax.Array:
        number = leaf.shape[0] // batch_size
        arranged = leaf[: number * batch_size].reshape(number, batch_size, *leaf.shape[1:])
        return layout.constrain(arranged, spec)

    return jax.tree.map(arrange, data)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_of(layout: OnMesh, batch_size: int, arranged: PyTree, step: jax.Array) -> tuple[PyTree, jax.Array]:
    """(rows, ids) of one batch."""
    rows = jax.tree.map(lambda leaf: layout.constrain(leaf[step], PartitionSpec(layout.axis)), arranged)
    return rows, layout.constrain(
        step * batch_size + jnp.arange(batch_size, dtype=jnp.int32), PartitionSpec(layout.axis)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _over_shards(layout: OnMesh, each: int, data: PyTree) -> PyTree:
    """Leaves with `each` rows on every device of the data axis, padded by repeating the last row."""

    def spread(leaf: jax.Array) -> jax.Array:
        missing = each * layout.num_shards - leaf.shape[0]
        if missing:
            leaf = jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])
        return layout.constrain(leaf, PartitionSpec(layout.axis))

    return jax.tree.map(spread, data)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A cut of `size` examples: each device has `each` of them and takes `chunk` at a time."""

    layout: OnMesh
    size: int
    each: int
    chunk: int

    def valid(self, step: int) -> int:
        """The number of valid examples in the batch of this step."""
        starts = np.arange(self.layout.num_shards) * self.each + step * self.chunk
        ends = np.minimum(starts + self.chunk, (np.arange(self.layout.num_shards) + 1) * self.each)
        return int(np.clip(np.minimum(ends, self.size) - starts, 0, None).sum())


@functools.partial(jax.jit, static_argnums=0)
def _own_rows(cut: _Cut, data: PyTree, step: jax.Array) -> tuple[PyTree, jax.Array]:
    """(rows, ids) of one batch: a chunk of the examples of each device. The last chunk overlaps the one before it."""
    axis = cut.layout.axis

    def local(data: PyTree, step: jax.Array) -> tuple[PyTree, jax.Array]:
        start = jnp.minimum(step * cut.chunk, cut.each - cut.chunk)
        rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, cut.chunk), data)
        places = start + jnp.arange(cut.chunk, dtype=jnp.int32)
        ids = jax.lax.axis_index(axis) * cut.each + places
        return rows, jnp.where((places >= step * cut.chunk) & (ids < cut.size), ids, -1)

    spec = PartitionSpec(axis)
    return cut.layout.mapped(local, (spec, PartitionSpec()), (spec, spec))(data, step)
