"""Zeros and transposed functions that also work inside `jax.shard_map`, where a value may vary over mesh axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cg_jax import _compat


def zeros(like: Any, leading: tuple[int, ...] = ()) -> jax.Array:
    """Zeros [*leading, *shape] with the dtype and the varying axes of an aval."""
    return _compat.vary(jnp.zeros((*leading, *like.shape), like.dtype), _compat.varying_axes(like))


def transposed(f: Callable[..., Any], shape: Sequence[int], cotangent: Any) -> Any:
    """fᵀ(cotangent) of a linear f of one array of this shape, in the cotangent's dtype, without a sum over devices."""
    (leaf, *_) = jax.tree.leaves(cotangent)
    zeros_in = _compat.vary(jnp.zeros(tuple(shape), leaf.dtype), _compat.varying_axes(cotangent))
    return jax.vjp(f, zeros_in)[1](cotangent)[0]
