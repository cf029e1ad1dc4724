"""A rule across devices at the traffic of an all-reduce: all_to_all, the rule on a tile, all_gather.

To gather all n gradients of P bytes moves (n − 1) P to every device and keeps n P there. Instead each device is sent
its tile of P/n bytes from every other, applies the rule to it, and sends the result around.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cg_jax import _compat, _validate
from cg_jax.rules import Rule, applied, require_rule

PyTree = Any


def across_devices(rule: Rule, axis_name: Any, stacked: bool = False) -> optax.GradientTransformationExtraArgs:
    """The transformation that turns the gradients of the n devices of an axis into rule(them), the same on all devices.

    For use inside `jax.shard_map` or `jax.pmap`, on each device's own gradient. It comes **first** in `optax.chain`;
    wrappers that keep or accumulate updates (`optax.MultiSteps`, `m3`) go around what comes after it, for before it
    updates differ between devices, and so would a state that holds them. The result is bit for bit that of
    gathering all gradients and applying the rule to [n, *shape], but every device receives 2 P (n − 1)/n bytes instead
    of (n − 1) P, and holds at most 3 P instead of n P, with P the bytes of one gradient (with `stacked`, k times that).
    The result varies over no axis: a training step may return it with `out_specs=P()`.

    Inside shard_map, `jax.grad` with respect to parameters that are the same on all devices is summed over them. For a
    device's own gradient cast the parameters first, `jax.lax.pcast(params, axis_name, to="varying")`, or take
    `micro_batch_grads`, which does. Make the shard_map manual over all axes of the mesh: parameters that the compiler
    divides over a further axis would be gathered for the exchange.

    Over an axis of a mesh of two, groups of devices count as one: average inside a group, and take the rule across
    groups. With `jax.lax.pmean(grads, "inner")` before it, 8 devices as 4 groups of 2 give the median of 4. With
    stacked=True, k micro-batches on each of n devices give the rule of k n gradients. The papers' M3 is neither: its
    three mini-batches are spread over all devices each, `pmean` of [3, *shape] and then `median_of_k(3)`.

    Args:
        rule: A coordinate-wise function [k, *shape] → [*shape], as `cg_jax.median()`.
        axis_name: The axis of the shard_map or pmap; one or several names.
        stacked: The updates are [k, *shape], and the rule sees the k · n of all devices, device by device.

    Returns:
        A `GradientTransformationExtraArgs` without state.

    Raises:
        TypeError: rule is no function of k values.
        ValueError: When it meets updates: outside of a shard_map or pmap over that axis; updates that are the same on
            every device of the axis, where JAX tells (check_vma); with stacked, leading axes that disagree; a rule that
            does not make [*shape] of [k, *shape].

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
        del params, extra_args
        if stacked:
            _validate.leading_axis("updates", updates)
        leaves, structure = jax.tree.flatten(updates)
        _check(leaves, axis_name)
        out = list(leaves)
        # One buffer for leaves of a dtype that vary over the same axes: together they would vary over all of those.
        kinds = [(jnp.result_type(leaf), _compat.varying_axes(leaf), leaf.size > 0) for leaf in leaves]
        for kind in dict.fromkeys(kinds):
            places = [i for i, each in enumerate(kinds) if each == kind]
            found = _of_one_kind(rule, axis_name, [leaves[i] for i in places], stacked)
            for i, leaf in zip(places, found, strict=True):
                out[i] = leaf
        return jax.tree.unflatten(structure, out), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _check(leaves: Sequence[jax.Array], axis_name: Any) -> None:
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    try:
        tracked = _compat.varying_axes(*(jax.lax.axis_index(name) for name in names))
    except NameError:
        around = _compat.bound_axes()
        found = f"axes {', '.join(map(repr, around))}" if around else "none"
        raise ValueError(
            f"Expected a shard_map or pmap over axis_name={axis_name!r} around across_devices, got {found}."
        ) from None
    for leaf in leaves:
        missing = [name for name in names if name in tracked - _compat.varying_axes(leaf)]
        if missing:
            raise ValueError(
                f"Expected updates that each device of axis {missing[0]!r} has its own of, got some that are the same "
                "on all: inside shard_map jax.grad sums over devices where parameters are the same on all. Cast them "
                f"before: params = jax.lax.pcast(params, {missing[0]!r}, to='varying')."
            )


def _of_one_kind(rule: Rule, axis_name: Any, leaves: Sequence[jax.Array], stacked: bool) -> list[jax.Array]:
    """The rule over the devices, on one buffer of all leaves."""
    if not leaves[0].size:
        return [jnp.zeros(leaf.shape[1:] if stacked else leaf.shape, leaf.dtype) for leaf in leaves]
    n, shapes = jax.lax.axis_size(axis_name), [leaf.shape[1:] if stacked else leaf.shape for leaf in leaves]
    rows = leaves[0].shape[0] if stacked else 1
    flat = jnp.concatenate([leaf.reshape(rows, -1) for leaf in leaves], axis=1)
    size = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, -size % n)))
    tile = jax.lax.all_to_all(flat, axis_name, split_axis=1, concat_axis=0, tiled=True)
    whole = _compat.all_gather_invarying(applied(rule, tile), axis_name)[:size]
    ends = itertools.accumulate(map(math.prod, shapes), initial=0)
    return [whole[a:b].reshape(shape) for (a, b), shape in zip(itertools.pairwise(ends), shapes, strict=True)]
