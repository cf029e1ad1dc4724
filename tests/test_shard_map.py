"""Inside the user's own shard_map and pmap: parameters the same on all devices, each device with its own examples."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import PartitionSpec as P

import cg_jax as cg

N, EACH = 2, 2
HOW = ["checked", "unchecked", "pmap"]


def _part(batch, device):
    return jax.tree.map(lambda leaf: leaf[device * EACH : (device + 1) * EACH], batch)


def _on_devices(f, how, params, batch, *more):
    """What f(params, examples, *more) is on each device, given its own part of the batch."""
    batch = jax.tree.map(lambda leaf: leaf[: N * EACH], batch)
    if how == "pmap":
        apart = jax.tree.map(lambda leaf: leaf.reshape(N, EACH, *leaf.shape[1:]), batch)
        over = jax.pmap(f, axis_name="data", in_axes=(None, 0, *(None for _ in more)), devices=jax.devices()[:N])
        out = over(params, apart, *more)
    else:

        def one(params, batch, *more):
            return jax.tree.map(lambda leaf: leaf[None], f(params, batch, *more))

        specs = (P(), P("data"), *(P() for _ in more))
        mapped = jax.shard_map(one, mesh=mesh_of(N), in_specs=specs, out_specs=P("data"), check_vma=how == "checked")
        out = jax.jit(mapped)(params, batch, *more)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(N)]


def _close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(1, np.abs(b).max())), got, want
    )


def _loop_begins_with_zeros_of_its_own(case):
    """Whether the loss cannot be differentiated in a shard_map that checks what varies; the user has to mend it."""
    params, batch = case.cast(jnp.float32)
    try:
        _on_devices(jax.vmap(jax.grad(case.loss_fn), (None, 0)), "checked", params, batch)
    except TypeError as error:
        return "scan body function carry input and carry output must have equal types" in str(error)
    return False


def _check(f, how, name):
    """f(loss_fn)(params, batch) on every device is what it is outside."""
    case = cases.CASES[name]
    params, batch = case.cast(jnp.float32)
    f = f(case.loss_fn)
    if how == "checked" and "scan" in name and _loop_begins_with_zeros_of_its_own(case):
        with pytest.raises(TypeError, match=r"jax\.lax\.pcast"):
            _on_devices(f, how, params, batch)
        return
    for i, got in enumerate(_on_devices(f, how, params, batch)):
        _close(got, f(params, _part(batch, i)))


@pytest.mark.parametrize("name", cases.CASES)
def test_the_engine_where_what_varies_is_checked(name):
    _check(cg.grad_moments, "checked", name)


SOME = ["mlp", "cnn", "tied embedding", "custom_vjp"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "f",
    [cg.grad_moments, cg.per_example_grads, cg.per_example_sq_norms, lambda loss_fn: cg.micro_batch_grads(loss_fn, 2)],
    ids=["grad_moments", "per_example_grads", "per_example_sq_norms", "micro_batch_grads"],
)
def test_replicated_parameters_are_not_summed_over_devices(f, name, how):
    """jax.grad with respect to what is the same on all devices is summed over them, and silently: nothing here is."""
    _check(f, how, name)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SOME)
def test_alignments_are_each_devices_own(name, how):
    case = cases.CASES[name]
    params, batch = case.cast(jnp.float32)
    direction = cg.grad_moments(case.loss_fn)(params, batch).sum_grads
    f = cg.alignments(case.loss_fn)
    for i, got in enumerate(_on_devices(f, how, params, batch, direction)):
        _close(got, f(params, _part(batch, i), direction))


@pytest.mark.parametrize("method", ["ghost", "vmap"])
@pytest.mark.parametrize("how", HOW)
def test_masked_rows_are_left_out_on_each_device(how, method):
    case = cases.CASES["mlp"]
    params, batch = case.cast(jnp.float32)
    keep = np.array([True, False, True, True])

    def f(params, rows):
        batch, mask = rows
        return cg.grad_moments(case.loss_fn, method=method)(params, batch, mask=mask)

    batch = jax.tree.map(lambda leaf: leaf[: N * EACH], batch)
    for i, got in enumerate(_on_devices(f, how, params, (batch, keep))):
        _close(got, f(params, _part((batch, keep), i)))


def _varying_by_a_parameter():
    """A loss that differs between devices by another leaf of params only, with the batch the same on all."""

    def loss(p, x):
        return jnp.sin(x * p["shared"]).sum() * p["own"] + p["id"] * (p["shared"] ** 2).sum()

    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    return loss, {"shared": jnp.arange(5.0), "own": jnp.array([1.0, -2.0]), "id": jnp.array([3, 7])}, x


@pytest.mark.parametrize("method", ["ghost", "vmap"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_parameter_of_each_device_makes_the_gradients_of_shared_ones_its_own(checked, method):
    loss, params, x = _varying_by_a_parameter()
    functions = [
        cg.grad_moments(loss, method=method),
        cg.per_example_sq_norms(loss, method=method),
        cg.per_example_grads(loss),
        cg.micro_batch_grads(loss, 3),
    ]

    def one(p, x):
        mine = p | {"own": p["own"][0], "id": p["id"][0]}
        return jax.tree.map(lambda leaf: leaf[None], [f(mine, x) for f in functions])

    specs = ({"shared": P(), "own": P("data"), "id": P("data")}, P())
    mapped = jax.shard_map(one, mesh=mesh_of(N), in_specs=specs, out_specs=P("data"), check_vma=checked)
    got = jax.jit(mapped)(params, x)
    for i in range(N):
        mine = params | {"own": params["own"][i], "id": params["id"][i]}
        _close(jax.tree.map(lambda leaf, i=i: leaf[i], got), [f(mine, x) for f in functions])


def test_a_layer_divided_over_devices_whose_parts_are_summed_is_left_to_jax():
    def loss(p, x):
        return (jax.lax.psum(jnp.tanh(x @ p["a"]) @ p["b"], "data") + p["c"]).sum() ** 2

    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in {"a": (3, 4), "b": (4, 2), "c": 2}.items()
    }
    x = rng.normal(size=(5, 3)).astype(np.float32)
    specs = {"a": P(None, "data"), "b": P("data"), "c": P()}
    f = cg.grad_moments(loss)
    out = cg.GradMoments(P(), P(), specs, {"a": P("data"), "b": P("data"), "c": P()})

    def one(p, x):
        found = f(p, x)
        return found._replace(sum_sq_norms=found.sum_sq_norms | {n: found.sum_sq_norms[n][None] for n in ("a", "b")})

    got = jax.jit(jax.shard_map(one, mesh=mesh_of(N), in_specs=(specs, P()), out_specs=out))(params, x)
    whole = lambda p, x: ((jnp.tanh(x @ p["a"]) @ p["b"] + p["c"]).sum()) ** 2  # noqa: E731
    want = cg.grad_moments(whole)(params, x)
    _close(got.sum_grads, want.sum_grads)
    _close({n: q.sum() for n, q in got.sum_sq_norms.items()}, want.sum_sq_norms)


def test_a_measurement_of_all_devices_is_one_psum_of_the_moments():
    case = cases.CASES["mlp"]
    params, batch = case.cast(jnp.float32)
    f = cg.grad_moments(case.loss_fn)
    got = _on_devices(lambda p, b: jax.lax.psum(f(p, b), "data"), "checked", params, batch)[0]
    _close(got, f(params, jax.tree.map(lambda leaf: leaf[: N * EACH], batch)))


def _scanned(loss_fn, axis_name=None):
    """A device's own moments, added up example by example from `GradMoments.zeros`."""

    def total(params, batch):
        def step(total, example):
            rows = jax.tree.map(lambda leaf: leaf[None], example)
            return cg.merge(total, cg.grad_moments(loss_fn)(params, rows)), None

        return jax.lax.scan(step, cg.GradMoments.zeros(params, axis_name=axis_name), batch)[0]

    return total


@pytest.mark.parametrize("how", HOW)
def test_zeros_are_the_carry_of_a_scan(how):
    case = cases.CASES["mlp"]
    params, batch = case.cast(jnp.float32)
    for i, got in enumerate(_on_devices(_scanned(case.loss_fn), how, params, batch)):
        _close(got, cg.grad_moments(case.loss_fn)(params, _part(batch, i)))
    _close(_scanned(case.loss_fn)(params, batch), cg.grad_moments(case.loss_fn)(params, batch))


def test_zeros_of_a_mesh_with_two_axes():
    """By default they vary over both; of the data axis alone, the total is the same along the other."""
    mesh = mesh_of(2, 2, names=("data", "other"))
    loss = lambda w, x: (w @ x) ** 2  # noqa: E731
    w, x = jnp.arange(3.0), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    want = cg.grad_moments(loss)(w, x)

    def total(w, x):
        return jax.lax.psum(_scanned(loss, "data")(w, x), "data")

    _close(jax.jit(jax.shard_map(total, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(w, x), want)

    def each(w, x):
        return jax.tree.map(lambda leaf: leaf[None], _scanned(loss)(w, x))

    over = jax.shard_map(each, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(("data", "other")))
    _close(jax.tree.map(lambda leaf: leaf[::2].sum(0), jax.jit(over)(w, x)), want)


def test_zeros_of_parameters_divided_over_devices_vary_as_they_do():
    loss = lambda w, x: jax.lax.psum(w @ x, "data") ** 2  # noqa: E731

    def total(w, x):
        found = _scanned(loss, ())(w, x)
        return found._replace(sum_sq_norms=found.sum_sq_norms[None])

    w, x = jnp.arange(4.0), np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    out = cg.GradMoments(P(), P(), P("data"), P("data"))
    over = jax.shard_map(total, mesh=mesh_of(N), in_specs=(P("data"), P(None, "data")), out_specs=out)
    got, want = jax.jit(over)(w, x), cg.grad_moments(lambda w, x: (w @ x) ** 2)(w, x)
    _close(got.sum_grads, want.sum_grads)
    _close(got.sum_sq_norms.sum(), want.sum_sq_norms)


def test_zeros_of_shapes_alone():
    shapes = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": jax.ShapeDtypeStruct((), jnp.int32)}
    zeros = cg.GradMoments.zeros(shapes)
    assert zeros.sum_grads["b"] is None is zeros.sum_sq_norms["b"]
    assert (zeros.sum_grads["a"].shape, zeros.sum_grads["a"].dtype) == ((2,), jnp.float32)
