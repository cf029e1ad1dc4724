"""Updates that do not fit: every silent change of shape is an error that says what to do; every tree is taken."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import cg_jax as cg

PARAMS = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(())}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
THREE = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 + leaf, leaf]), GRADS)
LABELS = {"w": "trained", "b": "frozen"}


def _update(transform, grads, params=None, jit=True):
    update = jax.jit(transform.update) if jit else transform.update
    return update(grads, transform.init(PARAMS), params)[0]


def _sgd_after(transform):
    return optax.chain(transform, optax.sgd(0.1))


@pytest.mark.parametrize("params", [None, PARAMS], ids=["without params", "with params"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("transform", [cg.m3(optax.adam(0.1)), _sgd_after(cg.rm3()), cg.ra3()])
def test_k_gradients_into_what_takes_one(transform, jit, params):
    message = (
        r"Expected updates\['b'\] of shape \[\], for a parameter of shape \[\], got shape \[3\]; .*one gradient a call"
    )
    with pytest.raises(ValueError, match=message):
        _update(transform, THREE, params, jit)


def test_what_has_no_slots_is_compared_with_params():
    for transform in (cg.rolling(cg.median(), 1), cg.consecutive(cg.median(), 1, optax.sgd(0.1))):
        with pytest.raises(ValueError, match=r"got shape \[3\]; .*one gradient a call"):
            _update(transform, THREE, PARAMS)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("transform", [cg.stacked(cg.mean()), _sgd_after(cg.median_of_k(2))])
def test_one_gradient_into_what_takes_k(transform, jit):
    message = r"updates\['b'\] of shape \[k\], for a parameter of shape \[\], got shape \[\]; stack k gradients, as"
    with pytest.raises(ValueError, match=message):
        _update(transform, GRADS, PARAMS, jit)


def test_one_gradient_whose_leading_axis_is_k_by_chance():
    transform, w = cg.median_of_k(2), jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"Expected updates of shape \[k, 2, 4\], for a parameter of shape \[2, 4\]"):
        transform.update(w, transform.init(w), w)


@pytest.mark.parametrize("masking", ["partition", "multi_transform", "masked"])
@pytest.mark.parametrize(
    ("make", "name"), [(lambda: cg.median_of_k(3), "median_of_k\\(3\\)"), (lambda: cg.stacked(cg.median()), "stacked")]
)
def test_leaves_that_a_mask_hides_would_stay_stacked(make, name, masking):
    each = {"trained": _sgd_after(make()), "frozen": optax.set_to_zero()}
    wrap = {"partition": optax.partition, "multi_transform": getattr(optax, "multi_transform", optax.partition)}
    mask = {"w": True, "b": False}
    transform = optax.masked(make(), mask) if masking == "masked" else wrap[masking](each, LABELS)
    message = (
        rf"Expected {name} to receive every leaf, got updates\['b'\] masked, .*; put it before: optax\.chain\({name}"
    )
    with pytest.raises(ValueError, match=message):
        _update(transform, THREE, PARAMS)
    rest = optax.partition({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, LABELS)
    updates = _update(optax.chain(make(), rest), THREE, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_two_rules_for_two_parts():
    each = {
        "trained": cg.stacked(cg.median(), partial=True),
        "frozen": cg.stacked(cg.mean(), partial=True),
        "none": cg.stacked(cg.mean(), partial=True),
    }
    updates = _update(optax.partition(each, LABELS), THREE, PARAMS)
    np.testing.assert_array_equal(updates["w"], jnp.ones((2, 4)))
    np.testing.assert_array_equal(updates["b"], 2.0)


@pytest.mark.parametrize("transform", [cg.m3(optax.sgd(1.0)), cg.rm3()])
@pytest.mark.parametrize(
    ("grads", "got"),
    [
        ({"w": jnp.ones((2, 4))}, r"no updates\['b'\]"),
        ({**GRADS, "more": 1.0}, r"updates\['more'\]"),
        ([1.0, 2.0], r"no updates\['b'\]"),
        (None, r"no updates\['b'\]"),
        ({"w": {"inside": 1.0}, "b": 1.0}, r"no updates\['w'\]"),
        (FrozenDict(GRADS), "FrozenDict nodes"),
    ],
)
def test_updates_of_another_structure(transform, grads, got):
    with pytest.raises(ValueError, match=rf"structure that the parameters had at init, got {got}; pass gradients of"):
        transform.update(grads, transform.init(PARAMS))


def test_integers_are_no_gradients_to_aggregate():
    with pytest.raises(ValueError, match=r"floating dtype, got updates\['n'\] of dtype int32; use None for leaves"):
        _update(cg.median_of_k(3), {"n": jnp.ones((3, 2), int)})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (0.1, r"got optimizer=0\.1; pass one such as optax\.sgd\(learning_rate\)"),
        (None, r"got optimizer=None; pass one such as"),
        (optax.sgd, r"got optimizer=sgd; call it first: sgd\(…\)"),
        (optax.MultiSteps, r"got optimizer=MultiSteps; call it first"),
        (cg.m3, r"got optimizer=m3; call it first"),
        (cg.trimmed_mean(1), r"got the rule cg_jax\.trimmed_mean\(1\); wrap it: cg_jax\.stacked\(cg_jax\.trimmed_mean"),
    ],
)
@pytest.mark.parametrize("make", [cg.m3, lambda optimizer: cg.consecutive(cg.mean(), 2, optimizer), cg.checked])
def test_what_is_no_optimizer(make, optimizer, message):
    with pytest.raises(TypeError, match=rf"Expected .*an optax transformation, {message}"):
        make(optimizer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


def _nnx_state():
    return nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)


TREES = {
    "FrozenDict": lambda: FrozenDict(PARAMS),
    "dataclass": lambda: Layer(jnp.zeros((2, 4)), jnp.zeros(2)),
    "NNX state": _nnx_state,
    "None inside": lambda: {"w": jnp.zeros(3), "absent": None},
    "one array": lambda: jnp.zeros(3),
    "empty leaves": lambda: {"w": jnp.zeros((0, 2)), "b": jnp.zeros(1)},
}
TAKING = {
    "median_of_k": (lambda: _sgd_after(cg.median_of_k(3)), True),
    "m3": (lambda: cg.m3(optax.adam(0.1)), False),
    "rm3": (lambda: _sgd_after(cg.rm3()), False),
    "MultiSteps inside": (lambda: optax.chain(cg.rm3(), optax.MultiSteps(optax.sgd(0.1), 2)), False),
    "MultiSteps around": (lambda: optax.MultiSteps(_sgd_after(cg.rm3()), 2), False),
    "MultiSteps in m3": (lambda: cg.m3(optax.MultiSteps(optax.sgd(0.1), 2)), False),
    "apply_if_finite around": (lambda: optax.apply_if_finite(cg.m3(optax.sgd(0.1)), 2), False),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", TAKING)
def test_every_tree_goes_through_every_composition(name, tree):
    make, stacked = TAKING[name]
    params, transform = TREES[tree](), make()
    grads = jax.tree.map(lambda p: jnp.ones((3, *p.shape) if stacked else p.shape), params)

    @jax.jit
    def step(params, state):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, transform.init(params)
    for _ in range(6):
        trained, state = step(trained, state)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    for after, before in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        assert after.shape == before.shape
        assert (after < before).all()


@pytest.mark.parametrize("make", [lambda: cg.m3(optax.sgd(1.0)), lambda: _sgd_after(cg.rm3())])
def test_masks_and_partitions_around_what_takes_one_gradient(make):
    each = {"trained": make(), "frozen": optax.set_to_zero()}
    for transform in (optax.partition(each, LABELS), optax.masked(make(), {"w": True, "b": False})):
        state = transform.init(PARAMS)
        for value in (1.0, 70.0, 4.0):
            gradient = jax.tree.map(lambda g, value=value: value * g, GRADS)
            updates, state = jax.jit(transform.update)(gradient, state, PARAMS)
        assert (np.asarray(updates["w"]) < 0).all()
        assert float(updates["b"]) in (0.0, 4.0)  # set to zero, or passed by as optax.masked does


def test_the_state_can_be_mapped_by_optax():
    transform = cg.m3(optax.adam(0.1))
    doubled = optax.tree.map_params(transform, lambda leaf: leaf + 1, transform.init(PARAMS))
    np.testing.assert_array_equal(doubled.grads["w"], jnp.ones((2, 2, 4)))


MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "checking leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_jax(mode):
    want = jax.tree.map(lambda leaf: -jnp.ones(leaf.shape), PARAMS)
    with MODES[mode]():
        for transform, grads in (
            (cg.m3(optax.sgd(1.0)), GRADS),
            (optax.chain(cg.rm3(), optax.sgd(1.0)), GRADS),
            (optax.chain(cg.rolling(cg.trimmed_mean(1), 3), optax.sgd(1.0)), GRADS),
            (
                cg.checked(optax.chain(cg.median_of_k(3), optax.sgd(1.0))),
                jax.tree.map(lambda g: jnp.stack([g, g, g]), GRADS),
            ),
        ):
            updates, state = None, transform.init(PARAMS)
            for _ in range(3):
                updates, state = transform.update(grads, state, PARAMS)
            chex.assert_trees_all_equal(updates, want)
        over = jax.vmap(lambda g: cg.across_devices(cg.median(), "d").update(g, None)[0], axis_name="d")
        np.testing.assert_array_equal(over(jnp.arange(3.0)), 1.0)
        grads = cg.micro_batch_grads(lambda w, x: (w * x).mean(), 2, batch_loss=True)(jnp.ones(()), jnp.arange(4.0))
        np.testing.assert_array_equal(grads, [0.5, 2.5])
