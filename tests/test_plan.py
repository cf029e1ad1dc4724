"""What the engine plans, says of it, and keeps to: explain, register_rule, max_bytes, memory, compile counts."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import temporary_bytes
from jax import lax

import cg_jax as cg
from benchmarks.models import MODELS

RULE_NAMES = {"closed", "gram", "instantiate", "norm", "elementwise"}
FALLBACKS = {"vjp", "vmap", "none"}


def _shapes(batch):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], np.asarray(leaf).dtype), batch)


def _check(rows, params):
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert [row.shape for row in rows] == [leaf.shape for leaf in floats]
    table = str(rows).splitlines()
    assert len(table) == len(rows) + 1
    for row, line in zip(rows, table[1:], strict=True):
        assert row.path in line
        assert row.rule in RULE_NAMES | FALLBACKS
        assert bool(row.reason) == (row.rule in FALLBACKS), row
        assert bool(row.uses) == (row.rule != "none")
        if row.uses:
            assert row.flops > 0
            assert row.chunk >= 1


@pytest.mark.parametrize("name", cases.CASES)
def test_explain_tells_of_every_case(name):
    params, batch = cases.CASES[name].cast(jnp.float32)
    _check(cg.explain(cases.CASES[name].loss_fn, params, _shapes(batch)), params)


@pytest.mark.parametrize("name", MODELS)
def test_explain_tells_of_every_model_of_the_benchmark(name):
    model = MODELS[name]
    dtype = jnp.int32 if len(model.example) == 1 else jnp.float32
    inputs = jax.ShapeDtypeStruct((1, *model.example), dtype)
    params = jax.eval_shape(model.module.init, jax.random.key(0), inputs)
    example = (jax.ShapeDtypeStruct(model.example, dtype), jax.ShapeDtypeStruct((), jnp.int32))

    def loss_fn(params, e):
        return (jnp.asarray(model.module.apply(params, e[0][None])) ** 2).mean() + 0 * e[1]

    rows = cg.explain(loss_fn, params, example)
    _check(rows, params)
    assert {row.path for row in rows if row.rule in FALLBACKS} <= {"params/Embed_0/embedding"}


def test_explain_counts_operations_and_bytes():
    def loss_fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["many"]).mean(0) @ p["one"]).sum()

    params = {"many": jnp.zeros((10, 7)), "one": jnp.zeros((7, 3))}
    few = {row.path: row for row in cg.explain(loss_fn, params, jnp.zeros((4, 10)))}
    assert few["one"][3:6] == ("closed", 2 * (7 + 3) + 2 * 7 * 3, 0)
    assert few["many"][3:6] == ("gram", 2 * 16 * (10 + 7 + 1) + 2 * 4 * 10 * 7, 2 * 16 * 4)
    (many, _) = cg.explain(loss_fn, params, jnp.zeros((500, 10)))
    assert many[3:6] == ("instantiate", 2 * 10 * 7 + 2 * 500 * 10 * 7, 10 * 7 * 4)
    assert many.uses[0].startswith("dot_general, tests/test_plan.py:")


def test_explain_says_why_a_tensor_falls_back():
    def loss_fn(p, x):
        small = lax.while_loop(lambda h: jnp.abs(h).sum() > 1, lambda h: 0.3 * jnp.tanh(h @ p["stopped"]), x)
        h = lax.stop_gradient(small) + jnp.tanh(x @ p["tied"]) @ p["tied"]
        h = jnp.fft.fft(h * p["scale"]).real @ (p["u"] @ p["v"])
        return (h @ (p["normed"] / jnp.linalg.norm(p["normed"]))).sum() + h @ lax.top_k(p["s"], 4)[0]

    params = {name: jnp.ones((4, 4)) for name in ("tied", "u", "v", "normed", "unused", "stopped")}
    params |= {"scale": jnp.ones(4), "s": jnp.ones(5)}
    why = {row.path: (row.rule, row.reason) for row in cg.explain(loss_fn, params, jnp.ones(4))}
    assert why["scale"] == ("elementwise", "")
    assert why["tied"] == ("gram", "")  # two positions of one product
    assert why["u"] == why["v"] == ("closed", "")  # each acts on one factor of the other's gradient
    assert why["normed"] == ("vjp", "transformed by other parameters or in several ways before dot_general")
    assert why["unused"] == ("none", "no example's gradient reaches it")
    assert why["stopped"] == ("none", "no example's gradient reaches it")


def test_a_loss_that_jax_cannot_differentiate_is_refused_by_equation_and_line():
    def loss_fn(w, x):
        return lax.while_loop(lambda h: (h**2).sum() > 1, lambda h: 0.3 * h @ w, x @ w).sum()

    with pytest.raises(ValueError, match=r"gradient passes through while, at .*test_plan\.py:\d+.*no reverse mode"):
        cg.grad_moments(loss_fn)(jnp.eye(3), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet", marks=pytest.mark.slow),
        "tied embedding",
        "attention",
        "low rank",
        "checkpoint around layers",
    ],
)
def test_results_do_not_depend_on_max_bytes(name):
    case = cases.CASES[{"low rank": "weight norm of a product"}.get(name, name)]
    with jax.enable_x64(True):
        params, batch = case.cast(jnp.float64)
        want = cg.grad_moments(case.loss_fn, method="vmap")(params, batch)
        for max_bytes in (1, 1000):
            got = cg.grad_moments(case.loss_fn, max_bytes=max_bytes)(params, batch)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_max_bytes_bounds_what_is_built_for_a_tied_embedding():
    table, ids = jnp.ones((4096, 64)), jnp.zeros((64, 8), jnp.int32)

    def loss_fn(e, ids):
        return jax.nn.logsumexp(e[ids] @ e.T, axis=-1).mean()

    def bytes_at(limit):
        return temporary_bytes(lambda e, x: cg.grad_moments(loss_fn, max_bytes=limit)(e, x), table, ids)

    plain = temporary_bytes(
        lambda e, x: jax.grad(lambda e: jax.vmap(loss_fn, in_axes=(None, 0))(e, x).mean())(e), table, ids
    )
    batch_times_table = 4 * ids.shape[0] * table.size
    assert bytes_at(4 * table.size * 4) <= 1.05 * plain
    assert bytes_at(4 * batch_times_table) > batch_times_table
    assert temporary_bytes(lambda e, x: cg.grad_moments(loss_fn, method="vmap")(e, x), table, ids) > batch_times_table


@pytest.mark.parametrize("stacked", [False, True])
def test_a_checkpointed_program_keeps_its_memory_but_for_what_the_rules_need(stacked):
    layers, size, width, batch = 6, 64, 64, 16

    def block(h, w):
        y = h @ w
        for _ in range(10):
            y = jnp.sin(y) * 1.1 + y * y * 0.1
        return h + y

    def loss_fn(p, x, f=jax.checkpoint(block)):  # noqa: B008
        if stacked:
            return (lax.scan(lambda h, w: (f(h, w), None), x, p)[0] ** 2).sum()
        for w in p:
            x = f(x, w)
        return (x**2).sum()

    def gradient(p, x, f=loss_fn):
        return jax.grad(lambda p: jax.vmap(f, in_axes=(None, 0))(p, x).mean())(p)

    params, x = jnp.ones((layers, width, width)), jnp.ones((batch, size, width))
    plain = temporary_bytes(gradient, params, x)
    without = temporary_bytes(lambda p, x: gradient(p, x, lambda p, x: loss_fn(p, x, block)), params, x)
    ours = temporary_bytes(lambda p, x: cg.grad_moments(loss_fn)(p, x), params, x)
    # The input and the cotangent of every product; a scan also takes the zeros that the cotangents are those of.
    kept = (3 if stacked else 2) * layers * x.size * 4
    assert ours <= 1.1 * plain + kept
    assert ours < without / 1.5


def test_a_registered_rule_is_used_and_right():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))

    def loss_fn(w, x):
        return jnp.sin(x * w).sum() ** 2

    assert cg.explain(loss_fn, jnp.asarray(w), jnp.asarray(x[0]))[0].rule == "elementwise"
    with cg.register_rule("mul", lambda eqn, view: cg.Norm(lambda seen, c: ((seen[0] * c) ** 2).sum())):
        # An elementwise use has its own way; a rule for it is asked first.
        assert cg.explain(loss_fn, jnp.asarray(w), jnp.asarray(x[0]))[0].rule == "norm"
        with jax.enable_x64(True):
            want = oracle.statistics(*oracle.per_example(loss_fn, w, x))
            got = cg.grad_moments(lambda w, x: loss_fn(w, x))(w, x)
        np.testing.assert_allclose(got.sum_sq_norms, want.sum_sq_norms[0], rtol=1e-12)
        np.testing.assert_allclose(got.sum_grads, want.sum_grads[0], rtol=1e-11)


def test_a_registered_product_takes_the_place_of_a_rule():
    calls = []

    def product(eqn, view):
        calls.append(view)
        d, p = eqn.invars[view].aval.shape
        return cg.Product(lambda x, c: (x[None, None], c[None, None]), lambda g: g[0], (1, 1, d, p))

    with cg.register_rule("dot_general", product):
        got = cg.per_example_sq_norms(lambda w, x: (x @ w).sum())(jnp.zeros((2, 3)), jnp.array([[3.0, 4.0]]))
    assert set(calls) == {1}
    assert float(got[0]) == pytest.approx(3 * 25)


def test_a_rule_that_gives_something_else_is_refused():
    with pytest.raises(TypeError, match="Expected primitive to be the name of one"):
        cg.register_rule(lax.mul_p, lambda eqn, view: None)
    with pytest.raises(TypeError, match=r"Expected rule to be a function of \(eqn, view\), got int"):
        cg.register_rule("mul", 3)
    with (
        cg.register_rule("mul", lambda eqn, view: 3),
        pytest.raises(TypeError, match="Expected the rule of mul to give a Product, a Norm or None, got int"),
    ):
        cg.grad_moments(lambda w, x: (w * x).sum())(jnp.ones(2), jnp.ones((3, 2)))
    with (
        cg.register_rule("mul", lambda eqn, view: cg.Norm(lambda seen, c: c**2)),
        pytest.raises(ValueError, match=r"Expected the rule of mul to give one number .* of shape \(2,\)"),
    ):
        cg.grad_moments(lambda w, x: (w * x).sum())(jnp.ones(2), jnp.ones((3, 2)))


def test_rules_hold_in_checkpoints_and_checkpoints_of_scans_are_opened():
    def layers(p, x):
        return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["w"])[0]

    def loss_fn(p, ids):
        x = jax.checkpoint(lambda e, i: e[i])(p["e"], ids)
        return jax.checkpoint(layers)(p, layers(p, x)).sum() + jax.checkpoint(layers)({"w": p["v"]}, x).sum()

    params = {"w": jnp.ones((3, 4, 4)), "v": jnp.ones((3, 4, 4)), "e": jnp.ones((9, 4))}
    found = {row.path: row.rule for row in cg.explain(loss_fn, params, jnp.zeros(2, jnp.int32))}
    assert found == {"e": "norm", "v": "gram", "w": "gram"}


def test_equations_grow_linearly_with_depth():
    def equations(depth):
        def loss_fn(p, x):
            for w, b in p:
                x = jnp.tanh(x @ w + b)
            return x.sum()

        params = [(jnp.ones((4, 4)), jnp.ones(4))] * depth
        jaxpr = jax.make_jaxpr(lambda p, x: cg.grad_moments(loss_fn)(p, x))(params, jnp.ones((2, 4)))
        (inner,) = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if "jaxpr" in eqn.params]
        return len(inner.eqns)

    assert equations(40) - equations(30) == equations(20) - equations(10)


@pytest.mark.parametrize("function", [cg.grad_moments, cg.per_example_sq_norms])
def test_max_bytes_is_checked(function):
    with pytest.raises(ValueError, match="Expected max_bytes >= 1, got max_bytes=0"):
        function(lambda w, x: w * x, max_bytes=0)
    with pytest.raises(ValueError, match="Expected max_bytes >= 1, got max_bytes=0"):
        cg.explain(lambda w, x: w * x, 1.0, 1.0, max_bytes=0)
