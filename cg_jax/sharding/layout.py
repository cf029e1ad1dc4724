"""The sharding of a measurement. One device is the simplest case.

Each device keeps the sums of its own examples in its own row, so a batch costs no traffic. One all-reduce of the sums
ends the measurement. Only a parameter that is sharded over the data axis (FSDP) is gathered, and its sum scattered,
for every batch.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import trees
from cg_jax._types import PyTree
from cg_jax.sharding.explicit_axes import auto_arrays

# The sharding of each accumulated leaf: the spec of its parameter, or None for a scalar.
Specs = Sequence[PartitionSpec | None]


class Layout(abc.ABC):
    """The devices and shardings of parameters, batches and sums. It is hashable: programs are compiled for it.

    `axis` is the mesh axis of the examples, or None on one device. `specs` are the specs of the leaves of parameters
    and state, `kept` those of the differentiable parameters.
    """

    axis: Any
    specs: tuple[PartitionSpec, ...]
    kept: tuple[PartitionSpec, ...]

    @property
    def num_shards(self) -> int:
        """Devices along the data axis."""
        return 1

    @property
    def local_shards(self) -> int:
        """Devices along the data axis that this process feeds."""
        return 1

    @property
    def spans_processes(self) -> bool:
        """Whether several processes feed data, each its own part."""
        return False

    @abc.abstractmethod
    def active(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which its mesh is JAX's current mesh, so that a loss_fn may constrain shardings."""

    @abc.abstractmethod
    def place(self, params: PyTree) -> PyTree:
        """Put the parameters on its devices. Nothing is copied if they are there already."""

    @abc.abstractmethod
    def put(self, rows: PyTree) -> PyTree:
        """Put a batch on its devices. Every process gives its own rows."""

    def require_own_rows(self) -> None:  # noqa: B027
        """ValueError if processes share a position on the data axis, since each would have to give the same rows."""

    def process_of(self, row: int, batch_size: int) -> int:
        """The process that feeds a row of a batch."""
        del row, batch_size
        return 0

    @abc.abstractmethod
    def zeros(self, shapes: PyTree, specs: Specs, by_shard: bool) -> PyTree:
        """Zero sums of these shapes. With `by_shard`, one sum per device."""

    @abc.abstractmethod
    def per_shard(
        self,
        f: Callable[..., tuple[PyTree, PyTree]],
        replicated: PyTree,
        replicated_specs: Sequence[PartitionSpec],
        sums: PyTree,
        specs: Specs,
        rows: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """(sums with those of f added, the row results of f), where f(replicated, rows) → (sums, row results).

        f runs on every device, with whole parameters and the rows of the device.
        """

    @abc.abstractmethod
    def total(self, sums: PyTree, specs: Specs) -> PyTree:
        """The sums over the data axis, by one all-reduce."""

    @abc.abstractmethod
    def constrain_all(self, sums: PyTree, specs: Specs) -> PyTree:
        """Shard the sums by the specs. Scalars are replicated."""

    @abc.abstractmethod
    def replicate(self, leaf: jax.Array) -> jax.Array:
        """Replicate a leaf over all devices."""

    def specs_of(self, sums: Any, like_params: Sequence[str]) -> Specs:
        """The specs of the leaves of a NamedTuple. Its fields `like_params` have the structure of the parameters."""
        return [
            spec
            for name, field in zip(sums._fields, sums, strict=True)
            for spec in (self.kept if name in like_params else [None] * len(jax.tree.leaves(field)))
        ]


@dataclasses.dataclass(frozen=True)
class SingleDevice(Layout):
    """JAX's default device. Arrays that the user has sharded keep their sharding."""

    axis = None
    specs = ()
    kept = ()

    def active(self) -> contextlib.AbstractContextManager[Any]:  # noqa: D102
        return contextlib.nullcontext()

    def place(self, params: PyTree) -> PyTree:  # noqa: D102
        return auto_arrays(params)

    def put(self, rows: PyTree) -> PyTree:  # noqa: D102
        return rows

    def zeros(self, shapes: PyTree, specs: Specs, by_shard: bool) -> PyTree:  # noqa: D102
        del specs, by_shard
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def per_shard(  # noqa: D102
        self,
        f: Callable[..., tuple[PyTree, PyTree]],
        replicated: PyTree,
        replicated_specs: Sequence[PartitionSpec],
        sums: PyTree,
        specs: Specs,
        rows: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del replicated_specs, specs
        of_rows_sums, of_rows = f(replicated, rows)
        return trees.add(sums, of_rows_sums), of_rows

    def total(self, sums: PyTree, specs: Specs) -> PyTree:  # noqa: D102
        del specs
        return sums

    def constrain_all(self, sums: PyTree, specs: Specs) -> PyTree:  # noqa: D102
        del specs
        return sums

    def replicate(self, leaf: jax.Array) -> jax.Array:  # noqa: D102
        return leaf
