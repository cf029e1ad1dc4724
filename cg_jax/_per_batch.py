"""Build public functions of (params, batch): checks, compilation, Explicit axes, output shardings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cg_jax import _validate, trees
from cg_jax._compiled import Compiled, programs_of
from cg_jax._loss import LossFn, with_state
from cg_jax._types import PyTree
from cg_jax.sharding.explicit_axes import with_auto_axes

# (the value of an argument, params, B) → its value as arrays; raises if it is invalid
Check = Callable[[Any, PyTree, int], Any]


class PerBatch:
    """Build a function of (params, batch) for each loss from a body.

    The body is (loss_fn, params, batch, **arguments, **options) → (result, auxiliary values or None). Arguments are
    arrays, converted by `checks`. Options are static. The body's name without its leading underscore is the name of the
    public function. `specs` is (specs of the parameters, the axes that the examples are sharded over, **options) →
    specs of the pair. They shard the outputs on a mesh with Explicit axes. What is not `jitted` is for the caller's own
    jitted step: nothing is compiled for a loss, and what the loss captured is read at every call.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        specs: Callable[..., Any],
        checks: Mapping[str, Check] | None = None,
        jitted: bool = True,
    ) -> None:
        @functools.wraps(body)
        def of_arrays(
            loss_fn: LossFn, options: Any, params: PyTree, batch: PyTree, state: PyTree, arguments: dict[str, Any]
        ) -> Any:
            return body(with_state(loss_fn, state), params, batch, **arguments, **dict(options))

        self.name = body.__name__.lstrip("_")
        self.program = Compiled(of_arrays, static=1, taker=self.name) if jitted else None
        self.body = of_arrays
        self.specs, self.checks = specs, checks or {}

    def of(self, loss_fn: LossFn, has_aux: bool, **options: Any) -> Callable[..., Any]:
        """The function (params, batch, state, **arguments) → result, or with has_aux (result, auxiliary values)."""
        _validate.function("loss_fn", loss_fn)
        options |= {"has_aux": has_aux}
        static = tuple(sorted(options.items()))
        if self.program is None:
            program = functools.partial(self.body, loss_fn, static)
        else:
            program = functools.partial(self.program, programs_of(loss_fn), static)
        specs = functools.partial(self.specs, **options)

        def of_batch(params: PyTree, batch: PyTree, state: PyTree = None, **arguments: Any) -> Any:
            params, batch, size = _validate.arguments(params, batch)
            for name, check in self.checks.items():
                arguments[name] = check(arguments[name], params, size)
            result, aux = with_auto_axes(program, specs, params, batch, state, arguments)
            return (result, aux) if has_aux else result

        return of_batch


def mask_of(mask: Any, params: PyTree, size: int) -> jax.Array | None:
    """A mask, boolean [B], or None."""
    del params
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    _validate.mask_shape(mask, size)
    return mask


def weights_of(weights: Any, params: PyTree, size: int) -> jax.Array | None:
    """Weights, real [B], or None."""
    del params
    if weights is None:
        return None
    weights = jnp.asarray(weights)
    if weights.shape != (size,) or not jnp.issubdtype(weights.dtype, jnp.number) or jnp.iscomplexobj(weights):
        raise ValueError(
            f"Expected weights to be real numbers of shape [{size}], got weights of dtype {weights.dtype} and shape "
            f"{list(weights.shape)}."
        )
    return weights.astype(jnp.result_type(weights, jnp.float32))


def direction_of(direction: Any, params: PyTree, size: int) -> PyTree:
    """A direction with the structure of the differentiable leaves of params."""
    del size
    direction = _validate.arrays("direction", direction)
    kept, rest = trees.partition(params)
    along = trees.partition(direction)[0] if jax.tree.leaves(rest) else direction
    _validate.same_structure("direction", along, "params", kept)
    return jax.tree.map(jnp.asarray, along)


def rows_specs(params: PyTree, rows: Any, **_: Any) -> tuple[PartitionSpec, PartitionSpec]:
    """Specs of results and auxiliary values whose leading axis, the examples, is the only sharded axis."""
    del params
    return PartitionSpec(rows), PartitionSpec(rows)
