"""A measurement on a mesh: the same numbers as on one device, and what moves between devices."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations, mesh_of, mlp_params, same_coherence
from helpers import mlp_loss as loss_fn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg
from benchmarks import programs


def _data(m):
    rng = np.random.default_rng(m)
    return rng.normal(size=(m, 20)).astype(np.float32), rng.integers(0, 8, m).astype(np.int32)


PARAMS = mlp_params(20, 32, 8)
SIZE = sum(p.nbytes for p in PARAMS.values())


def _kinds(data, mesh):
    """The same data on the host, on one device, divided over the mesh where it divides, and as batches."""
    divides = len(data[1]) % mesh.shape["data"] == 0
    there = NamedSharding(mesh, P("data")) if divides else NamedSharding(mesh, P())
    return {
        "host": data,
        "one device": jax.tree.map(jnp.asarray, data),
        "mesh": jax.device_put(data, there),
        "batches": [jax.tree.map(lambda leaf, s=s: leaf[s : s + 11], data) for s in range(0, len(data[1]), 11)],
    }


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("m", [1, 7, 64, 101])
def test_any_number_of_devices_and_examples_gives_what_one_device_gives(n, m):
    want = cg.measure_coherence(loss_fn, PARAMS, _data(m), batch_size=16)
    mesh = mesh_of(n)
    for data in _kinds(_data(m), mesh).values():
        same_coherence(cg.measure_coherence(loss_fn, PARAMS, data, batch_size=16, mesh=mesh), want)


def _programs(mesh, params, m=64):
    return programs.of_measurement(loss_fn, params, _data(m), batch_size=16, mesh=mesh)


def test_one_program_is_compiled_for_all_batches_however_the_parameters_lie():
    mesh = mesh_of(2, 4)
    for specs in (dict.fromkeys(PARAMS, P()), TENSOR_PARALLEL, FULLY_SHARDED):
        with compilations("step") as names:
            cg.measure_coherence(loss_fn, _placed(PARAMS, mesh, specs), _data(101), batch_size=12, mesh=mesh)
        assert len(names) == 1


FLAGS = 16 * 4  # one int32 for each example of a batch says whether it is finite; all devices are told


def test_one_all_reduce_of_the_parameters_ends_a_measurement_whatever_its_size():
    small, large = _programs(mesh_of(8), PARAMS, m=64), _programs(mesh_of(8), PARAMS, m=640)
    for found in (small, large):
        assert programs.collectives(found.batch) == [("all-gather", FLAGS)]
        assert {kind for kind, _ in programs.collectives(found.end)} == {"all-reduce"}
        scalars = programs.moved(found.end) - SIZE
        assert 0 < scalars <= 64
    assert int(large.result.count) == 640


def _placed(params, mesh, specs):
    return jax.device_put(params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


TENSOR_PARALLEL = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model"), "b2": P()}


@pytest.mark.parametrize("where", ["host", "devices"])
def test_one_device_along_the_data_axis(where):
    mesh = mesh_of(1, 4)
    data = _data(21) if where == "host" else jax.tree.map(jnp.asarray, _data(21))
    got = cg.measure_coherence(
        loss_fn, _placed(PARAMS, mesh, TENSOR_PARALLEL), data, batch_size=8, mesh=mesh, confidence=True
    )
    same_coherence(got, cg.measure_coherence(loss_fn, PARAMS, data, batch_size=8, confidence=True))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tensor_parallel_sums_keep_the_sharding_and_gather_nothing(kind):
    mesh = mesh_of(2, 4, kind=kind)
    found = _programs(mesh, _placed(PARAMS, mesh, TENSOR_PARALLEL))
    same_coherence(found.result, cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16))
    assert programs.moved(found.batch, "all-gather", "all-to-all", "collective-permute") == FLAGS
    assert programs.moved(found.batch, "all-reduce") < 16 * 32 * 4  # activations and norms of 8 examples
    quarters = sum(p.nbytes for name, p in PARAMS.items() if name != "b2") // 4 + PARAMS["b2"].nbytes
    assert 0 < programs.moved(found.end) - quarters <= 64
    assert {kind for kind, _ in programs.collectives(found.end)} == {"all-reduce"}
    sums = found.batch.output_shardings[0].sum_grads
    assert {name: sharding.spec for name, sharding in sums.items()} == {
        name: P("data", *spec) for name, spec in TENSOR_PARALLEL.items()
    }


FULLY_SHARDED = {"w1": P(None, "data"), "b1": P("data"), "w2": P("data"), "b2": P()}


def test_parameters_divided_over_the_data_axis_are_gathered_and_their_sums_scattered_in_every_batch():
    mesh = mesh_of(8)
    found = _programs(mesh, _placed(PARAMS, mesh, FULLY_SHARDED))
    same_coherence(found.result, cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16))
    divided = SIZE - PARAMS["b2"].nbytes
    assert programs.moved(found.batch, "all-gather") == divided + FLAGS
    assert programs.moved(found.batch, "reduce-scatter") == divided // 8
    assert programs.moved(found.end) <= 128
    sums = found.batch.output_shardings[0].sum_grads
    assert sums["w1"].spec == FULLY_SHARDED["w1"]


def test_both_together_gather_over_the_data_axis_only():
    mesh = mesh_of(2, 4)
    specs = {"w1": P("data", "model"), "b1": P("model"), "w2": P(("model", "data"), None), "b2": P()}
    found = _programs(mesh, _placed(PARAMS, mesh, specs))
    same_coherence(found.result, cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16))
    weights = PARAMS["w1"].nbytes + PARAMS["w2"].nbytes
    assert programs.moved(found.batch, "all-gather") == weights // 4 + FLAGS
    assert programs.moved(found.batch, "reduce-scatter") == weights // 8


def attention_loss(p, x):
    q, k, v = (jnp.einsum("td,dhe->hte", x, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("hte,hse->hts", q, k) / 4)
    out = jnp.einsum("hts,hse,hed->td", weights, v, p["o"]) + x
    return ((jax.nn.gelu(out @ p["up"]) @ p["down"]) ** 2).mean()


def test_heads_and_hidden_units_divided_over_the_model_axis():
    rng, mesh = np.random.default_rng(0), mesh_of(2, 4)
    shapes = {"q": (16, 4, 8), "k": (16, 4, 8), "v": (16, 4, 8), "o": (4, 8, 16), "up": (16, 64), "down": (64, 16)}
    params = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    heads = P(None, "model")
    specs = {"q": heads, "k": heads, "v": heads, "o": P("model"), "up": heads, "down": P("model")}
    x = rng.normal(size=(30, 6, 16)).astype(np.float32)
    got = cg.measure_coherence(attention_loss, _placed(params, mesh, specs), x, batch_size=8, mesh=mesh)
    same_coherence(got, cg.measure_coherence(attention_loss, params, x, batch_size=8))


def test_the_users_current_mesh_does_not_matter_and_may_be_explicit():
    want = cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(8, kind=kind)
        with jax.set_mesh(mesh):
            params = mlp_params(20, 32, 8)
            same_coherence(cg.measure_coherence(loss_fn, params, _data(64), batch_size=16, mesh=mesh), want)
            assert jax.sharding.get_mesh() == mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_data_may_lie_anywhere_and_be_made_by_code_that_computes(kind):
    mesh, data = mesh_of(8, kind=kind), _data(40)
    want = cg.measure_coherence(loss_fn, PARAMS, data, batch_size=16)
    there = jax.device_put(data, NamedSharding(mesh, P("data")))

    def batches():
        for start in (0, 16, 32):
            rows = jax.tree.map(lambda leaf, s=start: leaf[s : s + 16], data)
            yield jax.tree.map(lambda leaf: leaf + 0, jax.device_put(rows, NamedSharding(mesh, P("data"))))

    other = mesh_of(2, 4, names=("a", "b"), kind=kind)
    for given in (
        there,
        jax.device_put(data, jax.devices()[3]),
        jax.device_put(data, NamedSharding(other, P("b"))),
        batches(),
        list(batches()),
    ):
        same_coherence(cg.measure_coherence(loss_fn, PARAMS, given, batch_size=16, mesh=mesh), want)
    whole = [
        cg.measure_coherence(_mean_loss, PARAMS, d, batch_size=8, mesh=mesh, estimator="batch") for d in (data, there)
    ]
    same_coherence(*whole)


def _mean_loss(params, batch):
    return jax.vmap(loss_fn, (None, 0))(params, batch).mean()


def _spoilt(m, rows):
    images, labels = _data(m)
    images[rows, 3] = np.nan
    return images, labels


@pytest.mark.parametrize("where", ["host", "mesh"])
def test_what_is_not_finite_is_told_apart_on_a_mesh(where):
    mesh, rows = mesh_of(8), [3, 50, 51, 63]
    data = _spoilt(64, rows)
    if where == "mesh":
        data = jax.device_put(data, NamedSharding(mesh, P("data")))
    measured = functools.partial(cg.measure_coherence, loss_fn, PARAMS, data, batch_size=32)
    same_coherence(measured(mesh=mesh, nonfinite="skip"), measured(nonfinite="skip"))
    assert np.isnan(measured(mesh=mesh, nonfinite="propagate").alpha)
    # On the mesh a batch is of the next four examples of each device.
    message = r"got 1 of 32 .* index 3\." if where == "host" else r"got 3 of 32 .* index 3\."
    with pytest.raises(FloatingPointError, match=message):
        measured(mesh=mesh)


def test_the_axis_of_the_examples_is_named_or_plain():
    mesh = mesh_of(2, 4, names=("replica", "model"))
    with pytest.raises(
        ValueError, match=r"Expected data_axis, the axis of the mesh .*\('replica', 'model'\), got None"
    ):
        cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16, mesh=mesh)
    with pytest.raises(ValueError, match=r"Expected data_axis in \('replica', 'model'\).* got data_axis='data'"):
        cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16, mesh=mesh, data_axis="data")
    want = cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16)
    for options in ({"mesh": mesh, "data_axis": "replica"}, {"mesh": mesh_of(8, names=("any",))}):
        same_coherence(cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16, **options), want)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"mesh": "all"}, TypeError, r"Expected mesh to be a jax\.sharding\.Mesh or None, got str"),
        ({"data_axis": "data"}, ValueError, r"Expected data_axis with mesh, got data_axis='data'"),
        (
            {"mesh": mesh_of(8), "data_axis": ("data",)},
            ValueError,
            r"data_axis to be the name of one axis, got .*\('data',",
        ),
    ],
)
def test_what_is_no_mesh_or_no_axis_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        cg.measure_coherence(loss_fn, PARAMS, _data(64), batch_size=16, **options)


def test_inside_a_traced_function_it_says_what_to_take():
    measured = functools.partial(cg.measure_coherence, loss_fn, batch_size=16)
    with pytest.raises(TypeError, match=r"outside of jit, vmap and shard_map.* take coherence\(grad_moments"):
        jax.jit(measured)(PARAMS, _data(64))
    with pytest.raises(TypeError, match=r"outside of jit"):
        jax.jit(lambda data: measured(PARAMS, data))(_data(64))


@pytest.mark.parametrize("how", ["eager", "jit", "jit of a mesh that is set"])
@pytest.mark.parametrize("divided", [False, True])
def test_functions_of_a_batch_take_arrays_of_an_explicit_mesh(how, divided):
    mesh, params, data = mesh_of(2, 4, kind=AxisType.Explicit), PARAMS, _data(24)
    specs = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", "data"), "b2": P()} if divided else P()
    like = specs if divided else dict.fromkeys(params, P())
    there = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    batch = jax.device_put(data, NamedSharding(mesh, P("data")))
    mask = jax.device_put(np.arange(24) % 5 > 0, NamedSharding(mesh, P("data")))
    by_row = {
        "w1": P("data", None, "model"),
        "b1": P("data", "model"),
        "w2": P("data", "model", None),
        "b2": P("data"),
    }
    functions = {
        "moments": (cg.grad_moments(loss_fn), (mask,), cg.GradMoments(P(), P(), like, dict.fromkeys(like, P()))),
        "vmap": (cg.grad_moments(loss_fn, method="vmap"), (), cg.GradMoments(P(), P(), like, dict.fromkeys(like, P()))),
        "norms": (cg.per_example_sq_norms(loss_fn), (), dict.fromkeys(like, P("data"))),
        "grads": (cg.per_example_grads(loss_fn), (), by_row if divided else dict.fromkeys(like, P("data"))),
        "alignments": (cg.alignments(loss_fn), (there,), P("data")),
        "micro": (cg.micro_batch_grads(loss_fn, 3), (), None),
    }
    for name, (function, more, specs) in functions.items():
        want = function(params, data, *jax.tree.map(np.asarray, more))
        with jax.set_mesh(mesh) if how == "jit of a mesh that is set" else contextlib.nullcontext():
            got = (function if how == "eager" else jax.jit(function))(there, batch, *more)
        for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=1e-6, err_msg=name)
        for leaf, spec in zip(jax.tree.leaves(got), jax.tree.leaves(specs), strict=False):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (name, leaf.sharding, spec)


def test_a_measurement_without_a_mesh_takes_arrays_of_an_explicit_one():
    mesh, params, data = mesh_of(8, kind=AxisType.Explicit), PARAMS, _data(72)
    there = jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(data, NamedSharding(mesh, P("data")))
    want = cg.measure_coherence(loss_fn, params, data, batch_size=16)
    same_coherence(cg.measure_coherence(loss_fn, *there, batch_size=16), want)
    with jax.set_mesh(mesh):
        same_coherence(cg.measure_coherence(loss_fn, *there, batch_size=16), want)
        same_coherence(cg.measure_coherence(loss_fn, *there, batch_size=16, mesh=mesh), want)


def test_a_loss_with_a_loop_and_integer_parameters_on_a_mesh():
    def loss(p, x):
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(p["w"] @ h + x), None), jnp.zeros(4), None, p["n"].size)
        return (h**2).sum()

    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32), "n": jnp.arange(3)}
    x = np.random.default_rng(1).normal(size=(21, 4)).astype(np.float32)
    got = cg.measure_coherence(loss, params, x, batch_size=8, mesh=mesh_of(8))
    same_coherence(got, cg.measure_coherence(loss, params, x, batch_size=8))
