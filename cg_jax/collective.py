"""A rule across devices at the traffic of an all-reduce: all_to_all, the rule on a tile, all_gather.

Gathering all n gradients of P bytes moves (n − 1) P bytes to every device and stores n P there. Instead, each device
receives its tile of P/n bytes from every other device, applies the rule to the tile, and sends the result to all.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cg_jax import _compat, _validate, incoming
from cg_jax._types import PyTree
from cg_jax.rules import Rule, applied, require_rule
from cg_jax.sharding.axes import require_bound

_REMEDY = (  # without and with `stacked`
    "take g[0] of each leaf of micro_batch_grads(loss_fn, 1), or pass stacked=True for k gradients on every device",
    "stack k gradients on every device, as cg_jax.micro_batch_grads(loss_fn, k) does, or leave out stacked=True",
)


def across_devices(rule: Rule, axis_name: Any, stacked: bool = False) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies the rule to the gradients of the n devices of an axis. The result is replicated.

    Use it inside `jax.shard_map`, `jax.pmap` or `jax.vmap` with that axis name, on the gradient of each device. Put it
    **first** in `optax.chain`. Wrappers that store or accumulate updates (`optax.MultiSteps`, `m3`) wrap only the
    transformations after it. Before it, updates differ between devices, and so would a state that holds them. With
    check_vma=False there is no error for this.

    The result is bit for bit that of gathering all gradients and applying the rule to [n, *shape]. But every device
    receives 2 P (n − 1)/n bytes instead of (n − 1) P, and holds at most 3 P instead of n P. P is the bytes of one
    gradient (with `stacked`, k times that). The result varies over no axis, so a training step may return it with
    `out_specs=P()`. Pass `params` to `update` to compare the shapes of the updates with it.

    Inside shard_map, JAX sums `jax.grad` with respect to replicated parameters over the devices. For the gradient of
    one device, cast the parameters first, `jax.lax.pcast(params, axis_name, to="varying")`, or use `micro_batch_grads`,
    which does so. Make the shard_map manual over all axes of the mesh. Otherwise parameters that the compiler shards
    over another axis are gathered for the exchange.

    Over one axis of a mesh of two, groups of devices count as one: average inside a group, and apply the rule across
    groups. With `jax.lax.pmean(grads, "inner")` before it, 8 devices as 4 groups of 2 give the median of 4. With
    stacked=True, k micro-batches on each of n devices give the rule of k n gradients. The papers' M3 is neither: each
    of its three mini-batches is sharded over all devices, which is `pmean` of [3, *shape] and then `median_of_k(3)`.

    Args:
        rule: A coordinate-wise function [k, *shape] → [*shape], such as `cg_jax.median()`.
        axis_name: The axis of the shard_map, pmap or vmap; one or several names.
        stacked: The updates are [k, *shape]. The rule receives all k · n of them, device by device.

    Returns:
        A `GradientTransformationExtraArgs` without state.

    Raises:
        TypeError: rule is not a function of k values.
        ValueError: At an update: there is no shard_map, pmap or vmap over that axis; updates are replicated over the
            axis, if JAX tracks this (check_vma); shapes differ from those of `params`, if given ([k, *shape] with
            stacked); leading axes disagree (with stacked); the rule does not turn [k, *shape] into [*shape].

    References:
        Zielinski, Krishnan & Chatterjee, Weak and Strong Gradient Directions, 2020, https://arxiv.org/abs/2003.07422.

    Examples:
        >>> import jax, optax, cg_jax as cg
        >>> from jax.sharding import PartitionSpec as P
        >>> optimizer = optax.chain(cg.across_devices(cg.median(), "data"), optax.sgd(0.1))
        >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> step = lambda grads: optimizer.update(grads[0], optimizer.init(grads[0]))[0]
        >>> jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P()))(jax.numpy.ones((1, 2)))
        Array([-0.1, -0.1], dtype=float32)
    """
    require_rule(rule)
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name

    def update_fn(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, Any]:
        del extra_args
        updates = incoming.arrays(updates)
        if stacked:
            incoming.require_unmasked(updates, "across_devices(…, stacked=True)")
        if params is not None:
            incoming.require_shapes(updates, params, _REMEDY[stacked], stacked)
        if stacked:
            _validate.leading_axis("updates", updates)
        incoming.require_floating(updates)
        _check(updates, axis_name)
        leaves, structure = jax.tree.flatten(updates)
        out = list(leaves)
        # One buffer per dtype and set of varying axes. Leaves of one buffer vary over all axes of any of them.
        kinds = [(jnp.result_type(leaf), _compat.varying_axes(leaf), leaf.size > 0) for leaf in leaves]
        for kind in dict.fromkeys(kinds):
            places = [i for i, each in enumerate(kinds) if each == kind]
            results = _of_one_kind(rule, axis_name, [leaves[i] for i in places], stacked)
            for i, leaf in zip(places, results, strict=True):
                out[i] = leaf
        whole = jax.tree.unflatten(structure, out)
        return whole if params is None else incoming.with_zeros(whole, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _names(axis_name: Any) -> tuple[Any, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _check(updates: PyTree, axis_name: Any) -> None:
    names = require_bound(axis_name, "across_devices")
    tracked = _compat.tracked_axes() & set(names)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        missing = [name for name in names if name in tracked - _compat.varying_axes(leaf)]
        if missing:
            raise ValueError(
                f"Expected updates that each device of axis {missing[0]!r} has its own of, got updates"
                f"{jax.tree_util.keystr(path)} that is the same on all; leave out jax.lax.pmean or psum, put "
                "optax.MultiSteps after across_devices, or, where jax.grad summed over devices, cast the parameters "
                f"first: params = jax.lax.pcast(params, {missing[0]!r}, to='varying')."
            )


def _plain_all_gather(tile: jax.Array, axis_name: Any) -> jax.Array:
    return jax.lax.all_gather(tile, axis_name, tiled=True)


def _of_one_kind(rule: Rule, axis_name: Any, leaves: Sequence[jax.Array], stacked: bool) -> list[jax.Array]:
    """Apply the rule across the devices to one buffer that holds all leaves."""
    if not leaves[0].size:
        return [jnp.zeros(leaf.shape[1:] if stacked else leaf.shape, leaf.dtype) for leaf in leaves]
    n, shapes = jax.lax.axis_size(axis_name), [leaf.shape[1:] if stacked else leaf.shape for leaf in leaves]
    rows = leaves[0].shape[0] if stacked else 1
    flat = jnp.concatenate([leaf.reshape(rows, -1) for leaf in leaves], axis=1)
    size = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, -size % n)))
    # Under vmap, pmap and check_vma=False JAX does not track varying values. vmap rejects the invarying gather below,
    # and it cannot exchange values that it takes for replicated.
    tracked = _compat.varying_axes(flat) >= set(_names(axis_name))
    flat = flat if tracked else jnp.where(jax.lax.axis_index(axis_name) >= 0, flat, flat)
    tile = jax.lax.all_to_all(flat, axis_name, split_axis=1, concat_axis=0, tiled=True)
    gather = _compat.all_gather_invarying if tracked else _plain_all_gather
    whole = gather(applied(rule, tile), axis_name)[:size]
    ends = itertools.accumulate(map(math.prod, shapes), initial=0)
    return [whole[a:b].reshape(shape) for (a, b), shape in zip(itertools.pairwise(ends), shapes, strict=True)]
