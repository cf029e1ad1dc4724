"""Named axes that the examples of a batch are sharded over, inside a shard_map or pmap; or none."""

import dataclasses
from typing import Any, ClassVar

import jax

from cg_jax import _compat
from cg_jax._types import PyTree


@dataclasses.dataclass(frozen=True)
class Axes:
    """No axes: a device has all examples."""

    is_one_device: ClassVar[bool] = True

    @property
    def tracked(self) -> frozenset[str]:
        """The axes over which JAX tracks varying values."""
        return frozenset()

    def sum(self, tree: PyTree) -> PyTree:
        """The sum over the devices, replicated."""
        return tree

    def gather(self, rows: jax.Array) -> jax.Array:
        """The rows of all devices, [B, ...], of those of this device, replicated."""
        return rows

    def own(self, rows: jax.Array) -> jax.Array:
        """The rows of this device, of those of all."""
        return rows


@dataclasses.dataclass(frozen=True)
class NamedAxes(Axes):
    """Axes of the enclosing shard_map, pmap or vmap."""

    names: tuple[str, ...]
    is_one_device: ClassVar[bool] = False

    @property
    def tracked(self) -> frozenset[str]:  # noqa: D102
        return _compat.tracked_axes() & set(self.names)

    def sum(self, tree: PyTree) -> PyTree:  # noqa: D102
        return jax.tree.map(lambda leaf: jax.lax.psum(self._varying(leaf), self.names), tree)

    def gather(self, rows: jax.Array) -> jax.Array:  # noqa: D102
        if self.tracked >= set(self.names):
            return _compat.all_gather_invarying(self._varying(rows), self.names)
        return jax.lax.all_gather(rows, self.names, tiled=True)

    def own(self, rows: jax.Array) -> jax.Array:  # noqa: D102
        size = rows.shape[0] // jax.lax.axis_size(self.names)
        start = jax.lax.axis_index(self.names) * size
        return jax.lax.dynamic_slice_in_dim(rows, start, size)

    def _varying(self, value: jax.Array) -> jax.Array:
        return _compat.vary(value, self.tracked)


def require_bound(axis_name: Any, taker: str) -> tuple[Any, ...]:
    """The names of an axis or a tuple of axes. ValueError unless there is a shard_map, pmap or vmap over each."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        for name in names:
            jax.lax.axis_index(name)
    except NameError:
        around = _compat.bound_axes()
        present = f"axes {', '.join(map(repr, around))}" if around else "none"
        raise ValueError(
            f"Expected a shard_map, pmap or vmap over axis_name={axis_name!r} around {taker}, got {present}."
        ) from None
    return names


def axes_of(axis_name: Any, taker: str) -> Axes:
    """The axes of a name or a tuple of names; None for no axes.

    Raises:
        ValueError: There is no shard_map, pmap or vmap over such an axis.
    """
    return Axes() if axis_name is None else NamedAxes(require_bound(axis_name, taker))
