"""The optax transformations against plain loops over NumPy arrays."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import memory, trees_close
from optax.experimental import aggregating

import cg_jax as cg

RULES = {"mean": (cg.mean(), np.mean), "median": (cg.median(), np.median)}
PARAMS = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(()), jnp.zeros(4, jnp.bfloat16))}


def _gradients(number):
    rng = np.random.default_rng(number)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS) for _ in range(number)]


def _over(reduce, trees):
    """reduce over the trees, leaf by leaf, in float64."""
    return jax.tree.map(lambda *leaves: reduce(np.stack([np.asarray(x, np.float64) for x in leaves]), axis=0), *trees)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _rule_of(reduce, trees):
    """reduce over the trees, in their dtypes."""
    return jax.tree.map(lambda value, like: jnp.asarray(value, like.dtype), _over(reduce, trees), trees[0])


def _close(got, want):
    def leaf(a, b):
        rtol = 1e-2 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=1e-6)

    jax.tree.map(leaf, got, want)


def _zero(tree):
    return all(not np.asarray(leaf, np.float64).any() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_stacked_is_the_rule_on_the_leading_axis(k, name):
    rule, reduce = RULES[name]
    gradients = _gradients(k)
    transform = cg.stacked(rule)
    updates, state = transform.update(_stack(gradients), transform.init(PARAMS))
    _close(updates, _over(reduce, gradients))
    assert state == optax.EmptyState()
    assert jax.tree.map(lambda leaf: leaf.dtype, updates) == jax.tree.map(lambda leaf: leaf.dtype, PARAMS)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_consecutive_takes_a_step_at_every_kth_call(k, name):
    rule, reduce = RULES[name]
    optimizer = cg.consecutive(rule, k, optax.sgd(0.5, momentum=0.9))
    inner = optax.sgd(0.5, momentum=0.9)
    update = jax.jit(optimizer.update)
    state, inner_state = optimizer.init(PARAMS), inner.init(PARAMS)
    gradients = _gradients(3 * k)
    for i, gradient in enumerate(gradients):
        before = state.inner_state
        updates, state = update(gradient, state)
        if (i + 1) % k:
            assert _zero(updates)
            chex.assert_trees_all_equal(state.inner_state, before)
        else:
            aggregate = _rule_of(reduce, gradients[i + 1 - k : i + 1])
            want, inner_state = inner.update(aggregate, inner_state)
            _close(updates, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), want))
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, PARAMS)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_rolling_is_the_rule_over_the_last_k_and_passes_through_before(k, name):
    rule, reduce = RULES[name]
    transform = cg.rolling(rule, k)
    update, state = jax.jit(transform.update), transform.init(PARAMS)
    gradients = _gradients(4 * k)
    for i, gradient in enumerate(gradients):
        updates, state = update(gradient, state)
        if i + 1 < k:
            chex.assert_trees_all_equal(updates, gradient)
        else:
            _close(updates, _over(reduce, gradients[i + 1 - k : i + 1]))


@pytest.mark.parametrize("k", [3, 5])
def test_the_state_is_written_in_place(k):
    params = {"a": jax.ShapeDtypeStruct((1 << 20,), jnp.float32), "b": jax.ShapeDtypeStruct((1 << 10,), jnp.float32)}
    size = 4 * ((1 << 20) + (1 << 10))
    for transform in (cg.rolling(cg.median(), k), cg.consecutive(cg.median(), k, optax.sgd(0.1))):
        used = memory(transform.update, params, jax.eval_shape(transform.init, params), donate=1)
        assert used.alias_size_in_bytes >= (k - 1) * size
        assert used.temp_size_in_bytes < size / 50


@pytest.mark.parametrize("batch_size", [50, 512])
def test_a_training_step_writes_over_its_two_slots_and_needs_little_more_memory_than_sgd(batch_size):
    shapes = {"a": (784, 512), "b": (512, 512), "c": (512, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((batch_size, 784), jnp.float32)
    size = 4 * sum(p.size for p in params.values())

    def loss(p, x):
        return jnp.mean(jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"])

    def of_step(optimizer):
        def step(params, state, x):
            updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        return memory(step, params, jax.eval_shape(optimizer.init, params), x, donate=(0, 1))

    sgd, rm3 = of_step(optax.sgd(0.1)), of_step(optax.chain(cg.rm3(), optax.sgd(0.1)))
    assert rm3.alias_size_in_bytes >= 3 * size  # the parameters and two slots
    assert rm3.temp_size_in_bytes <= sgd.temp_size_in_bytes + 2 * size


@pytest.mark.parametrize("transform", [cg.rm3(), cg.m3(optax.adam(0.1))])
def test_a_fresh_state_can_be_donated(transform):
    params = {"a": jnp.ones(3)}
    state = transform.init(params)
    _, state = jax.jit(transform.update, donate_argnums=1)(params, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_papers_names():
    gradients = _gradients(6)
    pairs = [
        (cg.m3(optax.sgd(0.1)), cg.consecutive(cg.median(), 3, optax.sgd(0.1))),
        (cg.rm3(), cg.rolling(cg.median(), 3)),
        (cg.ra3(), cg.rolling(cg.mean(), 3)),
    ]
    for named, plain in pairs:
        states = named.init(PARAMS), plain.init(PARAMS)
        for gradient in gradients:
            (a, first), (b, second) = named.update(gradient, states[0]), plain.update(gradient, states[1])
            states = first, second
            chex.assert_trees_all_equal(a, b)


SOURCES = {
    "stacked": lambda: cg.stacked(cg.median()),
    "median_of_k": lambda: cg.median_of_k(3),
    "consecutive": lambda: cg.consecutive(cg.median(), 3, optax.adam(0.1)),
    "rolling": lambda: cg.rolling(cg.median(), 3),
    "m3": lambda: cg.m3(optax.adam(0.1)),
    "rm3": cg.rm3,
    "ra3": cg.ra3,
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_take_extra_arguments_and_their_state_survives(name):
    transform = SOURCES[name]()
    assert isinstance(transform, optax.GradientTransformationExtraArgs)
    gradients = [_stack([g] * 3) if name in ("stacked", "median_of_k") else g for g in _gradients(5)]
    state = transform.init(PARAMS)
    assert isinstance(state, tuple)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    for gradient in gradients[:4]:
        _, state = transform.update(gradient, state, PARAMS, value=jnp.asarray(0.0))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(transform.init(PARAMS), saved)
    leaves, structure = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(structure, leaves)
    want, _ = transform.update(gradients[4], state)
    for other in (restored, rebuilt):
        got, _ = jax.jit(transform.update)(gradients[4], other)
        _close(got, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), want))


def test_extra_arguments_reach_the_inner_optimizer():
    def update_fn(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    optimizer = cg.consecutive(cg.mean(), 2, inner)
    state = optimizer.init(jnp.zeros(2))
    _, state = optimizer.update(jnp.ones(2), state, factor=5.0)
    updates, _ = optimizer.update(jnp.full(2, 3.0), state, factor=5.0)
    np.testing.assert_allclose(updates, 10.0)


def test_composition_in_a_chain():
    # As the papers: weight decay on every gradient before the median, a plain step after it.
    optimizer = optax.chain(optax.add_decayed_weights(0.1), cg.rm3(), optax.sgd(0.5))
    params = jnp.array([2.0, -1.0])
    state = optimizer.init(params)
    seen = []
    for gradient in np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32):
        seen.append(gradient + 0.1 * np.asarray(params))
        updates, state = jax.jit(optimizer.update)(jnp.asarray(gradient), state, params)
        direction = np.median(seen[-3:], axis=0) if len(seen) >= 3 else seen[-1]
        np.testing.assert_allclose(updates, -0.5 * direction, rtol=1e-5)
        params = optax.apply_updates(params, updates)


def test_stacked_is_an_aggregator_of_optax():
    clip = jax.vmap(lambda g: optax.projections.projection_l2_ball(g, 1.0))
    optimizer = aggregating.process(
        optax.stateless(lambda updates, _: clip(updates)), cg.stacked(cg.median()), optax.sgd(1.0)
    )
    params, gradients = jnp.zeros(3), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    updates, _ = optimizer.update(jnp.asarray(gradients), optimizer.init(params), params)
    norms = np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1)
    np.testing.assert_allclose(updates, -np.median(gradients / norms, axis=0), rtol=1e-5)


def test_accumulation_goes_around_what_comes_after():
    optimizer = optax.chain(cg.stacked(cg.median()), optax.apply_if_finite(optax.sgd(1.0), 5))
    params = jnp.zeros(2)
    state = optimizer.init(params)
    updates, state = optimizer.update(jnp.array([[1.0, jnp.nan], [2.0, 1.0], [3.0, 1.0]]), state, params)
    assert _zero(updates)
    updates, _ = optimizer.update(jnp.array([[1.0, 4.0], [2.0, 1.0], [3.0, 1.0]]), state, params)
    np.testing.assert_allclose(updates, [-2.0, -1.0])


@pytest.mark.parametrize(
    ("transform", "want"),
    [(cg.rm3(), [1, np.nan, np.nan, np.nan, 1, 1]), (cg.m3(optax.sgd(1.0)), [0, 0, np.nan, 0, 0, -1])],
    ids=["rolling", "consecutive"],
)
def test_a_gradient_that_is_not_finite_leaves_with_the_window(transform, want):
    state = transform.init(jnp.zeros(1))
    out = []
    for gradient in (1.0, jnp.nan, 1.0, 1.0, 1.0, 1.0):
        updates, state = transform.update(jnp.array([gradient]), state)
        out.append(float(updates[0]))
    np.testing.assert_array_equal(out, want)


def test_integer_leaves_of_the_parameters_have_no_slots():
    params = {"w": jnp.zeros(2), "n": jnp.asarray(3)}
    state = cg.rm3().init(params)
    assert [slot["n"] for slot in state.grads] == [None, None]
    updates, _ = cg.rm3().update({"w": jnp.ones(2), "n": None}, state)
    np.testing.assert_array_equal(updates["w"], 1.0)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_micro_batch_grads_are_means_over_consecutive_rows(k):
    def loss_fn(p, example):
        x, y = example
        return 0.5 * (x @ p["w"] + p["b"] - y) ** 2

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.asarray(0.3)}
    batch = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    got = jax.jit(cg.micro_batch_grads(loss_fn, k))(params, batch)
    every = cg.per_example_grads(loss_fn)(params, batch)
    want = jax.tree.map(lambda g: np.asarray(g).reshape(k, 12 // k, *g.shape[1:]).mean(1), every)
    trees_close(got, want)
