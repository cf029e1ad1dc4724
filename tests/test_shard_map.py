"""Inside the user's own shard_map and pmap: parameters the same on all devices, each device with its own examples."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cg_jax as cg

N, EACH = 2, 2
HOW = ["checked", "unchecked", "pmap"]


@functools.cache
def _mesh():
    return jax.make_mesh((N,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:N])


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
        mapped = jax.shard_map(one, mesh=_mesh(), in_specs=specs, out_specs=P("data"), check_vma=how == "checked")
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


def test_a_measurement_of_all_devices_is_one_psum_of_the_moments():
    case = cases.CASES["mlp"]
    params, batch = case.cast(jnp.float32)
    f = cg.grad_moments(case.loss_fn)
    got = _on_devices(lambda p, b: jax.lax.psum(f(p, b), "data"), "checked", params, batch)[0]
    _close(got, f(params, jax.tree.map(lambda leaf: leaf[: N * EACH], batch)))
