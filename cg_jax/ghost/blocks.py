"""A rule on blocks of coordinates of several tensors, in one loop that contains the rule once."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cg_jax import _compat
from cg_jax.ghost.passes import ByParameter

# Gradients of the examples at some coordinates, [B, n] → a value for each coordinate, [n].
ColumnRule = Callable[[jax.Array], jax.Array]


class Blocks(NamedTuple):
    """Coordinates of some tensors, in `steps` blocks."""

    steps: int
    block: Callable[[jax.Array], jax.Array]  # number of the block → [B, rows, lanes], n = rows · lanes
    collect: Callable[[jax.Array], ByParameter]  # values [steps, n] → values of each parameter


def each_block(every: Sequence[Blocks], rule: ColumnRule) -> ByParameter:
    """The rule on all blocks. Blocks of one kind share a loop, in which narrower ones are padded."""
    avals = [jax.eval_shape(one.block, jax.ShapeDtypeStruct((), jnp.int32)) for one in every]
    kinds = [(aval.dtype, _compat.varying_axes(aval)) for aval in avals]
    values: ByParameter = {}
    for kind in dict.fromkeys(kinds):
        group = [one for one, other in zip(every, kinds, strict=True) if other == kind]
        shapes = [aval.shape[1:] for aval, other in zip(avals, kinds, strict=True) if other == kind]
        done, start = scanned(group, shapes, rule), 0
        for one, shape in zip(group, shapes, strict=True):
            values |= one.collect(done[start : start + one.steps, : math.prod(shape)])
            start += one.steps
    return values


def scanned(group: Sequence[Blocks], shapes: Sequence[tuple[int, ...]], rule: ColumnRule) -> jax.Array:
    """The rule on all blocks of a group, [steps of all, n].

    A block keeps its rows and lanes until it is in memory: XLA:CPU does not vectorise a product that it writes as one
    row. All have the lanes of the blocks that are most of the work.
    """
    most = max(range(len(group)), key=lambda k: group[k].steps * math.prod(shapes[k]))
    lanes = shapes[most][1]
    rows = -(-max(math.prod(shape) for shape in shapes) // lanes)

    def padded(one: Blocks) -> Callable[[jax.Array], jax.Array]:
        def block(i: jax.Array) -> jax.Array:
            g = one.block(i)
            if g.shape[2] != lanes:
                g = g.reshape(g.shape[0], -1)
                g = jnp.pad(g, [(0, 0), (0, -g.shape[1] % lanes)]).reshape(g.shape[0], -1, lanes)
            return jnp.pad(g, [(0, 0), (0, rows - g.shape[1]), (0, 0)])

        return block

    branches = [padded(one) for one in group]

    def step(_: None, at: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        branch, i = at
        g = branches[0](i) if len(branches) == 1 else jax.lax.switch(branch, branches, i)
        return None, rule(g.reshape(g.shape[0], -1))

    places = [(k, i) for k, one in enumerate(group) for i in range(one.steps)]
    numbers = np.asarray(places, np.int32)
    if len(places) == 1:
        return step(None, (numbers[0, 0], jnp.asarray(numbers[0, 1])))[1][None]
    return jax.lax.scan(step, None, (jnp.asarray(numbers[:, 0]), jnp.asarray(numbers[:, 1])))[1]
