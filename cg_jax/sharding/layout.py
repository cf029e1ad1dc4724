"""The sharding of a measurement, of which one device is the simplest case.

A device keeps the sums of its own examples in a row of its own, so that a batch costs no traffic, however many there
are; one all-reduce of the sums ends the measurement. Only a parameter that is itself sharded over the data axis (FSDP)
is gathered for every batch, and its sum scattered.
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
from cg_jax.sharding.explicit_axes import auto_arrays

PyTree = Any
# The sharding of each accumulated leaf: the spec of the parameter that it is like, or None for a scalar.
Specs = Sequence[PartitionSpec | None]


class Layout(abc.ABC):
    """Where parameters, batches and sums are; hashable, so that programs are compiled for it.

    `axis` is the mesh axis of the examples, None on one device; `num_shards` its devices, and `local_shards` those that
    this process feeds. `specs` are those of the leaves of the parameters, `kept` those of the differentiable ones.
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
        """Whether several processes feed it, each with its own part of the data."""
        return False

    @abc.abstractmethod
    def active(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, its mesh is JAX's current mesh, by which a loss_fn may constrain shardings."""

    @abc.abstractmethod
    def place(self, params: PyTree) -> PyTree:
        """The parameters on its devices; nothing is copied where they are there already."""

    @abc.abstractmethod
    def put(self, rows: PyTree) -> PyTree:
        """A batch on its devices, of which every process gives its own rows."""

    def require_own_rows(self) -> None:  # noqa: B027
        """ValueError where processes share a place of the data axis: each would have to give the same rows."""

    def process_of(self, row: int, batch_size: int) -> int:
        """The process that feeds a row of a batch."""
        del row, batch_size
        return 0

    @abc.abstractmethod
    def zeros(self, shapes: PyTree, specs: Specs, by_shard: bool) -> PyTree:
        """Zeros for sums of these shapes; with `by_shard`, for those of every device."""

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
        """(sums with those of f added, what f says of each row), where f(replicated, rows) → (sums, something by row).

        f runs on every device, with whole parameters and with the device's own rows.
        """

    @abc.abstractmethod
    def total(self, sums: PyTree, specs: Specs) -> PyTree:
        """The sums over the data axis, by one all-reduce."""

    @abc.abstractmethod
    def constrain_all(self, sums: PyTree, specs: Specs) -> PyTree:
        """Sums sharded by the specs; scalars replicated."""

    @abc.abstractmethod
    def replicate(self, leaf: jax.Array) -> jax.Array:
        """A leaf replicated over all devices."""

    def specs_of(self, sums: Any, like_params: Sequence[str]) -> Specs:
        """The specs of the leaves of a NamedTuple whose fields `like_params` are like the parameters."""
        return [
            spec
            for name, field in zip(sums._fields, sums, strict=True)
            for spec in (self.kept if name in like_params else [None] * len(jax.tree.leaves(field)))
        ]


@dataclasses.dataclass(frozen=True)
class SingleDevice(Layout):
    """Wherever JAX puts what it computes; arrays that the user has sharded stay so."""

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
