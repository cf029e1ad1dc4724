"""Layouts of a measurement, and meshes with Explicit axes."""

from typing import Any

from jax.sharding import Mesh

from cg_jax.sharding.layout import Layout, SingleDevice, Specs
from cg_jax.sharding.on_mesh import OnMesh

__all__ = ["Layout", "OnMesh", "SingleDevice", "Specs", "layout_of"]


def layout_of(mesh: Any, data_axis: str | None, params: Any, state: Any) -> Layout:
    """The layout of parameters and state on a mesh, or on one device if mesh is None.

    Sums are sharded like the parameters.

    Raises:
        TypeError: mesh is neither a jax.sharding.Mesh nor None.
        ValueError: data_axis is not an axis of the mesh, is None for a mesh with several axes and no axis "data", or is
            given without a mesh.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"Expected mesh to be a jax.sharding.Mesh or None, got {type(mesh).__name__}; jax.make_mesh makes one."
        )
    if data_axis is not None and (mesh is None or not isinstance(data_axis, str)):
        what = "with mesh" if mesh is None else "to be the name of one axis"
        raise ValueError(f"Expected data_axis {what}, got data_axis={data_axis!r}.")
    return SingleDevice() if mesh is None else OnMesh.of(mesh, data_axis, params, state)
