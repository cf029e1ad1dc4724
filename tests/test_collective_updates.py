"""`across_devices` under vmap, and the updates that it refuses or lets pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import PartitionSpec as P

import cg_jax as cg

MESH = mesh_of(4)


def _grads(*leading):
    rng = np.random.default_rng(0)
    shapes = {"w": (7, 5), "b": (3,), "scalar": (), "none": (0, 2), "narrow": (4, 3)}
    grads = {name: rng.normal(size=(*leading, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return grads | {"narrow": jnp.asarray(grads["narrow"], jnp.bfloat16)}


@pytest.mark.parametrize("out_axes", [0, None])
@pytest.mark.parametrize("stacked", [False, True])
def test_under_vmap_the_rows_are_the_devices(stacked, out_axes):
    n, k = 4, 3
    grads = _grads(n, k) if stacked else _grads(n)
    transform = cg.across_devices(cg.median(), "data", stacked=stacked)

    def one(grads):
        return transform.update(grads, transform.init(None))[0]

    got = jax.jit(jax.vmap(one, axis_name="data", out_axes=out_axes))(grads)
    together = jax.tree.map(lambda leaf: leaf.reshape(n * k, *leaf.shape[2:]), grads) if stacked else grads
    want = jax.jit(cg.stacked(cg.median()).update)(together, None)[0]
    for row in [got] if out_axes is None else [jax.tree.map(lambda leaf, i=i: leaf[i], got) for i in range(n)]:
        chex.assert_trees_all_equal(row, want)


def test_vmap_inside_shard_map():
    grads, transform = _grads(4, 3), cg.across_devices(cg.median(), "data")

    def local(grads):
        return jax.vmap(lambda g: transform.update(g, None)[0])(jax.tree.map(lambda leaf: leaf[0], grads))

    got = jax.jit(jax.shard_map(local, mesh=MESH, in_specs=P("data"), out_specs=P()))(grads)
    chex.assert_trees_all_equal(got, jax.jit(cg.stacked(cg.median()).update)(grads, None)[0])


def _in_shard_map(transform, gradient, check_vma=True):
    """One update on 4 devices, of a gradient made from (params, x)."""
    params = {"w": jnp.ones(2), "b": jnp.ones(())}

    def step(params, x):
        return transform.update(gradient(params, x), transform.init(params), params)[0]

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    return jax.jit(mapped)(params, jnp.ones((4, 2)))


def _own(params, x):
    return jax.tree.map(lambda g: g[0], _rows(params, x))


def _rows(params, x):
    return cg.micro_batch_grads(lambda p, x: (x @ p["w"] + p["b"]) ** 2, 1)(params, x)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(
    ("stacked", "gradient", "message"),
    [
        (
            False,
            _rows,
            r"updates\['b'\] of shape \[\], .* got shape \[1\]; take g\[0\] of each leaf of micro_batch_grads",
        ),
        (True, _own, r"updates\['b'\] of shape \[k\], .* got shape \[\]; stack k gradients on every device, as"),
    ],
    ids=["not taken apart", "not stacked"],
)
def test_shapes_are_compared_with_params(stacked, gradient, message, check_vma):
    transform = optax.chain(cg.across_devices(cg.median(), "data", stacked=stacked), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        _in_shard_map(transform, gradient, check_vma)


def test_numbers_and_integer_leaves():
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    transform = optax.chain(cg.across_devices(cg.median(), "data"), optax.sgd(1.0))

    def step(x):
        grads = {"w": x[0], "n": None}
        return optax.apply_updates(params, transform.update(grads, transform.init(params), params)[0])

    got = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=P("data"), out_specs=P()))(jnp.ones((4, 2)))
    chex.assert_trees_all_equal(got, {"w": jnp.zeros(2), "n": jnp.arange(3)})
    update = cg.across_devices(cg.median(), "data").update
    assert float(jax.vmap(lambda _: update(0.5, None)[0], axis_name="data")(jnp.ones(4))[0]) == 0.5


WRONG = {
    "pmean before": (lambda t: t, lambda p, x: jax.lax.pmean(_own(p, x), "data")),
    "MultiSteps around": (lambda t: optax.MultiSteps(t, 2), _own),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_the_same_on_all_devices_names_each_remedy(name):
    wrap, gradient = WRONG[name]
    message = (
        r"got updates\['b'\] that is the same on all; leave out jax\.lax\.pmean or psum, put optax\.MultiSteps after "
        r"across_devices, or, where jax\.grad summed"
    )
    with pytest.raises(ValueError, match=message):
        _in_shard_map(wrap(optax.chain(cg.across_devices(cg.median(), "data"), optax.sgd(0.1))), gradient)


def test_multi_steps_after_it_accumulates_what_is_the_same_on_all():
    transform = optax.chain(cg.across_devices(cg.median(), "data"), optax.MultiSteps(optax.sgd(1.0), 1))
    updates = _in_shard_map(transform, _own)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, -6.0), updates)
