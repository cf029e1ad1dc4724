"""Robust averages over devices: the result and every statistic are those of the whole batch on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of, mlp_loss, mlp_params, trees_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg
from benchmarks.programs import collectives

B = 16
WEIGHTINGS = {
    "clip_norm": cg.clip_norm(0.5),
    "per_tensor": cg.clip_norm(0.5, per_tensor=True),
    "clip_quantile": cg.clip_quantile(0.4),
    "normalize": cg.normalize(),
    "agreement": cg.agreement(0.5),
    "geometric_median": cg.geometric_median(2),
    "trim_loss": cg.trim_loss(0.5),
    "compose": cg.compose(cg.clip_quantile(0.25), cg.agreement(0.7)),
}
PARAMS = mlp_params(6, 8, 3)


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, B), jnp.int32)


def _averages(axis_name=None, loss_fn=mlp_loss, **options):
    """All weightings of one batch."""
    functions = {
        name: cg.weighted_grads(loss_fn, weighting, axis_name=axis_name, **options)
        for name, weighting in WEIGHTINGS.items()
    }

    def averages(params, batch, mask):
        return {name: function(params, batch, mask) for name, function in functions.items()}

    return averages


# One whole device masked (of 8), and a few rows of others.
MASKS = {"all": np.ones(B, bool), "some": ~np.isin(np.arange(B), [2, 3, 9])}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [1, 2, 8])
def test_inside_shard_map_every_result_is_that_of_one_device(n, mask):
    batch, mask = _batch(), jnp.asarray(MASKS[mask])
    want = jax.jit(_averages())(PARAMS, batch, mask)
    mapped = jax.shard_map(_averages("data"), mesh=mesh_of(n), in_specs=(P(), P("data"), P("data")), out_specs=P())
    trees_close(jax.jit(mapped)(PARAMS, batch, mask), want)


@pytest.mark.parametrize("how", ["unchecked", "pmap", "two axes", "vmap"])
def test_other_ways_to_name_an_axis(how):
    batch, mask = _batch(), jnp.asarray(MASKS["some"])
    want = jax.jit(_averages())(PARAMS, batch, mask)
    if how == "two axes":
        mesh = mesh_of(2, 4)
        mapped = jax.shard_map(
            _averages(("data", "model")), mesh=mesh, in_specs=(P(), P(("data", "model")), P(("data", "model"))),
            out_specs=P(),
        )  # fmt: skip
        trees_close(jax.jit(mapped)(PARAMS, batch, mask), want)
        return
    if how == "unchecked":
        mapped = jax.shard_map(
            _averages("data"), mesh=mesh_of(4), in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False
        )
        trees_close(jax.jit(mapped)(PARAMS, batch, mask), want)
        return
    apart = jax.tree.map(lambda leaf: leaf.reshape(4, B // 4, *leaf.shape[1:]), (batch, mask))
    over = {"axis_name": "data", "in_axes": (None, 0, 0)}
    if how == "pmap":
        got = jax.pmap(_averages("data"), devices=jax.devices()[:4], **over)(PARAMS, *apart)
    else:
        got = jax.jit(jax.vmap(_averages("data"), **over))(PARAMS, *apart)
    for device in range(4):
        trees_close(jax.tree.map(lambda leaf, device=device: leaf[device], got), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("n", [2, 8])
def test_under_jit_on_a_sharded_batch(n, kind):
    batch, mask = _batch(), jnp.asarray(MASKS["some"])
    want = jax.jit(_averages())(PARAMS, batch, mask)
    mesh = mesh_of(n, kind=kind)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    sharded = jax.device_put((batch, mask), NamedSharding(mesh, P("data")))
    got = jax.jit(_averages())(params, *sharded)
    trees_close(got, want)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got["agreement"][0]))


def test_non_finite_rows_of_one_device_are_skipped():
    (images, labels), mask = _batch(), jnp.ones(B, bool)
    images = images.at[4:8].set(np.nan).at[1].set(np.inf)  # device 2 of 8 and 3 have no other rows
    keep = np.isfinite(images).all(1)
    want = jax.jit(_averages())(PARAMS, (images[keep], labels[keep]), mask[keep])
    mapped = jax.shard_map(
        _averages("data", nonfinite="skip"), mesh=mesh_of(8), in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    got = jax.jit(mapped)(PARAMS, (images, labels), mask)
    for name, (grads, info) in got.items():
        trees_close(grads, want[name][0])
        assert int(info.num_nonfinite) == 5
        assert int(info.moments.count) == 11


def _reduced(compiled, at_least):
    """The bytes of every collective of at least so many, by kind."""
    return [(kind, size) for kind, size in collectives(compiled) if size >= at_least]


WIDE = {"w": jnp.ones((64, 96)), "v": jnp.ones(96)}
BYTES = 4 * (64 * 96 + 96)


def _wide_loss(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize("way", ["shard_map", "jit"])
@pytest.mark.parametrize(
    ("weighting", "reductions"),
    [(cg.clip_norm(1.0), 1), (cg.clip_quantile(0.5), 1), (cg.agreement(0.5), 2), (cg.geometric_median(3), 4)],
)
def test_traffic_is_an_all_reduce_for_the_sum_and_one_for_each_alignment(way, weighting, reductions):
    mesh, x = mesh_of(4), jnp.ones((B, 64))
    if way == "shard_map":
        f = cg.weighted_grads(_wide_loss, weighting, axis_name="data")
        step = jax.shard_map(lambda p, x: f(p, x)[0], mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    else:
        f = cg.weighted_grads(_wide_loss, weighting)
        step = lambda p, x: f(p, x)[0]  # noqa: E731
    params = jax.device_put(WIDE, NamedSharding(mesh, P()))
    compiled = jax.jit(step).lower(params, jax.device_put(x, NamedSharding(mesh, P("data")))).compile()
    large = _reduced(compiled, 1024)
    assert {kind for kind, _ in large} == {"all-reduce"}
    assert sum(size for _, size in large) == reductions * BYTES
    small = [size for _, size in collectives(compiled) if size < 1024]
    assert all(size <= 4 * B * 4 for size in small)


def test_parameters_sharded_over_a_second_axis_stay_so():
    mesh, rng = mesh_of(2, 4), np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 96)) / 8, jnp.float32),
        "v": jnp.asarray(rng.normal(size=96), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(B, 64)), jnp.float32)
    f = jax.jit(lambda p, x: cg.weighted_grads(_wide_loss, cg.geometric_median(2))(p, x)[0])
    shardings = {"w": NamedSharding(mesh, P(None, "model")), "v": NamedSharding(mesh, P("model"))}
    sharded = jax.device_put(params, shardings)
    rows = jax.device_put(x, NamedSharding(mesh, P("data")))
    got = f(sharded, rows)
    trees_close(got, f(params, x), rtol=1e-4)
    assert got["w"].sharding.is_equivalent_to(shardings["w"], 2)
    compiled = f.lower(sharded, rows).compile()
    assert not [size for kind, size in collectives(compiled) if kind == "all-gather" and size >= BYTES // 4]


def test_a_layer_sharded_inside_shard_map_counts_as_one_tensor():
    """Each device of the second axis has a part of the layer; norms and inner products are of the whole."""
    mesh, rng = mesh_of(2, 4), np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=8), jnp.float32),
        "b": jnp.asarray(0.5),
    }
    x = jnp.asarray(rng.normal(size=(B, 6)), jnp.float32)
    mask = jnp.ones(B, bool)

    def whole(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"] + p["b"])

    def in_parts(p, x):
        return jnp.tanh(jax.lax.psum(jnp.tanh(x @ p["w"]) @ p["v"], "model") + p["b"])

    want = jax.jit(_averages(loss_fn=whole))(params, x, mask)
    specs = {"w": P(None, "model"), "v": P("model"), "b": P()}
    step = jax.shard_map(
        lambda p, x, m: {name: out[0] for name, out in _averages("data", loss_fn=in_parts)(p, x, m).items()},
        mesh=mesh,
        in_specs=(specs, P("data"), P("data")),
        out_specs=dict.fromkeys(WEIGHTINGS, specs),
    )
    trees_close(jax.jit(step)(params, x, mask), {name: out[0] for name, out in want.items()}, rtol=1e-4)
    direction = jax.tree.map(jnp.ones_like, params)
    along = jax.shard_map(cg.alignments(in_parts), mesh=mesh, in_specs=(specs, P("data"), specs), out_specs=P("data"))
    trees_close(jax.jit(along)(params, x, direction), cg.alignments(whole)(params, x, direction))
