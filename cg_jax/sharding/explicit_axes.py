"""Run functions on Explicit-axis meshes as if Auto, then restore shardings.

With Explicit axes, JAX requires the output sharding of some operations on a sharded axis. The operations of this
library on the axis of the examples are such operations, and the user's loss under vmap may contain more. With Auto
axes the compiler decides.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cg_jax import _compat, trees
from cg_jax._types import PyTree

# (spec of each parameter, the axes that the examples are sharded over) → spec of each output
OutSpecs = Callable[[PyTree, Any], PyTree]


def with_auto_axes(f: Callable[..., PyTree], out_specs: OutSpecs, params: PyTree, batch: PyTree, *more: PyTree) -> Any:
    """f(params, batch, *more), with outputs sharded by `out_specs` if an argument is on an Explicit-axis mesh."""
    meshes = [sharding.mesh for sharding in map(_sharding, jax.tree.leaves((params, batch, more))) if sharding]
    if not meshes:
        return f(params, batch, *more)
    kinds = zip(meshes[0].axis_names, meshes[0].axis_types, strict=True)
    names = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    rows = next((spec[0] for spec in map(_spec, jax.tree.leaves(batch)) if spec), None)
    specs = out_specs(jax.tree.map(_spec, trees.partition(params)[0]), rows)
    shardings = jax.tree.map(lambda spec: NamedSharding(meshes[0], spec), specs)
    auto: Any = jax.sharding.auto_axes(axes=names, out_sharding=shardings)
    return auto(f)(params, batch, *more)


def _sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a leaf on a mesh with Explicit axes, else None."""
    sharding = jax.typeof(leaf).sharding if _compat.is_tracer(leaf) else getattr(leaf, "sharding", None)
    is_explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def _spec(leaf: Any) -> P:
    sharding = _sharding(leaf)
    return P() if sharding is None else sharding.spec


def per_example_spec(rows: Any, spec: P) -> P:
    """The spec of [B, *shape] for a leaf [*shape] with this spec, where B is sharded over `rows`."""
    taken = rows if isinstance(rows, tuple) else (rows,)
    others = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return P(
        rows, *(tuple(axis for axis in entry if axis is not None and axis not in taken) or None for entry in others)
    )


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def auto_arrays(tree: PyTree) -> PyTree:
    """The same arrays with the same sharding, on meshes with Auto axes. Nothing is copied."""

    def relabel(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        return jax.device_put(leaf, NamedSharding(auto_mesh(sharding.mesh), sharding.spec))

    return jax.tree.map(relabel, tree)


def auto_context() -> contextlib.AbstractContextManager[Any]:
    """A context in which the mesh set by the user has Auto axes."""
    mesh = jax.sharding.get_mesh()
    return jax.set_mesh(auto_mesh(mesh)) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()
