"""A measurement on a mesh: examples sharded over the data axis, parameters sharded as the user chose."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cg_jax import trees
from cg_jax._types import PyTree
from cg_jax.sharding.explicit_axes import auto_mesh
from cg_jax.sharding.layout import Layout, Specs


@dataclasses.dataclass(frozen=True)
class OnMesh(Layout):
    """A mesh, the axis that examples are sharded over, and the spec of each leaf of the parameters and the state."""

    mesh: Mesh
    axis: str
    specs: tuple[PartitionSpec, ...]
    kept: tuple[PartitionSpec, ...]

    @classmethod
    def of(cls, mesh: Mesh, data_axis: str | None, params: PyTree, state: PyTree = None) -> "OnMesh":
        """The layout of parameters and state on a mesh. A leaf that is not on this mesh is replicated over it.

        All axes are treated as Auto. The compiler divides the work over all axes except the data axis.

        Raises:
            ValueError: data_axis is not an axis of the mesh, or is None for a mesh with several axes and none "data".
        """
        axis = _data_axis(mesh, data_axis)
        mesh = auto_mesh(mesh)
        specs = tuple(_spec_on(mesh, leaf) for leaf in jax.tree.leaves((params, state)))
        of_params = zip(specs, jax.tree.leaves(params), strict=False)
        return cls(mesh, axis, specs, tuple(spec for spec, leaf in of_params if trees.is_differentiable(leaf)))

    @property
    def num_shards(self) -> int:  # noqa: D102
        return self.mesh.shape[self.axis]

    def on(self, spec: PartitionSpec) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, spec)

    def place(self, params: PyTree) -> PyTree:  # noqa: D102
        leaves, structure = jax.tree.flatten(params)
        placed = jax.device_put(leaves, [self.on(spec) for spec in self.specs])
        return jax.tree.unflatten(structure, placed)

    def active(self) -> contextlib.AbstractContextManager[Any]:  # noqa: D102
        return jax.set_mesh(self.mesh)

    @property
    def local_shards(self) -> int:  # noqa: D102
        return sum(jax.process_index() in processes for processes in self._processes())

    @property
    def spans_processes(self) -> bool:  # noqa: D102
        return jax.process_count() > 1

    def holds(self, data: PyTree) -> bool:
        """Whether all leaves are on its devices. A leaf that JAX may move can be on any device."""
        leaves = jax.tree.leaves(data)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            return False
        if self.spans_processes:
            return not any(leaf.is_fully_addressable for leaf in leaves)
        devices = set(self.mesh.devices.flat)
        return all(leaf.sharding.device_set == devices or not leaf.committed for leaf in leaves)

    def require_own_rows(self) -> None:  # noqa: D102
        if self.spans_processes and any(len(processes) > 1 for processes in self._processes()):
            raise ValueError(
                f"Expected a mesh whose places along {self.axis!r} belong to one process each, so that each gives its "
                "own part of the data; lay the other axes inside a process, or give the data as global jax.Arrays."
            )

    def process_of(self, row: int, batch_size: int) -> int:  # noqa: D102
        return min(self._processes()[row * self.num_shards // batch_size])

    def _processes(self) -> list[set[int]]:
        """The processes at each position on the data axis."""
        devices = np.moveaxis(self.mesh.devices, self.mesh.axis_names.index(self.axis), 0)
        return [{device.process_index for device in row.flat} for row in devices.reshape(self.num_shards, -1)]

    def put(self, rows: PyTree) -> PyTree:  # noqa: D102
        sharding = self.on(PartitionSpec(self.axis))
        if not self.spans_processes:
            return jax.device_put(rows, sharding)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), rows)

    def zeros(self, shapes: PyTree, specs: Specs, by_shard: bool) -> PyTree:  # noqa: D102
        leaves, structure = jax.tree.flatten(shapes)

        def shape(leaf: Any, spec: PartitionSpec | None) -> tuple[int, ...]:
            return (self.num_shards, *leaf.shape) if by_shard and self._sharded_dim(spec) is None else leaf.shape

        zeros = [
            self.constrain(
                jnp.zeros(shape(leaf, spec), leaf.dtype),
                self._row_spec(spec) if by_shard else spec or PartitionSpec(),
            )
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, zeros)

    def per_shard(  # noqa: D102
        self,
        f: Callable[..., tuple[PyTree, PyTree]],
        replicated: PyTree,
        replicated_specs: Sequence[PartitionSpec],
        sums: PyTree,
        specs: Specs,
        rows: PyTree,
    ) -> tuple[PyTree, PyTree]:
        by_row = PartitionSpec(self.axis)
        leaves, structure = jax.tree.flatten(replicated)
        whole = [self._gathered(leaf, spec) for leaf, spec in zip(leaves, replicated_specs, strict=True)]

        def local(leaves: list[jax.Array], rows: PyTree) -> tuple[list[jax.Array], PyTree]:
            summed, of_rows = f(jax.tree.unflatten(structure, leaves), rows)
            flat = zip(jax.tree.leaves(summed), specs, strict=True)
            return [self._constrained_inside(leaf[None], spec) for leaf, spec in flat], of_rows

        local_sums, of_rows = self.mapped(local, (PartitionSpec(), by_row), (by_row, by_row))(whole, rows)
        mine = [self._scattered(leaf, spec) for leaf, spec in zip(local_sums, specs, strict=True)]
        return trees.add(sums, jax.tree.unflatten(jax.tree.structure(sums), mine)), of_rows

    def total(self, sums: PyTree, specs: Specs) -> PyTree:  # noqa: D102
        leaves, structure = jax.tree.flatten(sums)
        sharded = [self._sharded_dim(spec) is not None for spec in specs]
        rows = [leaf for leaf, is_sharded in zip(leaves, sharded, strict=True) if not is_sharded]

        def local(rows: list[jax.Array]) -> list[jax.Array]:
            mine = [row[0] for row in rows]
            # XLA rejects an all-reduce over an axis of one device beside axes that it shards itself.
            return mine if self.num_shards == 1 else jax.lax.psum(mine, self.axis)

        totals = iter(self.mapped(local, (PartitionSpec(self.axis),), PartitionSpec())(rows))
        whole = [leaf if is_sharded else next(totals) for leaf, is_sharded in zip(leaves, sharded, strict=True)]
        return self.constrain_all(jax.tree.unflatten(structure, whole), specs)

    def constrain_all(self, sums: PyTree, specs: Specs) -> PyTree:  # noqa: D102
        leaves, structure = jax.tree.flatten(sums)
        constrained = [self.constrain(leaf, spec or PartitionSpec()) for leaf, spec in zip(leaves, specs, strict=True)]
        return jax.tree.unflatten(structure, constrained)

    def replicate(self, leaf: jax.Array) -> jax.Array:  # noqa: D102
        return self.constrain(leaf, PartitionSpec())

    def constrain(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Shard a leaf by `spec`."""
        return jax.lax.with_sharding_constraint(leaf, self.on(spec))

    def mapped(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function that runs f on every device of the data axis, on its shard."""
        # Unchecked, since a loss_fn may start a loop with zeros that vary over no axis.
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={self.axis}, check_vma=False
        )

    def _sharded_dim(self, spec: PartitionSpec | None) -> int | None:
        """The dimension that `spec` shards over the data axis, if any."""
        for dim, entry in enumerate(spec or ()):
            if entry == self.axis or (isinstance(entry, tuple) and self.axis in entry):
                return dim
        return None

    def _others(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` without the data axis."""
        return PartitionSpec(*(tuple(a for a in _axes(entry) if a != self.axis) or None for entry in spec))

    def _data_last(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` with the data axis last in its dimension."""
        dim = self._sharded_dim(spec)
        others = enumerate(self._others(spec))
        return PartitionSpec(*((*_axes(entry), self.axis) if i == dim else entry for i, entry in others))

    def _row_spec(self, spec: PartitionSpec | None) -> PartitionSpec:
        """The spec of the sums of all devices: one row per device, unless the data axis already shards them."""
        if spec is None or self._sharded_dim(spec) is None:
            return PartitionSpec(self.axis, *(spec or ()))
        return spec

    def _constrained_inside(self, row: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        """Shard the row of a device over the other axes by `spec`."""
        others = self._others(spec or PartitionSpec())
        if not any(others):
            return row
        sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, *others))
        return jax.lax.with_sharding_constraint(row, sharding)

    def _gathered(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Gather a leaf over the data axis."""
        dim = self._sharded_dim(spec)
        if dim is None:
            return leaf
        gather = functools.partial(jax.lax.all_gather, axis_name=self.axis, axis=dim, tiled=True)
        return self._everywhere(gather, self._data_last(spec), self._others(spec))(leaf)

    def _scattered(self, rows: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        """The rows of the devices, summed and scattered if the leaf is sharded over the data axis."""
        dim = self._sharded_dim(spec)
        if spec is None or dim is None:
            return rows

        def scatter(row: jax.Array) -> jax.Array:
            return jax.lax.psum_scatter(row[0], self.axis, scatter_dimension=dim, tiled=True)

        added = self._everywhere(scatter, PartitionSpec(self.axis, *self._others(spec)), self._data_last(spec))(rows)
        return self.constrain(added, spec)

    def _everywhere(self, f: Callable[..., Any], in_spec: PartitionSpec, out_spec: PartitionSpec) -> Callable[..., Any]:
        """f on every device of the mesh. Over the data axis alone, the compiler would gather over the others too."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=(in_spec,), out_specs=out_spec, check_vma=False)


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _spec_on(mesh: Mesh, leaf: Any) -> PartitionSpec:
    """The spec of a leaf on this mesh. Replicated if it is elsewhere."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        same_axes = sharding.mesh.axis_names == mesh.axis_names
        if same_axes and np.array_equal(sharding.mesh.devices, mesh.devices):
            return sharding.spec
    return PartitionSpec()


def _data_axis(mesh: Mesh, data_axis: str | None) -> str:
    names = mesh.axis_names
    if data_axis is None and len(names) > 1 and "data" not in names:
        raise ValueError(f"Expected data_axis, the axis of the mesh to divide examples over, one of {names}, got None.")
    axis = data_axis or (names[0] if len(names) == 1 else "data")
    if axis not in names:
        raise ValueError(f"Expected data_axis in {names}, the axes of the mesh, got data_axis={axis!r}.")
    return axis
