"""Order statistics of k values of each coordinate, and sums over the k values, without a sort.

Up to `NETWORK_LIMIT` values, a network of minima and maxima of floats (Batcher's merge exchange, reduced to the needed
outputs). Up to `_UNROLL_LIMIT` values, the same network of integers that are ordered as the floats are. Such a network
is elementwise, so XLA:CPU fuses it with what makes the values and with what follows, and vectorises it over the
coordinates: each value is read once, and nothing but the result is written. Above that the program would take too long
to compile, and the bits of the wanted values are searched, by counting smaller values. A few values at either end,
with the sum of all between, are kept while the rows go by.

Measured on one AVX-512 machine with two shared cores, float32, blocks of 1,024 to 2,048 coordinates, median, in
microseconds per coordinate: at k = 128, 33 for jnp.sort of axis 0, 0.07 for the network and 0.2 to 0.8 for a search of
bits; at k = 1,024, 710 for jnp.sort and 45 for the search. A network with two results takes twice as long as one, since
XLA:CPU computes it once for each result.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import trees
from cg_jax._types import PyTree

NETWORK_LIMIT = 16
# Rows that are unrolled. XLA:CPU does not vectorise the program of many more, which is then 20 times slower.
_UNROLL_LIMIT = 160
_GROUP = 32
# Rows times values kept at either end. XLA:CPU does not vectorise the program of many more.
_INSERTION_LIMIT = 512


@functools.cache
def _merge_exchange(n: int) -> tuple[tuple[int, int], ...]:
    """Comparators (i, j), i < j, that sort n wires in ascending order (Knuth, TAOCP vol. 3, 5.2.2 M, mirrored)."""
    comparators = []
    top = 1 << max(n - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            comparators += [(n - 1 - i - d, n - 1 - i) for i in range(n - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return tuple(comparators)


@functools.cache
def _network(n: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """(i, j, minimum needed, maximum needed) of the comparators that the wanted wires of the sorted order need."""
    needed, kept = set(wanted), []
    for i, j in reversed(_merge_exchange(n)):
        if i in needed or j in needed:
            kept.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return tuple(reversed(kept))


def order_statistics(values: jax.Array, wanted: Sequence[int]) -> list[jax.Array]:
    """The wanted order statistics of the k values of each coordinate. NaN if any of the k values is."""
    if values.shape[0] <= NETWORK_LIMIT:
        return _by_network(list(values), tuple(wanted))
    if jax.default_backend() != "cpu":  # the other ways are not measured there
        return _by_sort(values, tuple(wanted))
    spoilt = row_sum(jnp.isnan, values, operator.or_)
    return [jnp.where(spoilt, jnp.nan, each) for each in _by_keys(values, tuple(wanted))]


def _by_network(wires: list[jax.Array], wanted: tuple[int, ...]) -> list[jax.Array]:
    for i, j, low, high in _network(len(wires), wanted):
        a, b = wires[i], wires[j]
        wires[i], wires[j] = jnp.minimum(a, b) if low else a, jnp.maximum(a, b) if high else b
    return [wires[i] for i in wanted]


def _by_sort(values: jax.Array, wanted: tuple[int, ...]) -> list[jax.Array]:
    ordered = jnp.sort(values, axis=0)  # NaN last
    spoilt = jnp.isnan(ordered[-1])
    return [jnp.where(spoilt, jnp.nan, ordered[i]) for i in wanted]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _by_keys(values: jax.Array, wanted: tuple[int, ...]) -> list[jax.Array]:
    """The wanted order statistics, where NaN is less or greater than any other value."""
    wide = values.astype(trees.accumulator_dtype(values.dtype))
    if values.shape[0] <= _UNROLL_LIMIT:  # row by row: keys of all rows at once would be an array in memory
        of_keys = _by_network([_keys(row) for row in wide], wanted)
    else:
        of_keys = _by_counting(_keys(wide), wanted)
    return [_values(key, wide.dtype).astype(values.dtype) for key in of_keys]


@_by_keys.defjvp
def _(wanted: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    # Integers have no derivative.
    return jax.jvp(lambda values: _by_sort(values, wanted), primals, tangents)


def sum_between(
    term: Callable[[jax.Array, jax.Array, jax.Array], PyTree], values: jax.Array, rank: int
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(Σⱼ term(values[j], low, high), low, high), with low and high at `rank` from either end of the order.

    If any of the k values is NaN, low and high may be any numbers.
    """
    k, wanted = values.shape[0], (rank, values.shape[0] - 1 - rank)
    if jax.default_backend() != "cpu" or k <= 2 * _GROUP or values.size == 0:
        low, high = order_statistics(values, wanted)
        return row_sum(lambda row: term(row, low, high), values), low, high
    # A loop over two halves of the coordinates parts the network from the sum. XLA:CPU would fuse both, and it does not
    # vectorise such a large program. Both ends are one complex number, since a network is computed for each result.
    flat = values.reshape(k, -1)
    half = -(-flat.shape[1] // 2)
    flat = jnp.pad(flat, [(0, 0), (0, flat.shape[1] % 2)])
    dtype = trees.accumulator_dtype(values.dtype)

    def of_half(start: jax.Array) -> jax.Array:
        ends = _by_keys(jax.lax.dynamic_slice_in_dim(flat, start, half, 1), wanted)
        return jax.lax.complex(*(end.astype(dtype) for end in ends))

    pairs = jax.lax.map(of_half, np.array([0, half], np.int32)).ravel()[: values[0].size].reshape(values.shape[1:])
    low, high = (end.astype(values.dtype) for end in (jnp.real(pairs), jnp.imag(pairs)))
    return row_sum(lambda row: term(row, low, high), values), low, high


def inserts(k: int, rank: int) -> bool:
    """Whether `ends_by_insertion` is the fastest way to the order statistics `rank` from either end."""
    few = k <= _UNROLL_LIMIT and k * (rank + 1) <= _INSERTION_LIMIT
    return few and 2 * rank + 2 <= k and jax.default_backend() == "cpu"


def ends_by_insertion(
    values: jax.Array, rank: int, scale: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array]:
    """((Σ x, Σ scale · x, whether any value is NaN), low, high), x the k − 2 rank − 2 values between low and high.

    Low and high are at `rank` from either end of the order; k must be at least 2 rank + 2. Each row is inserted into
    the rank + 1 largest values so far. What falls out of them is inserted into the rank + 1 smallest, and what falls
    out of those lies between. So each value is read once.
    """
    largest: list[jax.Array] = []
    smallest: list[jax.Array] = []
    between: list[jax.Array] = []
    for row in values:
        for i, each in enumerate(largest):  # descending
            largest[i], row = jnp.where(each < row, row, each), jnp.where(each < row, each, row)
        if len(largest) <= rank:
            largest.append(row)
            continue
        for i, each in enumerate(smallest):  # ascending
            smallest[i], row = jnp.where(row < each, row, each), jnp.where(row < each, each, row)
        (smallest if len(smallest) <= rank else between).append(row)
    wide = [row.astype(trees.accumulator_dtype(values.dtype)) for row in between or [jnp.zeros_like(values[0])]]
    # XLA takes a common power of two out of a sum, which would then leave the range.
    sums = _fold(wide, operator.add), _fold([row * (0.75 * scale) for row in wide], operator.add) / 0.75
    return (*sums, row_sum(jnp.isnan, values, operator.or_)), smallest[rank], largest[rank]


def _keys(values: jax.Array) -> jax.Array:
    """Signed integers in the order of the values. Those of NaN are the smallest or the largest."""
    dtype = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    return _folded(jax.lax.bitcast_convert_type(values, dtype))


def _values(keys: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_keys`."""
    return jax.lax.bitcast_convert_type(_folded(keys), dtype)


def _folded(bits: jax.Array) -> jax.Array:
    """Flip all bits but the sign of negative numbers, whose bits ascend as the values descend."""
    return bits ^ ((bits >> (jnp.iinfo(bits.dtype).bits - 1)) & jnp.iinfo(bits.dtype).max)


def _by_counting(keys: jax.Array, wanted: tuple[int, ...]) -> list[jax.Array]:
    """The largest numbers with at most `wanted` smaller keys, bit by bit."""
    info = jnp.iinfo(keys.dtype)

    def step(i: jax.Array, lower: list[jax.Array]) -> list[jax.Array]:
        bit = jnp.ones((), keys.dtype) << (info.bits - 1 - i).astype(keys.dtype)
        candidates = [each + bit for each in lower]  # the first wraps from the least number to 0
        counts = row_sum(lambda row: [(row < each).astype(jnp.int32) for each in candidates], keys)
        return [
            jnp.where(count <= rank, candidate, each)
            for count, rank, candidate, each in zip(counts, wanted, candidates, lower, strict=True)
        ]

    least = jnp.minimum(keys[0], info.min)
    return jax.lax.fori_loop(0, info.bits, step, [least] * len(wanted))


def row_sum(
    term: Callable[[jax.Array], PyTree], values: jax.Array, add: Callable[[Any, Any], Any] = operator.add
) -> PyTree:
    """Σⱼ term(values[j]), a pytree of arrays, or the fold by another operation.

    Rows are unrolled, many of them in groups in a loop: a reduction over axis 0 of a large array is slow on a CPU.
    """
    k = values.shape[0]
    if k <= _UNROLL_LIMIT:
        return _fold([term(row) for row in values], add)
    steps = (k - 1) // _GROUP

    def step(i: jax.Array, total: PyTree) -> PyTree:
        rows = jax.lax.dynamic_slice_in_dim(values, i * _GROUP, _GROUP)
        return jax.tree.map(add, total, _fold([term(row) for row in rows], add))

    return jax.lax.fori_loop(0, steps, step, _fold([term(row) for row in values[steps * _GROUP :]], add))


def _fold(terms: Sequence[PyTree], add: Callable[[Any, Any], Any]) -> PyTree:
    """The fold of the folds of groups: a sum of many terms one after the other would round more."""

    def joined(a: PyTree, b: PyTree) -> PyTree:
        return jax.tree.map(add, a, b)

    groups = [functools.reduce(joined, terms[start : start + _GROUP]) for start in range(0, len(terms), _GROUP)]
    return functools.reduce(joined, groups)
