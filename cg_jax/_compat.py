"""Everything that changes between JAX releases. This is the only module that uses JAX's internals.

The names of primitives change too. They are in the table of `ghost.primitives`.
"""

import contextlib
from typing import Any

import jax
from jax.core import ShapedArray, Tracer
from jax.extend import core


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a constant written into it."""
    return isinstance(atom, core.Literal)


def is_tracer(value: Any) -> bool:
    """Whether `value` stands for an array inside a traced function."""
    return isinstance(value, Tracer)


def bind(eqn: Any, operands: Any, **changed: Any) -> list[Any]:
    """Evaluate one equation on `operands` with some parameters changed, and return its outputs as a list."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **(eqn.primitive.get_bind_params(eqn.params) | changed))
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """The number of a scan's operands that are constants, and the number that start the carry."""
    if "ft_in" in eqn.params:  # newer JAX: operands in groups
        consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
        return len(list(consts)), len(list(carry))
    return eqn.params["num_consts"], eqn.params["num_carry"]


def line_of(eqn: Any) -> str:
    """The user's file and line that an equation comes from, or the empty string."""
    try:
        from jax._src import source_info_util

        return source_info_util.summarize(eqn.source_info)
    except (ImportError, AttributeError):
        return ""


def keep_line(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which new equations are attributed to the user's line that `eqn` comes from."""
    try:
        from jax._src import source_info_util

        return source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack)
    except (ImportError, AttributeError, TypeError):
        return contextlib.nullcontext()


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes of an enclosing shard_map that any leaf varies over. Empty if JAX does not track them."""
    return frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))


def _varying(value: Any) -> frozenset[str]:
    aval = value if isinstance(value, ShapedArray | jax.ShapeDtypeStruct) else jax.typeof(value)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", None) or frozenset() if kind is None else kind.varying


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Mark each leaf as varying over all of `axes`. The values do not change.

    Inside shard_map, JAX sums the gradient with respect to a replicated value over the devices. It does not sum the
    gradient with respect to a varying value.
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def vary_like(tree: Any, other: Any) -> Any:
    """Mark each leaf as varying over the axes of the matching leaf of `other`."""
    return jax.tree.map(lambda leaf, like: vary(leaf, _varying(like)), tree, other)


def sum_over(value: Any, but: frozenset[str]) -> Any:
    """The sum of an array over the devices of the axes that it varies over, `but` these."""
    axes = tuple(sorted(_varying(value) - but))
    return jax.lax.psum(value, axes) if axes else value


def all_gather_invarying(tile: Any, axis_name: Any) -> Any:
    """Concatenate the tiles of all devices. The result is replicated."""
    return jax.lax.all_gather(tile, axis_name, tiled=True, to="invarying")


def bound_axes() -> tuple[str, ...]:
    """The axis names of the enclosing shard_map, pmap or vmap. Empty if JAX does not tell."""
    try:
        from jax._src import core as internal

        return tuple(map(str, internal.trace_ctx.axis_env.axis_names()))
    except (ImportError, AttributeError):
        return ()


def tracked_axes() -> frozenset[str]:
    """The axes of the enclosing shard_map over which JAX tracks varying values."""
    return frozenset(axis for axis in bound_axes() if axis in _varying(jax.lax.axis_index(axis)))
