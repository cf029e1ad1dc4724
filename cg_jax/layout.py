"""How a measurement lies on a mesh: examples over the data axis, parameters as their owner laid them out.

A device adds up the sums of its own examples in a row of its own, so that a batch costs no traffic, however many there
are; one all-reduce of the sums ends the measurement. Only a parameter that is itself divided over the data axis (FSDP)
is gathered for every batch, and its sum scattered.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cg_jax import trees

PyTree = Any
# Where each leaf of the sums lies: the spec of the parameter that it is like, or None for a scalar.
Specs = Sequence[PartitionSpec | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the axis that examples are divided over, and where each leaf of the parameters lies."""

    mesh: Mesh
    axis: str
    specs: tuple[PartitionSpec, ...]  # for each leaf of the parameters
    kept: tuple[PartitionSpec, ...]  # for each differentiable one

    @classmethod
    def of(cls, mesh: Mesh, data_axis: str | None, params: PyTree) -> "Layout":
        """The layout of parameters on a mesh. A leaf that does not lie on this mesh will lie on all of its devices.

        All axes are taken as Auto, whatever their type: the compiler divides the work over those that hold no data.

        Raises:
            ValueError: data_axis is no axis of the mesh, or is None where the mesh has several and none called "data".
        """
        axis = _data_axis(mesh, data_axis)
        mesh = _all_auto(mesh)
        leaves = jax.tree.leaves(params)
        specs = [_spec_on(mesh, leaf) for leaf in leaves]
        kept = [spec for spec, leaf in zip(specs, leaves, strict=True) if trees.is_differentiable(leaf)]
        return cls(mesh, axis, tuple(specs), tuple(kept))

    @property
    def num_shards(self) -> int:
        """Devices along the data axis."""
        return self.mesh.shape[self.axis]

    def on(self, spec: PartitionSpec) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, spec)

    def place(self, params: PyTree) -> PyTree:
        """The parameters on this mesh; nothing is copied where they lie there already."""
        leaves, structure = jax.tree.flatten(params)
        placed = jax.device_put(leaves, [self.on(spec) for spec in self.specs])
        return jax.tree.unflatten(structure, placed)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, this is JAX's current mesh, by which a loss_fn may constrain shardings."""
        return jax.set_mesh(self.mesh)

    def local_shards(self) -> int:
        """How many devices along the data axis this process feeds."""
        return sum(jax.process_index() in processes for processes in self._processes())

    def require_places_of_one_process(self) -> None:
        """ValueError where processes share a place of the data axis: each would have to give the same rows."""
        if any(len(processes) > 1 for processes in self._processes()):
            raise ValueError(
                f"Expected a mesh whose places along {self.axis!r} belong to one process each, so that each gives its "
                "own part of the data; lay the other axes inside a process, or give the data as global jax.Arrays."
            )

    def process_of(self, row: int, batch_size: int) -> int:
        """The process that feeds a row of a batch."""
        return min(self._processes()[row * self.num_shards // batch_size])

    def _processes(self) -> list[set[int]]:
        """The processes at each place of the data axis."""
        devices = np.moveaxis(self.mesh.devices, self.mesh.axis_names.index(self.axis), 0)
        return [{device.process_index for device in row.flat} for row in devices.reshape(self.num_shards, -1)]

    def put(self, rows: PyTree) -> PyTree:
        """A batch on the devices, of which every process gives its own rows."""
        sharding = self.on(PartitionSpec(self.axis))
        if jax.process_count() == 1:
            return jax.device_put(rows, sharding)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), rows)

    def zeros(self, shapes: PyTree, specs: Specs, by_shard: bool) -> PyTree:
        """Zeros for sums of these shapes; with `by_shard`, for those of every device."""
        leaves, structure = jax.tree.flatten(shapes)

        def shape(leaf: Any, spec: PartitionSpec | None) -> tuple[int, ...]:
            return (self.num_shards, *leaf.shape) if by_shard and self._divided(spec) is None else leaf.shape

        made = [
            self.constrain(
                jnp.zeros(shape(leaf, spec), leaf.dtype),
                self._row_spec(spec) if by_shard else spec or PartitionSpec(),
            )
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

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
        by_row = PartitionSpec(self.axis)
        leaves, structure = jax.tree.flatten(replicated)
        whole = [self._gathered(leaf, spec) for leaf, spec in zip(leaves, replicated_specs, strict=True)]

        def local(leaves: list[jax.Array], rows: PyTree) -> tuple[list[jax.Array], PyTree]:
            found, of_rows = f(jax.tree.unflatten(structure, leaves), rows)
            flat = zip(jax.tree.leaves(found), specs, strict=True)
            return [self._constrained_inside(leaf[None], spec) for leaf, spec in flat], of_rows

        found, of_rows = self.mapped(local, (PartitionSpec(), by_row), (by_row, by_row))(whole, rows)
        mine = [self._scattered(leaf, spec) for leaf, spec in zip(found, specs, strict=True)]
        return trees.add(sums, jax.tree.unflatten(jax.tree.structure(sums), mine)), of_rows

    def total(self, sums: PyTree, specs: Specs) -> PyTree:
        """The sums over the data axis, by one all-reduce."""
        leaves, structure = jax.tree.flatten(sums)
        divided = [self._divided(spec) is not None for spec in specs]
        rows = [leaf for leaf, is_divided in zip(leaves, divided, strict=True) if not is_divided]

        def local(rows: list[jax.Array]) -> list[jax.Array]:
            mine = [row[0] for row in rows]
            # XLA refuses an all-reduce over an axis of one device beside axes that it divides itself.
            return mine if self.num_shards == 1 else jax.lax.psum(mine, self.axis)

        totals = iter(self.mapped(local, (PartitionSpec(self.axis),), PartitionSpec())(rows))
        whole = [leaf if is_divided else next(totals) for leaf, is_divided in zip(leaves, divided, strict=True)]
        return self.constrain_all(jax.tree.unflatten(structure, whole), specs)

    def constrain_all(self, sums: PyTree, specs: Specs) -> PyTree:
        """Sums that lie as the specs say; scalars on every device."""
        leaves, structure = jax.tree.flatten(sums)
        lie = [self.constrain(leaf, spec or PartitionSpec()) for leaf, spec in zip(leaves, specs, strict=True)]
        return jax.tree.unflatten(structure, lie)

    def constrain(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """A leaf that lies as `spec` says."""
        return jax.lax.with_sharding_constraint(leaf, self.on(spec))

    def mapped(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """f on every device of the data axis, given its own part."""
        # Unchecked: a loss_fn may begin a loop with zeros that vary over no axis.
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={self.axis}, check_vma=False
        )

    def _divided(self, spec: PartitionSpec | None) -> int | None:
        """The dimension that `spec` divides over the data axis, if any."""
        for dim, entry in enumerate(spec or ()):
            if entry == self.axis or (isinstance(entry, tuple) and self.axis in entry):
                return dim
        return None

    def _others(self, spec: PartitionSpec) -> PartitionSpec:
        """The part of `spec` that is not about the data axis."""
        return PartitionSpec(*(tuple(a for a in _axes(entry) if a != self.axis) or None for entry in spec))

    def _data_last(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` with the data axis the last to divide its dimension."""
        dim = self._divided(spec)
        others = enumerate(self._others(spec))
        return PartitionSpec(*((*_axes(entry), self.axis) if i == dim else entry for i, entry in others))

    def _row_spec(self, spec: PartitionSpec | None) -> PartitionSpec:
        """Where the sums of every device lie: a row each, unless they are divided over the data axis anyway."""
        if spec is None or self._divided(spec) is None:
            return PartitionSpec(self.axis, *(spec or ()))
        return spec

    def _constrained_inside(self, row: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        """A device's row, which lies over the other axes as `spec` says."""
        others = self._others(spec or PartitionSpec())
        if not any(others):
            return row
        sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, *others))
        return jax.lax.with_sharding_constraint(row, sharding)

    def _gathered(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """A leaf gathered over the data axis."""
        dim = self._divided(spec)
        if dim is None:
            return leaf
        gather = functools.partial(jax.lax.all_gather, axis_name=self.axis, axis=dim, tiled=True)
        return self._everywhere(gather, self._data_last(spec), self._others(spec))(leaf)

    def _scattered(self, rows: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        """The rows of the devices; added up and scattered where the leaf is divided over the data axis."""
        dim = self._divided(spec)
        if spec is None or dim is None:
            return rows

        def scatter(row: jax.Array) -> jax.Array:
            return jax.lax.psum_scatter(row[0], self.axis, scatter_dimension=dim, tiled=True)

        added = self._everywhere(scatter, PartitionSpec(self.axis, *self._others(spec)), self._data_last(spec))(rows)
        return self.constrain(added, spec)

    def _everywhere(self, f: Callable[..., Any], in_spec: PartitionSpec, out_spec: PartitionSpec) -> Callable[..., Any]:
        """f on every device of the mesh. Over the data axis alone, the compiler would gather over the others too."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=(in_spec,), out_specs=out_spec, check_vma=False)


def as_auto(tree: PyTree) -> PyTree:
    """Arrays that lie as they do, on meshes whose axes are Auto; nothing is copied."""

    def relabel(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        return jax.device_put(leaf, NamedSharding(_all_auto(sharding.mesh), sharding.spec))

    return jax.tree.map(relabel, tree)


def auto_context() -> contextlib.AbstractContextManager[Any]:
    """While it is open, the mesh that the user has set, if its axes are Explicit, is one of Auto axes."""
    mesh = jax.sharding.get_mesh()
    return jax.set_mesh(_all_auto(mesh)) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def _all_auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _spec_on(mesh: Mesh, leaf: Any) -> PartitionSpec:
    """Where `leaf` lies, if it does on this mesh."""
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
