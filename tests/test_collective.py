"""A rule across devices: the bits of gathering everything, the traffic of an all-reduce."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, trees_close
from jax.sharding import PartitionSpec as P

import cg_jax as cg
from benchmarks import programs

GROUPS = mesh_of(4, 2, names=("data", "inner"))
HOW = ["checked", "unchecked", "pmap"]
RULES = {"median": cg.median(), "mean": cg.mean(), "trimmed_mean": cg.trimmed_mean(1)}


def _grads(n, *leading):
    rng = np.random.default_rng(n)
    shapes = {"w": (7, 5), "b": (3,), "scalar": (), "none": (0, 2), "narrow": (4, 3)}
    grads = {name: rng.normal(size=(n, *leading, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return grads | {"narrow": jnp.asarray(grads["narrow"], jnp.bfloat16)}


def _mapped(transform, how, n):
    """grads [n, ...] → what the transformation yields, which is the same on all devices."""

    def one(grads):
        return transform.update(grads, transform.init(None))[0]

    if how == "pmap":
        over = jax.pmap(one, axis_name="data", devices=jax.devices()[:n])
        return lambda grads: jax.tree.map(lambda leaf: leaf[0], over(grads))

    def local(grads):
        return one(jax.tree.map(lambda leaf: leaf[0], grads))

    mapped = jax.shard_map(local, mesh=mesh_of(n), in_specs=P("data"), out_specs=P(), check_vma=how == "checked")
    return jax.jit(mapped)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_the_result_is_bit_for_bit_the_rule_of_all_gradients(rule, n, how):
    rule, grads = RULES[rule], _grads(n)
    want = jax.jit(cg.stacked(rule).update)(grads, None)[0]
    chex.assert_trees_all_equal(_mapped(cg.across_devices(rule, "data"), how, n)(grads), want)


@pytest.mark.parametrize("how", HOW)
def test_micro_batches_on_every_device_are_one_set(how):
    n, k = 4, 3
    grads = _grads(n, k)
    together = jax.tree.map(lambda leaf: leaf.reshape(n * k, *leaf.shape[2:]), grads)
    want = jax.jit(cg.stacked(cg.median()).update)(together, None)[0]
    chex.assert_trees_all_equal(_mapped(cg.across_devices(cg.median(), "data", stacked=True), how, n)(grads), want)


def test_the_papers_m3_is_the_median_of_three_means_over_devices():
    n, k = 4, 3
    grads = _grads(n, k)
    transform = cg.median_of_k(k)

    def local(grads):
        grads = jax.lax.pmean(jax.tree.map(lambda leaf: leaf[0], grads), "data")
        return transform.update(grads, transform.init(None))[0]

    got = jax.jit(jax.shard_map(local, mesh=mesh_of(n), in_specs=P("data"), out_specs=P()))(grads)
    want = np.median(np.asarray(grads["w"], np.float64).mean(0), axis=0)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-6)


def test_groups_of_devices_average_inside_and_take_the_median_across():
    grads = _grads(8)
    transform = cg.across_devices(cg.median(), "data")

    def local(grads):
        grads = jax.lax.pmean(jax.tree.map(lambda leaf: leaf[0], grads), "inner")
        return transform.update(grads, transform.init(None))[0]

    got = jax.jit(jax.shard_map(local, mesh=GROUPS, in_specs=P(("data", "inner")), out_specs=P()))(grads)
    want = np.median(np.asarray(grads["w"], np.float64).reshape(4, 2, 7, 5).mean(1), axis=0)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-6)


def test_two_axes_together_are_one():
    grads = _grads(8)
    transform = cg.across_devices(cg.median(), ("data", "inner"))

    def local(grads):
        return transform.update(jax.tree.map(lambda leaf: leaf[0], grads), transform.init(None))[0]

    got = jax.jit(jax.shard_map(local, mesh=GROUPS, in_specs=P(("data", "inner")), out_specs=P()))(grads)
    chex.assert_trees_all_equal(got, jax.jit(cg.stacked(cg.median()).update)(grads, None)[0])


def test_leaves_that_vary_over_other_axes_too_and_kinds_without_numbers():
    transform = cg.across_devices(cg.median(), ["data"])
    grads = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2), "b": np.arange(4.0, dtype=np.float32)}
    grads |= {"none": jnp.zeros((4, 0), jnp.bfloat16), "left out": None}

    def local(grads):
        mine = {"w": grads["w"][0], "b": grads["b"][0], "none": grads["none"][0], "left out": None}
        return transform.update(mine, transform.init(None))[0]

    given = {"w": P("data", "inner"), "b": P("data"), "none": P("data"), "left out": None}
    out = {"w": P("inner"), "b": P(), "none": P(), "left out": None}
    got = jax.jit(jax.shard_map(local, mesh=GROUPS, in_specs=(given,), out_specs=out))(grads)
    np.testing.assert_array_equal(got["w"], np.median(grads["w"], 0))
    np.testing.assert_array_equal(got["b"], np.median(grads["b"], 0))
    assert got["none"].shape == (0,)


SIZE = 100_003


def _programs(n, *leading):
    """(across_devices, gathering everything), compiled for SIZE numbers on n devices."""
    stacked = bool(leading)
    transform = cg.across_devices(cg.median(), "data", stacked=stacked)

    def ours(grads):
        return transform.update(grads[0], transform.init(None))[0]

    def gathering(grads):
        gathered = jax.lax.all_gather(grads[0], "data", to="invarying")
        return cg.median()(gathered.reshape(-1, *gathered.shape[1 + len(leading) :]))

    shape = jax.ShapeDtypeStruct((n, *leading, SIZE), jnp.float32)
    mapped = [jax.shard_map(f, mesh=mesh_of(n), in_specs=P("data"), out_specs=P()) for f in (ours, gathering)]
    return [jax.jit(f).lower(shape).compile() for f in mapped]


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_traffic_is_that_of_an_all_reduce_and_the_memory_three_gradients(n):
    ours, gathering = _programs(n)
    padded = 4 * (SIZE + -SIZE % n)
    # Of what either collective yields, 1/n was there already: 2 P (n − 1)/n are received.
    assert programs.collectives(ours) == [("all-to-all", padded), ("all-gather", padded)]
    assert ours.memory_analysis().temp_size_in_bytes <= 3 * padded
    assert programs.moved(gathering) == n * 4 * SIZE
    if n > 2:
        assert ours.memory_analysis().temp_size_in_bytes < gathering.memory_analysis().temp_size_in_bytes


def test_stacked_moves_and_holds_k_times_as_much():
    ours, _ = _programs(8, 3)
    padded = 4 * (SIZE + -SIZE % 8)
    assert programs.collectives(ours) == [("all-to-all", 3 * padded), ("all-gather", padded)]
    assert ours.memory_analysis().temp_size_in_bytes <= 3 * 3 * padded


def _loss(w, example):
    x, y = example
    return 0.5 * (x @ w["w"] + w["b"] - y) ** 2


@pytest.mark.parametrize("how", ["micro_batch_grads", "pcast", "unchecked", "pmap"])
def test_a_training_step_returns_parameters_that_are_the_same_on_all_devices(how):
    n, rng = 4, np.random.default_rng(0)
    x, y = rng.normal(size=(24, 5)).astype(np.float32), rng.normal(size=24).astype(np.float32)
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    optimizer = optax.chain(cg.across_devices(cg.median(), "data"), optax.adam(0.1))

    def gradient(params, batch):
        if how == "micro_batch_grads":
            return jax.tree.map(lambda g: g[0], cg.micro_batch_grads(_loss, 1)(params, batch))
        if how == "pcast":
            params = jax.lax.pcast(params, "data", to="varying")
        return jax.grad(lambda p: jax.vmap(_loss, (None, 0))(p, batch).mean())(params)

    def step(params, state, batch):
        updates, state = optimizer.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    single = optax.chain(cg.median_of_k(n), optax.adam(0.1))
    want, want_state, state = params, single.init(params), optimizer.init(params)
    if how == "pmap":
        over = jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:n])
        batch = (x.reshape(n, -1, 5), y.reshape(n, -1))
    else:
        specs = (P(), P(), P("data"))
        checked = how != "unchecked"
        over = jax.jit(jax.shard_map(step, mesh=mesh_of(n), in_specs=specs, out_specs=P(), check_vma=checked))
        batch = (x, y)
    for _ in range(3):
        params, state = over(params, state, batch)
        grads = cg.micro_batch_grads(_loss, n)(want, (x, y))
        updates, want_state = single.update(grads, want_state, want)
        want = optax.apply_updates(want, updates)
    trees_close(params, want)


def test_a_gradient_that_was_summed_over_devices_is_refused():
    transform = cg.across_devices(cg.median(), "data")

    def step(w, x):
        grads = jax.grad(lambda w: (w * x).sum())(w)
        return transform.update(grads, transform.init(w))[0]

    mapped = jax.shard_map(step, mesh=mesh_of(4), in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"each device of axis 'data' .* jax\.lax\.pcast\(params, 'data'"):
        jax.jit(mapped)(jnp.ones(()), jnp.ones(4))


def test_outside_of_a_map_it_says_so():
    transform = cg.across_devices(cg.median(), "data")
    with pytest.raises(ValueError, match=r"Expected a shard_map, pmap or vmap over axis_name='data' around"):
        transform.update(jnp.ones(3), transform.init(None))


def test_another_axis_is_named_and_what_is_there_instead():
    transform = cg.across_devices(cg.median(), "batch")
    mapped = jax.shard_map(
        lambda g: transform.update(g, transform.init(None))[0], mesh=mesh_of(4), in_specs=P("data"), out_specs=P("data")
    )
    with pytest.raises(ValueError, match=r"over axis_name='batch' around across_devices, got axes 'data'\."):
        jax.jit(mapped)(jnp.ones(4))


@pytest.mark.parametrize(
    "make", [lambda rule: cg.across_devices(rule, "data"), cg.stacked, lambda rule: cg.rolling(rule, 3)]
)
def test_what_is_no_rule_is_refused(make):
    with pytest.raises(TypeError, match=r"Expected a rule, as cg_jax\.median\(…\) makes it, got cg_jax\.median itself"):
        make(cg.median)
    with pytest.raises(TypeError, match=r"Expected rule to be a function, got str"):
        make("median")
    transform = make(lambda values: values.mean())

    def update(grads):
        return transform.update(grads[0], transform.init(grads[0]))[0]

    mapped = jax.shard_map(update, mesh=mesh_of(2), in_specs=P("data"), out_specs=P("data"), check_vma=False)
    with pytest.raises(ValueError, match=r"Expected a coordinate-wise rule, .* got one that makes shape \[\] of \["):
        jax.jit(mapped)(jnp.ones((2, 3, 4)))
