"""Rules over the gradients of the examples, against materialised float64 gradients."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import close_to_scale, memory, mesh_of, mlp_loss, mlp_params, temporary_bytes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg

RULES = {
    "mean": (cg.mean(), lambda g: g.mean(0)),
    "median": (cg.median(), lambda g: np.median(g, 0)),
    "trimmed": (cg.trimmed_mean(1), lambda g: np.sort(g, 0)[1:-1].mean(0)),
    "winsorized": (cg.winsorized_mean(1), lambda g: np.clip(g, *np.sort(g, 0)[[1, -2]]).mean(0)),
}


def _leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_rule_is_that_of_materialised_gradients(name):
    with jax.enable_x64(True):
        case = cases.CASES[name]
        params, batch = case.cast(jnp.float64)
        _, grads = oracle.per_example(case.loss_fn, params, batch)
        scales = [np.abs(g).max(initial=0) for g in grads]

        def every(columns):  # all rules in one program
            return sum(weight * rule(columns) for weight, (rule, _) in zip(weights, RULES.values(), strict=True))

        weights = [1.0, 0.25, -0.5, 2.0]
        want = [sum(w * plain(g) for w, (_, plain) in zip(weights, RULES.values(), strict=True)) for g in grads]
        for max_bytes in (None, 400):
            got = _leaves(cg.coordinatewise_grads(case.loss_fn, every, max_bytes=max_bytes)(params, batch))
            assert [leaf.shape for leaf in got] == [leaf.shape for leaf in want]
            close_to_scale(got, want, 1e-11, scales)


def _mlp(size, inputs=6, hidden=5):
    rng = np.random.default_rng(size)
    return mlp_params(inputs, hidden, 3), (rng.normal(size=(size, inputs)).astype(np.float32), rng.integers(0, 3, size))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [3, 4, 17, 40])
@pytest.mark.parametrize("max_bytes", [None, 1, 1000])
def test_each_rule_alone(name, size, max_bytes):
    rule, plain = RULES[name]
    params, batch = _mlp(size)
    grads = cg.per_example_grads(mlp_loss)(params, batch)
    got = cg.coordinatewise_grads(mlp_loss, rule, max_bytes=max_bytes)(params, batch)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    close_to_scale(jax.tree.leaves(got), [plain(g) for g in _leaves(grads)], 1e-5)


@pytest.mark.parametrize("rule", [cg.mean(), cg.median(), cg.trimmed_mean(0), cg.winsorized_mean(0)])
def test_of_one_example_or_of_equal_examples_it_is_the_gradient(rule):
    params, (x, y) = _mlp(1)
    want = _leaves(jax.grad(mlp_loss)(params, (x[0], y[0])))
    for size in (1, 2, 6, 33):
        batch = np.repeat(x, size, 0), np.repeat(y, size, 0)
        close_to_scale(jax.tree.leaves(cg.coordinatewise_grads(mlp_loss, rule)(params, batch)), want, 1e-6)


@pytest.mark.parametrize("size", [5, 20])
def test_a_nan_spoils_the_coordinates_it_reaches_alone(size):
    x = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    x[1, 2] = np.nan
    for rule in (rule for rule, _ in RULES.values()):
        got = cg.coordinatewise_grads(lambda w, x: (w * x).sum(), rule)(jnp.ones(4), x)
        assert np.isnan(got).tolist() == [False, False, True, False]


def test_a_tensor_without_a_gradient_gets_the_rule_of_zeros():
    def loss_fn(params, x):
        return (params["used"][1:3] * x).sum() + 0 * params["count"]

    params = {"used": jnp.ones(5), "unused": jnp.ones((2, 2)), "count": jnp.ones((), int), "empty": jnp.ones((0, 3))}
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    got = cg.coordinatewise_grads(loss_fn, lambda g: g.mean(0) + 1)(params, x)
    assert got["count"] is None
    np.testing.assert_allclose(got["used"], np.concatenate([[1], x.mean(0) + 1, [1, 1]]), rtol=1e-6)
    np.testing.assert_array_equal(got["unused"], np.ones((2, 2)))
    assert got["empty"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_parameters_are_ruled_in_float32(dtype):
    dtypes = []

    def rule(columns):
        dtypes.append(columns.dtype)
        return jnp.median(columns, axis=0)

    params, (x, y) = _mlp(7)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    got = cg.coordinatewise_grads(mlp_loss, rule)(narrow, (jnp.asarray(x, dtype), y))
    assert set(dtypes) == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    want = cg.coordinatewise_grads(mlp_loss, rule)(params, (x, y))
    close_to_scale(jax.tree.leaves(got), _leaves(want), 0.05)


def test_state_and_auxiliary_values():
    loss = lambda w, x, state: (0.5 * state * (w - x) ** 2, 2 * x)  # noqa: E731
    x = jnp.array([1.0, 4.0, 70.0])
    got, aux = cg.coordinatewise_grads(loss, cg.median(), has_aux=True)(jnp.zeros(()), x, jnp.asarray(3.0))
    assert float(got) == -12
    assert aux.tolist() == [2, 8, 140]


def test_the_memory_is_that_of_blocks():
    params, batch = _mlp(64, 256, 256)
    every = 64 * sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    for rule in (rule for rule, _ in RULES.values()):
        used = temporary_bytes(cg.coordinatewise_grads(mlp_loss, rule, max_bytes=2**18), params, batch)
        assert used < every / 10
    assert memory(cg.per_example_grads(mlp_loss), params, batch).output_size_in_bytes >= every


def test_a_tensor_that_must_be_built_is_built_in_ranges():
    def loss_fn(w, x):
        y = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y).sum() ** 2

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 3, 16, 64)), jnp.float32)
    x = rng.normal(size=(48, 3, 3, 16)).astype(np.float32)
    ranged = cg.coordinatewise_grads(loss_fn, cg.median(), max_bytes=2**16)
    want = np.median(cg.per_example_grads(loss_fn)(w, x), 0)
    close_to_scale([ranged(w, x)], [want], 1e-5)
    assert temporary_bytes(ranged, w, x) < 48 * w.size * 4 / 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("max_bytes", [None, 1000])
def test_on_a_mesh_the_result_is_that_of_one_device(kind, max_bytes):
    params, batch = _mlp(16)
    mesh = mesh_of(8, kind=kind)
    robust = cg.coordinatewise_grads(mlp_loss, cg.median(), max_bytes=max_bytes)
    want = _leaves(robust(params, batch))
    placed = (
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(batch, NamedSharding(mesh, P("data"))),
    )
    with jax.set_mesh(mesh):
        for f in (robust, jax.jit(robust)):
            close_to_scale(jax.tree.leaves(f(*placed)), want, 1e-5)


def test_in_shard_map_the_result_is_that_of_the_devices_own_examples():
    params, batch = _mlp(16)
    robust = cg.coordinatewise_grads(mlp_loss, cg.median())

    def own(params, batch):
        return jax.tree.map(lambda leaf: leaf[None], robust(params, batch))

    got = jax.jit(jax.shard_map(own, mesh=mesh_of(4), in_specs=(P(), P("data")), out_specs=P("data")))(params, batch)
    for device in range(4):
        rows = jax.tree.map(lambda leaf, at=4 * device: leaf[at : at + 4], batch)
        close_to_scale([leaf[device] for leaf in jax.tree.leaves(got)], _leaves(robust(params, rows)), 1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cg.coordinatewise_grads(mlp_loss, cg.median), TypeError, r"as cg_jax\.median\(…\) makes it"),
        (lambda: cg.coordinatewise_grads(mlp_loss, 3), TypeError, r"rule"),
        (lambda: cg.coordinatewise_grads(3, cg.median()), TypeError, r"loss_fn"),
        (lambda: cg.coordinatewise_grads(mlp_loss, cg.mean(), max_bytes=0), ValueError, r"max_bytes"),
        (
            lambda: cg.coordinatewise_grads(mlp_loss, lambda g: g)(*_mlp(3)),
            ValueError,
            r"Expected a coordinate-wise rule",
        ),
        (lambda: cg.coordinatewise_grads(mlp_loss, cg.trimmed_mean(2))(*_mlp(4)), ValueError, r"trim=2 and k=4"),
        (lambda: cg.coordinatewise_grads(mlp_loss, cg.winsorized_mean(9))(*_mlp(18)), ValueError, r"clip=9 and k=18"),
        (lambda: cg.coordinatewise_grads(lambda w, x: x, cg.mean())(1.0, jnp.ones(2)), ValueError, r"depend on params"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
