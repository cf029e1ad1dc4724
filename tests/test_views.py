"""What stands between a parameter and its use: every view against vmap(grad) in float64, all of a kind in one loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import temporary_bytes
from jax import lax

import cg_jax as cg

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _():
    """Views of one form for examples with positions and without."""
    with jax.numpy_rank_promotion("allow"):
        yield


FALLBACKS = {"vjp", "vmap"}


def _normal(*shape):
    return RNG.normal(size=shape)


def _two(a, b):
    return {"a": _normal(*a), "b": _normal(*b)}


def _lora(p, x):
    return x @ (p["w"] + 2.0 * p["a"] @ p["b"])


M54, M4, M51 = _normal(5, 4), _normal(4), _normal(5, 1)
ORDER, AGAIN, ROWS = np.array([1, 0, 3, 2]), np.array([1, 0, 2, 2]), np.array([4, 0, 2, 2, 1])

# name → (what is done with the parameter and one example [6, 5] of positions, or [5] where T = 1; the parameter)
LINEAR = {
    "a number": (lambda w, x: x @ (0.04 * w), _normal(5, 4)),
    "its norm, stopped": (lambda w, x: x @ (w / lax.stop_gradient(jnp.linalg.norm(w))), _normal(5, 4)),
    "columns scaled": (lambda w, x: x @ (w * M4[None]), _normal(5, 4)),
    "rows scaled": (lambda w, x: x @ (M51 * w), _normal(5, 4)),
    "a mask": (lambda w, x: x @ (w * M54), _normal(5, 4)),
    "a mask, turned": (lambda w, x: x @ (w.T * M54), _normal(4, 5)),
    "a quotient": (lambda w, x: x @ (w / M54), _normal(5, 4)),
    "negative": (lambda w, x: x @ (1.0 - w), _normal(5, 4)),
    "a barrier": (lambda w, x: x @ lax.optimization_barrier(w), _normal(5, 4)),
    "columns chosen": (lambda w, x: x @ w[:, ORDER], _normal(5, 4)),
    "columns chosen twice": (lambda w, x: x @ w[:, AGAIN], _normal(5, 4)),
    "rows chosen": (lambda w, x: x @ w[ROWS], _normal(5, 4)),
    "reversed": (lambda w, x: x @ w[::-1], _normal(5, 4)),
    "a slice": (lambda w, x: x @ w[1:6, ::2], _normal(7, 8)),
    "one of a stack": (lambda w, x: x @ w[1], _normal(2, 5, 4)),
    "split": (lambda w, x: jnp.tanh(x @ jnp.split(w, 2, 1)[0]) * (x @ jnp.split(w, 2, 1)[1]), _normal(5, 8)),
    "two slices": (lambda w, x: jnp.tanh(x @ w[:5]) @ w[5:], _normal(9, 4)),
    "reshaped": (lambda w, x: jnp.einsum("...d,dhk->...hk", x, 2.0 * w.reshape(5, 2, 2)).sum(-1), _normal(5, 4)),
    "concatenated": (lambda p, x: x @ jnp.concatenate([p["a"], 2.0 * p["b"]], 1), _two((5, 3), (5, 1))),
    "concatenated rows": (lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), _two((2, 4), (3, 4))),
    "a low rank": (_lora, {"w": _normal(5, 4), "a": _normal(5, 2), "b": _normal(2, 4)}),
    "used twice": (lambda w, x: jnp.tanh(x @ w) @ w, _normal(5, 5)),
    "used there and back": (lambda w, x: jnp.tanh(x @ w) @ w.T, _normal(5, 4)),
    "a real part": (lambda p, x: ((1 + 2j) * x @ (p["a"] + 1j * p["b"])).imag, _two((5, 4), (5, 4))),
    "a complex weight": (
        lambda p, x: jnp.abs(jnp.fft.fft(x) @ lax.complex(p["a"], 0.5 * p["b"])),
        _two((5, 4), (5, 4)),
    ),
}  # fmt: skip
# Of one position they need no gradient of an example.
ENTRYWISE = {
    "exponential": (lambda w, x: x @ jnp.exp(w), _normal(5, 4)),
    "squared": (lambda w, x: x @ w**2, _normal(5, 4)),
    "sigmoid": (lambda w, x: x @ jax.nn.sigmoid(w), _normal(5, 4)),
}
ELEMENTWISE = {
    "one and a scale": (lambda s, x: x * (1 + s), _normal(5)),
    "a scale by a constant": (lambda s, x: x * (s * M54[:, 0]), _normal(5)),
}


def _total(cases):
    """(one loss of all cases, its parameters)."""

    def loss_fn(params, x):
        return sum(jnp.sin(f(params[name], x)).sum() ** 2 for name, (f, _) in cases.items())

    return loss_fn, {name: param for name, (_, param) in cases.items()}


def _agree(loss_fn, params, batch, rtol=1e-9):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        got = cg.grad_moments(loss_fn)(params, batch)
        want = cg.grad_moments(loss_fn, method="vmap")(params, batch)
        norms = cg.per_example_sq_norms(loss_fn)(params, batch)
        each = cg.per_example_sq_norms(loss_fn, method="vmap")(params, batch)
    for a, b in ((got.sum_grads, want.sum_grads), (got.sum_sq_norms, want.sum_sq_norms), (norms, each)):
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("shape", [pytest.param((5,), marks=pytest.mark.slow), (6, 5)])
def test_linear_views(shape):
    loss_fn, params = _total(LINEAR | ENTRYWISE | ELEMENTWISE)
    _agree(loss_fn, params, _normal(3, *shape))


def test_a_linear_view_builds_no_gradient_of_an_example():
    loss_fn, params = _total(LINEAR | ENTRYWISE | ELEMENTWISE)
    with jax.enable_x64(True):
        rules = {row.path: row.rule for row in cg.explain(loss_fn, params, np.ones(5))}
    assert not {path for path, rule in rules.items() if rule in FALLBACKS | {"instantiate"}}
    assert rules["a number"] == rules["a mask"] == rules["a low rank/a"] == rules["exponential"] == "closed"
    assert rules["used twice"] == "gram"
    assert rules["one and a scale"] == "elementwise"


def _cell(p, h, x):
    gates = jnp.concatenate([h, x]) @ jnp.concatenate([p["i"], 2.0 * p["o"]], 1) + p["b"]
    return jnp.tanh(gates[:4]) * gates[4:]


def _recurrent(p, x):
    """A learned first state, kernels concatenated in the cell, and an embedding that is looked up in it."""
    h, _ = lax.scan(lambda h, row: (_cell(p, h, row + p["e"][jnp.int32(row[:2] > 0)].sum(0)), None), p["h"], x)
    return jnp.sin(h).sum()


def _stacked(p, x):
    """Layers of stacked kernels, biases, scales and tables, one of them used twice in a layer."""

    def layer(h, p):
        h = jnp.tanh(h @ (0.3 * p["w"]) + p["b"][None]) * p["s"] + p["e"][jnp.int32(h[0, :2] > 0)].sum(0)
        return jnp.tanh(h @ p["v"]) @ p["v"].T, None

    return lax.scan(jax.checkpoint(layer), x, p)[0].sum() ** 2


def _entrywise(p, x):
    """Stacked layers that see their slices through functions that are not linear."""

    def layer(h, p):
        h = jnp.tanh(h @ jnp.tanh(p["w"])) * jnp.exp(-jnp.exp(p["a"])) + jax.nn.relu(p["b"])
        return h + (p["v"] ** 2).max(0), None

    return lax.scan(layer, x, p)[0].sum() ** 2


def _looked_up(p, x):
    """Tables that are looked up in a scan, beside penalties."""
    ids = jnp.int32(x[:3, :2] > 0)

    def step(h, row):
        return jnp.tanh(h + p["t"][row[0]].sum(0) + row[1][row[0]].sum(0)), None

    h, _ = lax.scan(step, jnp.zeros(4), (ids, p["stacked"]))
    return h.sum() ** 2 + 0.1 * (p["t"] ** 2).sum() + 0.2 * (p["stacked"] ** 2).sum()


SCANS = {
    "entrywise": (_entrywise, {"w": _normal(3, 5, 5), "a": _normal(3, 5), "b": _normal(3, 5), "v": _normal(3, 2, 5)}),
    "looked up": (_looked_up, {"t": _normal(2, 4), "stacked": _normal(3, 2, 4)}),
    "recurrent": (
        _recurrent,
        {"i": _normal(9, 4), "o": _normal(9, 4), "b": _normal(8), "h": _normal(4), "e": _normal(2, 5)},
    ),
    "stacked": (
        _stacked,
        {"w": _normal(3, 5, 5), "b": _normal(3, 5), "s": _normal(3, 5), "e": _normal(3, 2, 5), "v": _normal(3, 5, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_views_in_the_body_of_a_scan(name):
    loss_fn, params = SCANS[name]
    _agree(loss_fn, params, _normal(3, 6, 5))
    with jax.enable_x64(True):
        rules = {row.path: row.rule for row in cg.explain(loss_fn, params, np.ones((6, 5)))}
    if name in ("recurrent", "stacked"):
        assert {path for path, rule in rules.items() if rule in FALLBACKS} <= {"v"}


def test_layers_in_a_scan_take_the_memory_of_a_plain_gradient():
    params = {"w": jnp.ones((8, 32, 32)), "b": jnp.ones((8, 32)), "s": jnp.ones((8, 32))}
    x = jnp.ones((16, 64, 32))

    def loss_fn(p, x):
        def layer(h, p):
            return h + jnp.tanh(jnp.sin(h * p["s"]) @ p["w"] + p["b"]), None

        return (lax.scan(jax.checkpoint(layer), x, p)[0] ** 2).sum()

    def plain(p, x):
        return jax.grad(lambda p: jax.vmap(loss_fn, in_axes=(None, 0))(p, x).mean())(p)

    assert temporary_bytes(cg.grad_moments(loss_fn), params, x) <= 1.5 * temporary_bytes(plain, params, x)


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_of_factors_may_leave_the_range_where_the_norm_fits(size, positions):
    x = np.full((2, *positions, 4), size, np.float32)
    norms = cg.per_example_sq_norms(lambda w, x: ((x @ w) / np.float32(size)).sum())(jnp.ones((4, 2)), x)
    np.testing.assert_allclose(norms, 8 * np.prod(positions, initial=1) ** 2, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint8, "clip"), (np.int8, "fill")])
def test_narrow_indices_of_a_long_axis(dtype, mode):
    w, x = np.float32(_normal(3, 300)), np.float32(_normal(4, 3))
    places = jnp.array([1, 5, 120, 5], dtype)
    losses = [lambda w, x: jnp.tanh(x @ jnp.take(w, places, axis=1, mode=mode)).sum() for _ in range(2)]
    got, want = (cg.grad_moments(f, method=m)(w, x) for f, m in zip(losses, ("ghost", "vmap"), strict=True))
    np.testing.assert_allclose(got.sum_sq_norms, want.sum_sq_norms, rtol=1e-5)


def test_each_value_of_a_barrier_is_a_view_of_its_own():
    def loss_fn(p, x):
        a, b = lax.optimization_barrier((p["a"], p["b"]))
        return (jnp.tanh(x @ a) @ b).sum()

    params = {"a": _normal(5, 4), "b": _normal(4, 3)}
    assert [row.rule for row in cg.explain(loss_fn, params, np.ones(5))] == ["closed", "closed"]
    _agree(loss_fn, params, _normal(3, 5))
