"""Arrays on a mesh with Explicit axes: computed with as if those were Auto, and handed back as the arguments lie.

Under Explicit axes JAX asks of some operations on a divided axis how their result is to lie. What is done here to the
axis of the examples is such, and so may be the user's loss under vmap; the compiler can answer by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cg_jax import _compat, trees

PyTree = Any
# (where each parameter lies, over what the examples are divided) → where each output lies
Lies = Callable[[PyTree, Any], PyTree]


def relaxed(f: Callable[..., PyTree], lies: Lies, params: PyTree, batch: PyTree, *more: PyTree) -> PyTree:
    """f(params, batch, *more)."""
    meshes = [sharding.mesh for sharding in map(_sharding, jax.tree.leaves((params, batch, more))) if sharding]
    if not meshes:
        return f(params, batch, *more)
    kinds = zip(meshes[0].axis_names, meshes[0].axis_types, strict=True)
    names = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    rows = next((spec[0] for spec in map(_spec, jax.tree.leaves(batch)) if spec), None)
    out = lies(jax.tree.map(_spec, trees.partition(params)[0]), rows)
    shardings = jax.tree.map(lambda spec: NamedSharding(meshes[0], spec), out)
    relaxing: Any = jax.sharding.auto_axes(axes=names, out_sharding=shardings)
    return relaxing(f)(params, batch, *more)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Where a leaf lies, if on a mesh with Explicit axes."""
    sharding = jax.typeof(leaf).sharding if _compat.is_tracer(leaf) else getattr(leaf, "sharding", None)
    there = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if there else None


def _spec(leaf: Any) -> P:
    sharding = _sharding(leaf)
    return P() if sharding is None else sharding.spec


def behind(rows: Any, spec: P) -> P:
    """Where a row for each example of what lies as `spec` lies: over what the examples are, and over the rest."""
    taken = rows if isinstance(rows, tuple) else (rows,)
    others = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return P(
        rows, *(tuple(axis for axis in entry if axis is not None and axis not in taken) or None for entry in others)
    )
