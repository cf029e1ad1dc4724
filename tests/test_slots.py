"""The stored gradients of `consecutive` and `rolling`: dtypes, shardings, leaves without a gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import memory, mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg

MAKERS = {
    "m3": lambda **kw: cg.m3(optax.sgd(-1.0), **kw),
    "rm3": cg.rm3,
    "ra3": cg.ra3,
    "even": lambda **kw: cg.rolling(cg.median(), 4, **kw),
}


def _last(transform, params, grads):
    """The last of the updates, and the state."""
    state, update = transform.init(params), jax.jit(transform.update)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    updates = None
    for grad in grads:
        updates, state = update(grad, state, params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    return updates, state


def test_float32_gradients_of_bfloat16_parameters_are_not_rounded():
    optimizer, params = cg.m3(optax.sgd(1.0)), jnp.ones(2, jnp.bfloat16)
    state = optimizer.init(params)
    for gradient in (1.001, 1.002, 1.003):
        updates, state = optimizer.update(jnp.full(2, gradient), state, params)
    np.testing.assert_array_equal(updates, jnp.full(2, -1.002))
    assert updates.dtype == jnp.float32


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float32])
def test_the_result_has_the_dtype_of_the_gradients_and_their_digits(name, dtype, grad_dtype):
    values = [jnp.full(2, value, grad_dtype) for value in (1.001, 1.004, 1.003, 1.002, 1.001, 1.002)]
    updates, state = _last(MAKERS[name](), jnp.ones(2, dtype), values)
    seen = np.asarray([np.asarray(value[0], np.float64) for value in values[-4 if name == "even" else -3 :]])
    want = np.mean(seen) if name == "ra3" else np.median(seen)
    assert updates.dtype == grad_dtype
    np.testing.assert_allclose(np.asarray(updates, np.float64), want, rtol=float(jnp.finfo(grad_dtype).eps))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.adamw(0.1)])
@pytest.mark.parametrize("make", [cg.m3, lambda inner: cg.consecutive(cg.mean(), 1, inner)])
def test_wider_gradients_leave_the_optimizers_state_in_its_dtype(make, inner):
    optimizer, params = make(inner), {"w": jnp.ones(2, jnp.bfloat16)}

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update({"w": gradient}, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.full((6, 2), 1.002))
    assert params["w"].dtype == jnp.bfloat16
    assert (params["w"] < 1).all()


def test_float64_gradients_need_float64_slots():
    params = {"w": jnp.ones(2, jnp.float32)}
    with jax.enable_x64(True):
        gradients = [{"w": jnp.full(2, 1 + i * 1e-12, jnp.float64)} for i in (1, 3, 2)]
        for make in MAKERS.values():
            message = r"slots of float32 hold without rounding, got updates\['w'\] of float64; pass accumulator_dtype="
            with pytest.raises(ValueError, match=message):
                _last(make(), params, gradients)
        updates, _ = _last(cg.rm3(accumulator_dtype=jnp.float64), params, gradients)
        np.testing.assert_array_equal(updates["w"], gradients[2]["w"])
        updates, _ = _last(cg.rm3(), {"w": jnp.ones(2, jnp.float64)}, gradients)
        np.testing.assert_array_equal(updates["w"], gradients[2]["w"])
        updates, _ = _last(cg.rm3(), 0.0, [1.0, 2.0, 3.0])  # Python numbers take the slots' dtype
        assert float(updates) == 2.0


def test_narrow_slots_may_be_asked_for():
    updates, state = _last(cg.rm3(accumulator_dtype=jnp.bfloat16), jnp.ones(2), [jnp.full(2, 1.001)] * 3)
    assert {leaf.dtype for leaf in state.grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(updates, jnp.ones(2))
    assert updates.dtype == jnp.float32


@pytest.mark.parametrize("make", MAKERS.values())
def test_slots_of_no_floating_dtype(make):
    with pytest.raises(
        TypeError, match="Expected accumulator_dtype to be a floating dtype, got accumulator_dtype=int32"
    ):
        make(accumulator_dtype=jnp.int32)


@pytest.mark.parametrize("transform", [cg.rm3(), cg.m3(optax.sgd(0.1))])
def test_slots_wider_than_the_gradients_are_written_in_place(transform):
    params = jax.ShapeDtypeStruct((1 << 20,), jnp.bfloat16)
    used = memory(transform.update, params, jax.eval_shape(transform.init, params), donate=1)
    assert used.alias_size_in_bytes >= 2 * 4 * (1 << 20)
    assert used.temp_size_in_bytes < 4 * (1 << 20) / 50


SPECS = {"w": P("x", "y"), "b": P("y"), "whole": P()}


def _sharded(mesh):
    shapes = {"w": (8, 4), "b": (6,), "whole": (3,)}
    return {
        name: jax.device_put(jnp.full(shapes[name], jnp.nan), NamedSharding(mesh, spec)) for name, spec in SPECS.items()
    }


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_slots_are_sharded_as_their_parameters(kind, jit):
    mesh = mesh_of(4, 2, names=("x", "y"), kind=kind)
    params = _sharded(mesh)
    for transform, leading in ((cg.rm3(), ()), (cg.m3(optax.sgd(0.1)), (None,))):
        grads = (jax.jit(transform.init) if jit else transform.init)(params).grads
        for slots in grads if leading == () else [grads]:
            for name, slot in slots.items():
                want = NamedSharding(mesh, P(*leading, *SPECS[name]))
                assert slot.sharding.is_equivalent_to(want, slot.ndim), (name, slot.sharding)
                assert not np.asarray(slot).any()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ["m3", "rm3", "even"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_updates_on_a_mesh_stay_sharded_and_are_those_of_one_device(kind, name, jit):
    transform, rng = MAKERS[name](), np.random.default_rng(0)
    params = _sharded(mesh_of(4, 2, names=("x", "y"), kind=kind))
    plain = jax.tree.map(np.zeros_like, jax.tree.map(np.asarray, params))
    state, plain_state = transform.init(params), transform.init(plain)
    update = jax.jit(transform.update) if jit else transform.update
    updates = None
    for _ in range(4 if jit else 3):
        values = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), plain)
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), values, params)
        updates, state = update(gradients, state, params)
        want, plain_state = transform.update(values, plain_state, plain)
        chex.assert_trees_all_equal(updates, want)
    for leaf, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


def test_slots_go_where_a_committed_parameter_is():
    params = jax.device_put(jnp.ones(3), jax.devices()[3])
    assert {slot.devices().pop() for slot in cg.rm3().init(params).grads} == {jax.devices()[3]}


def test_slots_vary_inside_shard_map_as_their_parameters_do():
    transform = cg.m3(optax.sgd(-1.0))

    def three(w, grads):
        updates, state = None, transform.init(w)
        for gradient in grads:
            updates, state = transform.update(gradient, state, w)
        return updates

    mesh = mesh_of(4)
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    mapped = jax.shard_map(three, mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.zeros(4), values), np.median(values, axis=0))


def test_gradients_that_differ_between_devices_do_not_go_into_a_shared_state():
    for transform in (cg.m3(cg.across_devices(cg.median(), "data")), cg.rm3()):

        def update(w, x, transform=transform):
            return transform.update(w * x[0], transform.init(w))[0]

        mesh = mesh_of(4)
        mapped = jax.shard_map(update, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        with pytest.raises(ValueError, match=r"got updates that varies over 'data'; put cg_jax\.across_devices or"):
            jax.jit(mapped)(jnp.ones(()), jnp.ones(4))


@pytest.mark.parametrize("inner", [optax.sgd(1.0), optax.sgd(1.0, momentum=0.9), optax.adam(0.1), optax.adamw(0.1)])
def test_a_leaf_without_a_gradient_keeps_none_and_the_state_its_structure(inner):
    params, gradient = {"w": jnp.ones(2), "frozen": jnp.ones(3)}, {"w": jnp.full(2, 2.0), "frozen": None}
    for transform in (cg.m3(inner), optax.chain(cg.rm3(), optax.sgd(1.0))):
        updates, _ = _last(transform, params, [gradient] * 3)
        assert updates["frozen"] is None
        assert (updates["w"] < 0).all()


@pytest.mark.parametrize("name", ["m3", "rm3"])
def test_python_numbers_are_gradients(name):
    transform = MAKERS[name]()
    state = transform.init({"a": jnp.zeros(()), "b": 0.0})
    for gradient in ({"a": 1.5, "b": 1}, {"a": 70.0, "b": 5}, {"a": jnp.asarray(4.5), "b": 2}):
        updates, state = transform.update(gradient, state)
    assert jax.tree.map(float, updates) == {"a": 4.5, "b": 2.0}
    assert updates["b"].dtype == jnp.float32


def loss_of_whole(p, x):
    return (p["w"] * x).sum() * p["steps"].sum()


WHOLE = {"w": jnp.ones(2), "steps": jnp.arange(3), "on": jnp.asarray(True)}


@pytest.mark.parametrize(
    ("transform", "leading"),
    [
        (cg.m3(optax.sgd(1.0)), ()),
        (cg.m3(optax.adam(1.0)), ()),
        (optax.chain(cg.rm3(), optax.sgd(1.0)), ()),
        (cg.rolling(cg.mean(), 1), ()),
        (optax.chain(cg.median_of_k(3), optax.sgd(1.0)), (3,)),
    ],
    ids=["m3", "m3 of adam", "rm3", "rolling 1", "median_of_k"],
)
@pytest.mark.parametrize("absent", ["None", "float0"])
def test_integer_parameters_pass_through_apply_updates(transform, leading, absent):
    grads = cg.micro_batch_grads(loss_of_whole, 3)(WHOLE, jnp.ones((3, 2)))
    if absent == "float0":
        grads = jax.vmap(jax.grad(loss_of_whole, allow_int=True), (None, 0))(WHOLE, jnp.ones((3, 2)))
    if leading == ():
        grads = jax.tree.map(lambda leaf: leaf[0], grads)
    params, state = WHOLE, transform.init(WHOLE)
    for _ in range(3):
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["w"] != 1).all()
    for name in ("steps", "on"):
        np.testing.assert_array_equal(params[name], WHOLE[name])
        assert params[name].dtype == WHOLE[name].dtype


@pytest.mark.parametrize("transform", [cg.m3(optax.sgd(1.0)), cg.rm3()])
def test_a_fresh_state_from_jit_can_be_donated(transform):
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    updates, _ = jax.jit(transform.update, donate_argnums=1)(params, jax.jit(transform.init)(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
