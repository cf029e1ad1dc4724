"""Every public function under every mode of JAX, on the same data: the same numbers, and nothing raised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import PartitionSpec as P

import cg_jax as cg

X = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0], [-1.0, 0.5], [4.0, 1.0]], np.float32)
SPOILT = np.where(np.arange(5)[:, None] == 2, np.float32(np.nan), X)
ROWS = np.array([[1.0, 5.0], [4.0, -2.0], [7.0, 0.0], [2.0, 2.0]], np.float32)


def loss_fn(p, x):
    return jnp.square(jnp.tanh(x @ p["w"]) + p["b"]).sum()


def mean_loss(p, rows):
    return jax.vmap(loss_fn, (None, 0))(p, rows).mean()


@pytest.fixture(scope="module")
def given():
    """Arrays on a device: jit refuses others where transfers are guarded."""
    params = {"w": jnp.asarray([0.3, -0.2]), "b": jnp.asarray(0.5), "n": jnp.asarray(3)}
    mesh = mesh_of(2)
    grads = jax.device_put(ROWS[:2], jax.sharding.NamedSharding(mesh, P("data")))
    moments = cg.grad_moments(loss_fn)(params, X)
    zero = {"w": jnp.zeros(2), "dead": jnp.zeros(2)}  # opposed gradients, and none
    opposed = cg.GradMoments(jnp.int32(2), jnp.float32(0), zero, {"w": jnp.float32(2), "dead": jnp.float32(0)})
    return {
        "p": params,
        "x": jnp.asarray(X),
        "mask": jnp.asarray(np.arange(5) < 3),
        "mesh": mesh,
        "grads": grads,
        "rows": jnp.asarray(ROWS),
        "moments": moments,
        "of one": cg.grad_moments(loss_fn)(params, X[:1]),
        "opposed": opposed,
    }


def _measured(d, loss=loss_fn, data=X, batch_size=4, **more):
    return cg.measure_coherence(loss, d["p"], data, batch_size=batch_size, **more)


def _steps(optimizer, rows):
    """Four steps, compiled, of a parameter like the last of the axes."""

    @jax.jit
    def run(rows):
        params = jnp.ones(rows.shape[-1:])
        state, seen = optimizer.init(params), []
        for row in rows:
            updates, state = optimizer.update(row, state, params)
            seen.append(updates)
        return seen

    return run(rows)


def _across(d):
    rule = cg.across_devices(cg.median(), "data")
    step = jax.shard_map(
        lambda g: rule.update(g[0], rule.init(g[0]))[0], mesh=d["mesh"], in_specs=P("data"), out_specs=P()
    )
    return jax.jit(step)(d["grads"])


# In a few: every one compiles anew in most modes. What is not compiled by itself is called as in a training step.
CALLS = {
    "grad_moments": lambda d: (
        cg.grad_moments(loss_fn)(d["p"], d["x"]),
        cg.grad_moments(loss_fn, "vmap")(d["p"], d["x"], d["mask"]),
        cg.grad_moments(loss_fn, max_bytes=1)(d["p"], d["x"], d["mask"]),
    ),
    "per_example": lambda d: (
        cg.per_example_grads(loss_fn)(d["p"], d["x"]),
        cg.per_example_sq_norms(loss_fn)(d["p"], d["x"]),
        cg.alignments(loss_fn)(d["p"], d["x"], d["p"]),
    ),
    "weighted_grads": lambda d: [
        cg.weighted_grads(loss_fn, weighting, method=method, nonfinite=nonfinite)(d["p"], d["x"], d["mask"])
        for weighting in (
            cg.compose(cg.clip_quantile(0.5), cg.normalize(), cg.agreement(0.5), cg.geometric_median(2)),
            cg.clip_norm(1.0, per_tensor=True),
            cg.trim_loss(0.5),
        )
        for method, nonfinite in (("ghost", "skip"), ("vmap", "propagate"))
    ],
    "moments with weights": lambda d: cg.grad_moments(loss_fn)(d["p"], d["x"], weights=d["mask"].astype("float32")),
    "coherence": lambda d: (
        cg.coherence(d["moments"]),
        jax.jit(cg.coherence)(cg.merge(d["moments"], d["moments"])),
        jax.jit(lambda: cg.GradMoments.zeros(d["p"]))(),
        len(str(cg.coherence(d["moments"]))),
    ),
    "undefined ratios": lambda d: (cg.coherence(d["of one"]), cg.coherence(d["opposed"])),
    "measure_coherence": lambda d: (_measured(d), _measured(d, data=d["x"], batch_size=5, confidence=True)),
    "a mesh": lambda d: _measured(d, data=X[:4], mesh=d["mesh"]),
    "signs": lambda d: _measured(d, estimator="signs", batch_size=8).loss,
    "batch": lambda d: _measured(d, mean_loss, batch_size=2, estimator="batch"),
    "skip": lambda d: (_measured(d, data=SPOILT, nonfinite="skip"), _measured(d, data=X[:1])),
    "micro_batch_grads": lambda d: jax.jit(cg.micro_batch_grads(loss_fn, 5))(d["p"], d["x"]),
    "optimizers": lambda d: (
        _steps(cg.m3(optax.sgd(0.1)), d["rows"]),
        _steps(cg.rm3(), d["rows"]),
        _steps(cg.ra3(), d["rows"]),
        _steps(optax.chain(cg.median_of_k(4), optax.sgd(0.1)), d["rows"][None]),
        _across(d),
    ),
    "rules": lambda d: [
        jax.jit(rule)(d["rows"]) for rule in (cg.mean(), cg.median(), cg.trimmed_mean(1), cg.winsorized_mean(1))
    ],
    "explain": lambda d: [row.flops for row in cg.explain(loss_fn, d["p"], X[0])],
    "bound": lambda d: cg.generalization_bound([0.5], 0.1, lipschitz=1.0, smoothness=1.0, num_examples=10),
}  # fmt: skip
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
}


@pytest.fixture(scope="module")
def wanted(given):
    return functools.cache(lambda call: jax.tree.leaves(CALLS[call](given)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_numbers(mode, call, given, wanted):
    want = wanted(call)
    with MODES[mode]():
        got = jax.tree.leaves(CALLS[call](given))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_told_in_the_same_words_under_debug_nans(given):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"got 1 of 4 examples .*, the first at index 2"):
        _measured(given, data=SPOILT)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"nan"):
        cg.grad_moments(loss_fn)(given["p"], jnp.asarray(SPOILT))
