"""A rule over the examples, such as a median, for blocks of coordinates that are built and thrown away.

The gradients of one block of coordinates are an array [B, width]. A block of a product is the product of a few columns
of its factors, AᵀB of A[:, :, :, d] and B[:, :, :, p]. Gradients without such factors are built a chunk of examples at
a time: once, if all examples fit, or else again for each range of coordinates that fits. One loop over the blocks of
all tensors contains the rule only once, since the rule may take long to compile.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat
from cg_jax._types import PyTree
from cg_jax.ghost.chunks import in_chunks, of_each
from cg_jax.ghost.passes import ByParameter, Pass, Tensors
from cg_jax.ghost.plan import ANY_CHUNK, RulePlan, bytes_at_once
from cg_jax.ghost.product import Product
from cg_jax.ghost.products import factors_of, product_chunk, row_width
from cg_jax.ghost.scalars import ByNumbers
from cg_jax.ghost.tensors import ByGradients, ByNorm, ByProduct, SameForAll

# Gradients of the examples at some coordinates, [B, n] → a value for each coordinate, [n].
ColumnRule = Callable[[jax.Array], jax.Array]

# On a CPU, the gradients of one block should fit the cache of a core.
_CACHE_BYTES = 2**20


class _Blocks(NamedTuple):
    """Coordinates of some tensors, in `steps` blocks."""

    steps: int
    block: Callable[[jax.Array], jax.Array]  # number of the block → [B, n]
    collect: Callable[[jax.Array], ByParameter]  # values [steps, n] → values of each parameter


class _Rows(NamedTuple):
    """Tensors whose gradients are built example by example."""

    parameters: tuple[int, ...]
    gradient: Callable[[Any], list[jax.Array]]  # row → the gradient of each parameter
    rows: PyTree  # [B, ...]
    chunk: int


def by_columns(of: Pass, rule: ColumnRule, max_bytes: int | None = None) -> PyTree:
    """rule(g₁, …, g_B) of each coordinate, like the parameters, in the accumulator dtype."""
    limit = bytes_at_once(max_bytes)
    leaves, structure = jax.tree.flatten(of.kept)
    values: ByParameter = {}
    cut, built, width = list[_Blocks](), list[_Rows](), _width(of, limit)
    for tensors in of.tensors:
        blocks = _of_product(of, tensors, width) if isinstance(tensors, ByProduct) else None
        if blocks is None:
            built.append(_rows(of, tensors, limit))
        else:
            cut.append(blocks)
    pool, large = _split(of, built, limit)
    values |= {i: jnp.zeros(leaves[i].shape, of.dtype(i)) for i in pool if leaves[i].size == 0}
    values |= _each_block([*cut, *_pooled(of, pool, width)], rule)
    for one in large:
        values |= _in_ranges(of, one, rule, limit, width)
    for i, leaf in enumerate(leaves):
        if i not in values:  # no use, so the gradients are zero
            zeros = jnp.zeros((of.losses.shape[0], 1), of.dtype(i))
            values[i] = jnp.broadcast_to(rule(zeros)[0] if leaf.size else 0, leaf.shape).astype(of.dtype(i))
    return jax.tree.unflatten(structure, [values[i].astype(of.dtype(i)) for i in range(len(leaves))])


def _width(of: Pass, limit: int) -> int:
    """Coordinates of one block."""
    size = max((leaf.size for leaf in jax.tree.leaves(of.kept)), default=1)
    on_cpu, rows = jax.default_backend() == "cpu", of.losses.shape[0]
    itemsize = max((of.dtype(i).itemsize for i in range(len(jax.tree.leaves(of.kept)))), default=4)
    width = (min(limit, _CACHE_BYTES) if on_cpu else limit) // (rows * itemsize)
    width = max(1, min(size, width - width % 64 if width > 64 else width))
    products = [tensors.product(of) for tensors in of.tensors if isinstance(tensors, ByProduct)]
    return row_width(products, rows, sum(leaf.size for leaf in jax.tree.leaves(of.kept)), width) if on_cpu else width


def _of_product(of: Pass, tensors: ByProduct, width: int) -> _Blocks | None:
    """Blocks of G [N, D, P]. None if the factors are larger than what went in and came back, as patches are."""
    parameter, product = tensors.plan.parameter, tensors.product(of)
    n, _, d, p = product.dims
    shape = jax.tree.leaves(of.kept)[parameter].shape
    if not product.rearranges or n * d * p != math.prod(shape) or n * d * p == 0:
        return None
    a, b, letters = factors_of(product, *tensors.factors(of))
    dtype = of.dtype(parameter)
    sides = _sides((p, d, n), width)[::-1]
    grid = tuple(-(-size // side) for size, side in zip((n, d, p), sides, strict=True))
    padding = [count * side - size for count, side, size in zip(grid, sides, (n, d, p), strict=True)]
    d_axis = 2 + letters.index("d")
    a = jnp.pad(a, [(0, {1: padding[0], d_axis: padding[1]}.get(axis, 0)) for axis in range(4)])
    b = jnp.pad(b, [(0, {1: padding[0], 3: padding[2]}.get(axis, 0)) for axis in range(4)])
    scale = None if product.scale is None else jnp.pad(product.scale, [(0, each) for each in padding])

    def block(i: jax.Array) -> jax.Array:
        at = [place * side for place, side in zip(jnp.unravel_index(i, grid), sides, strict=True)]
        of_d = _slices(a, {1: (at[0], sides[0]), d_axis: (at[1], sides[1])}).astype(dtype)
        of_p = _slices(b, {1: (at[0], sides[0]), 3: (at[2], sides[2])}).astype(dtype)
        g = _product_of(product, of_d, of_p, letters, dtype)
        if scale is not None:
            g = g * _slices(scale, dict(enumerate(zip(at, sides, strict=True)))).astype(dtype)
        return g.reshape(g.shape[0], -1)

    def collect(values: jax.Array) -> ByParameter:
        joined = values.reshape(*grid, *sides).transpose(0, 3, 1, 4, 2, 5)
        joined = joined.reshape([count * side for count, side in zip(grid, sides, strict=True)])
        return {parameter: product.to_view(joined[:n, :d, :p])}

    return _Blocks(math.prod(grid), block, collect)


def _product_of(product: Product, a: jax.Array, b: jax.Array, letters: str, dtype: Any) -> jax.Array:
    """AᵀB [B, N, D, P]."""
    if product.dims[1] == 1:
        return a.reshape(*a.shape[:2], -1, 1) * b.reshape(*b.shape[:2], 1, -1)
    spec = f"bn{letters},bntp->bndp"
    return jnp.einsum(spec, a, b, precision=product.precision, preferred_element_type=dtype)


def _sides(shape: Sequence[int], width: int) -> tuple[int, ...]:
    """The sides of a block of at most `width` entries, which fills the first axes first."""
    sides = []
    for size in shape:
        steps = -(-size // max(1, width))
        sides.append(-(-size // steps))
        width //= sides[-1]
    return tuple(sides)


def _slices(array: jax.Array, cuts: dict[int, tuple[jax.Array, int]]) -> jax.Array:
    """The array from start to start + size, for some axes."""
    for axis, (start, size) in cuts.items():
        if size < array.shape[axis]:
            array = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return array


def _rows(of: Pass, tensors: Tensors, limit: int) -> _Rows:
    """The gradients of one example of some tensors."""
    if isinstance(tensors, ByNumbers):
        assert tensors.plan.exact is not None
        tensors = ByGradients(tensors.plan.exact)
    if isinstance(tensors, ByGradients):
        return _Rows(tensors.plan.parameters, *tensors.gradient(of), tensors.plan.chunk)
    if isinstance(tensors, SameForAll):
        every = tensors.gradients
        keep = jnp.ones(of.losses.shape) if of.keep is None else of.keep
        return _Rows(tuple(range(len(every))), lambda kept: [g * kept.astype(g.dtype) for g in every], keep, ANY_CHUNK)
    assert isinstance(tensors, ByNorm | ByProduct)
    tensors = ByProduct(tensors.plan) if isinstance(tensors, ByProduct) else tensors  # one row at a time: none are kept
    plan, keys = tensors.plan, [use.key for use, _ in tensors.plan.places]

    def gradient(traces: list[Any]) -> list[jax.Array]:
        own = dict(zip(keys, jax.tree.map(lambda leaf: leaf[None], traces), strict=True))
        return [tensors.sums(dataclasses.replace(of, traces=own, memo={}))[plan.parameter]]

    return _Rows((plan.parameter,), gradient, [of.traces[key] for key in keys], _chunk(of, plan, limit))


def _chunk(of: Pass, plan: RulePlan, limit: int) -> int:
    """Examples whose gradients of one tensor are built at once."""
    if isinstance(plan.rule, Product):
        return product_chunk(plan.rule, "instantiate", plan.itemsize, limit)
    return max(1, limit // max(1, plan.itemsize * jax.tree.leaves(of.kept)[plan.parameter].size))


def _split(of: Pass, built: Sequence[_Rows], limit: int) -> tuple[dict[int, jax.Array], list[_Rows]]:
    """(the gradients [B, size] of the tensors that fit together, the other tensors)."""
    leaves = jax.tree.leaves(of.kept)
    pool: dict[int, jax.Array] = {}
    large: list[_Rows] = []
    for one in built:
        size = of.losses.shape[0] * sum(leaves[i].size * of.dtype(i).itemsize for i in one.parameters)
        if size <= limit:
            pool |= _matrices(of, one)
            limit -= size
        else:
            large.append(one)
    return pool, large


def _matrices(of: Pass, one: _Rows) -> dict[int, jax.Array]:
    """The gradients [B, size] of each tensor."""
    dtype = jnp.result_type(*(of.dtype(i) for i in one.parameters))

    def joined(rows: PyTree) -> jax.Array:
        grads = of_each(one.gradient)(rows)
        return jnp.concatenate([g.reshape(g.shape[0], -1).astype(dtype) for g in grads], 1)

    sizes = [jax.tree.leaves(of.kept)[i].size for i in one.parameters]
    parts = jnp.split(in_chunks(joined, one.rows, one.chunk), list(itertools.accumulate(sizes))[:-1], 1)
    return {i: part.astype(of.dtype(i)) for i, part in zip(one.parameters, parts, strict=True)}


def _pooled(of: Pass, pool: dict[int, jax.Array], width: int) -> list[_Blocks]:
    """Blocks of the gradients of several tensors side by side."""
    kinds = {i: (part.dtype, _compat.varying_axes(part)) for i, part in pool.items() if part.size}
    return [
        _of_matrix(of, {i: pool[i] for i, other in kinds.items() if other == kind}, width)
        for kind in dict.fromkeys(kinds.values())
    ]


def _of_matrix(of: Pass, pool: dict[int, jax.Array], width: int) -> _Blocks:
    matrix = jnp.concatenate(list(pool.values()), 1)
    (width,) = _sides(matrix.shape[1:], width)
    steps = -(-matrix.shape[1] // width)
    matrix = jnp.pad(matrix, [(0, 0), (0, steps * width - matrix.shape[1])])
    ends = list(itertools.accumulate(part.shape[1] for part in pool.values()))

    def block(i: jax.Array) -> jax.Array:
        return _slices(matrix, {1: (i * width, width)})

    def collect(values: jax.Array) -> ByParameter:
        leaves, parts = jax.tree.leaves(of.kept), jnp.split(values.ravel()[: ends[-1]], ends[:-1])
        return {i: part.reshape(leaves[i].shape) for i, part in zip(pool, parts, strict=True)}

    return _Blocks(steps, block, collect)


def _each_block(every: Sequence[_Blocks], rule: ColumnRule) -> ByParameter:
    """The rule on all blocks. Blocks of one kind share a loop, in which narrower ones are padded."""
    avals = [jax.eval_shape(one.block, jax.ShapeDtypeStruct((), jnp.int32)) for one in every]
    kinds, values = [(aval.dtype, _compat.varying_axes(aval)) for aval in avals], ByParameter()
    for kind in dict.fromkeys(kinds):
        group = [one for one, other in zip(every, kinds, strict=True) if other == kind]
        widths = [aval.shape[1] for aval, other in zip(avals, kinds, strict=True) if other == kind]
        done = _scanned(group, max(widths), rule)
        for one, width, start in zip(group, widths, itertools.accumulate([0, *(g.steps for g in group)]), strict=False):
            values |= one.collect(done[start : start + one.steps, :width])
    return values


def _scanned(group: Sequence[_Blocks], width: int, rule: ColumnRule) -> jax.Array:
    """The rule on all blocks of a group, [steps of all, width]."""

    def padded(one: _Blocks) -> Callable[[jax.Array], jax.Array]:
        return lambda i: jnp.pad(g := one.block(i), [(0, 0), (0, width - g.shape[1])])

    branches = [padded(one) for one in group]

    def step(_: None, at: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        branch, i = at
        return None, rule(branches[0](i) if len(branches) == 1 else jax.lax.switch(branch, branches, i))

    places = [(k, i) for k, one in enumerate(group) for i in range(one.steps)]
    numbers = np.asarray(places, np.int32)
    if len(places) == 1:
        return step(None, (numbers[0, 0], jnp.asarray(numbers[0, 1])))[1][None]
    return jax.lax.scan(step, None, (jnp.asarray(numbers[:, 0]), jnp.asarray(numbers[:, 1])))[1]


def _in_ranges(of: Pass, one: _Rows, rule: ColumnRule, limit: int, width: int) -> ByParameter:
    """The rule on tensors whose gradients do not fit: for each range of coordinates all gradients are built again."""
    values: ByParameter = {}
    for k, parameter in enumerate(one.parameters):
        leaf, dtype = jax.tree.leaves(of.kept)[parameter], of.dtype(parameter)
        if leaf.size == 0:
            values[parameter] = jnp.zeros(leaf.shape, dtype)
            continue
        columns = max(width, limit // (of.losses.shape[0] * dtype.itemsize) // width * width)
        (columns,) = _sides((leaf.size,), columns)
        steps = -(-leaf.size // columns)

        def of_range(
            start: jax.Array, k: int = k, columns: int = columns, end: int = steps * columns, dtype: Any = dtype
        ) -> jax.Array:
            def part(rows: PyTree) -> jax.Array:
                g = of_each(one.gradient)(rows)[k]
                g = g.reshape(g.shape[0], -1).astype(dtype)
                g = jnp.pad(g, [(0, 0), (0, end - g.shape[1])])
                return jax.lax.dynamic_slice_in_dim(g, start, columns, 1)

            return _on_matrix(in_chunks(part, one.rows, one.chunk), rule, width)

        starts = np.arange(steps, dtype=np.int32) * columns
        done = jax.lax.map(of_range, starts) if steps > 1 else of_range(jnp.asarray(starts[0]))
        values[parameter] = done.ravel()[: leaf.size].reshape(leaf.shape)
    return values


def _on_matrix(matrix: jax.Array, rule: ColumnRule, width: int) -> jax.Array:
    """The rule on [B, n], block by block."""
    n = matrix.shape[1]
    (width,) = _sides((n,), width)
    steps = -(-n // width)
    matrix = jnp.pad(matrix, [(0, 0), (0, steps * width - n)])
    one = _Blocks(steps, lambda i: _slices(matrix, {1: (i * width, width)}), lambda values: {})
    return _scanned([one], width, rule).ravel()[:n]
