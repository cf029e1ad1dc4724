"""The wrapper that finds silent changes of shape."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cg_jax as cg

PARAMS = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(3)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
THREE = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), GRADS)
LABELS = {"w": "trained", "b": "frozen"}


def _partition(trained, frozen):
    return optax.partition({"trained": trained, "frozen": frozen}, LABELS)


STACKED = r"put cg_jax\.stacked\(rule\) or median_of_k\(k\) first in optax\.chain, outside of optax\.partition"
SHAPES = {
    "no stacked": (optax.sgd(0.1), rf"updates\['b'\] of shape \[3\], .* got shape \[3, 3\]; {STACKED}"),
    "after adam": (
        optax.chain(optax.adam(0.1), cg.median_of_k(3)),
        rf"got state\[0\]\[0\]\.mu\['b'\] of shape \[3\] that became \[3, 3\]; {STACKED}",
    ),
    "after momentum": (
        optax.chain(optax.trace(0.9), cg.stacked(cg.median()), optax.sgd(0.1)),
        rf"got state\[0\]\.trace\['b'\] of shape \[3\] that became \[3, 3\]; {STACKED}",
    ),
    "beside set_to_zero": (
        _partition(cg.stacked(cg.median(), partial=True), optax.set_to_zero()),
        rf"updates\['b'\] of shape \[3\], .* got shape \[3, 3\]; {STACKED}",
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_k_gradients_that_nothing_aggregates(name, jit):
    transform, message = SHAPES[name]
    checked = cg.checked(transform)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
        (jax.jit(checked.update) if jit else checked.update)(THREE, checked.init(PARAMS), PARAMS)


ORDERS = {
    "rm3 after adam": optax.chain(optax.adam(0.1), cg.rm3()),
    "m3 after adam": optax.chain(optax.adam(0.1), cg.m3(optax.sgd(1.0))),
    "named": optax.named_chain(("adam", optax.adam(0.1)), ("rm3", cg.rm3())),
    "wrapped": optax.apply_if_finite(optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.9), cg.rm3())), 3),
    "inside a partition": _partition(optax.chain(optax.trace(0.9), cg.rm3()), optax.sgd(0.1)),
    "accumulated before": optax.chain(optax.MultiSteps(optax.identity(), 2).gradient_transformation(), cg.ra3()),
}


@pytest.mark.parametrize("name", ORDERS)
def test_slots_after_a_transformation_with_a_state(name):
    message = (
        r"Expected rolling or consecutive \(m3, rm3, ra3\) before .*, got (Rolling|Consecutive)State after one with"
    )
    with pytest.raises(ValueError, match=message):
        cg.checked(ORDERS[name]).init(PARAMS)


RIGHT = {
    "rm3": (optax.chain(optax.clip(1.0), optax.add_decayed_weights(0.1), cg.rm3(), optax.adam(0.1)), False),
    "m3": (cg.m3(optax.adam(0.1)), False),
    "MultiSteps": (optax.MultiSteps(optax.chain(cg.rm3(), optax.adam(0.1)), 2), False),
    "adam beside": (_partition(optax.chain(cg.rm3(), optax.adam(0.1)), optax.adam(0.1)), False),
    "plain": (optax.adamw(0.1), False),
    "schedule before": (optax.chain(optax.scale_by_schedule(lambda _: 1.0), cg.rm3(), optax.sgd(0.1)), False),
    "stacked": (optax.chain(cg.median_of_k(3), optax.adam(0.1)), True),
    "stacked before a partition": (
        optax.chain(cg.median_of_k(3), _partition(optax.sgd(0.1), optax.set_to_zero())),
        True,
    ),
    "two rules": (_partition(*(cg.stacked(rule, partial=True) for rule in (cg.mean(), cg.median()))), True),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_unchanged(name):
    transform, stacked = RIGHT[name]
    checked, grads = cg.checked(transform), THREE if stacked else GRADS
    states = transform.init(PARAMS), checked.init(PARAMS)
    want = got = None
    for _ in range(3):
        want, plain = transform.update(grads, states[0], PARAMS)
        got, state = jax.jit(checked.update)(grads, states[1], PARAMS)
        states = plain, state
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_integer_parameters_get_zeros():
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    checked = cg.checked(optax.sgd(1.0))
    updates, _ = checked.update({"w": jnp.ones(2), "n": None}, checked.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["n"], params["n"])


def test_params_are_needed():
    checked = cg.checked(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"Expected params, with which updates are compared, got None; call update\("):
        checked.update(GRADS, checked.init(PARAMS))
