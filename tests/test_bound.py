"""Theorem 1 against the plain sum of products."""

import numpy as np
import pytest

import cg_jax as cg

CONSTANTS = {"lipschitz": 2.0, "smoothness": 3.0, "num_examples": 50}


def _plainly(alphas, rates, lipschitz, smoothness, num_examples):
    total = 0.0
    for t, (alpha, rate) in enumerate(zip(alphas, rates, strict=True)):
        product = 1.0
        for later in rates[t + 1 :]:
            product *= 1 + later * smoothness
        total += product * rate * (2 * (1 - alpha)) ** 0.5
    return lipschitz**2 / num_examples * total


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_it_is_the_sum_of_the_theorem(steps):
    rng = np.random.default_rng(steps)
    alphas, rates = rng.uniform(size=steps), rng.uniform(0, 0.2, steps)
    got = cg.generalization_bound(alphas, rates, **CONSTANTS)
    assert got == pytest.approx(_plainly(alphas, list(rates), **CONSTANTS), rel=1e-12)
    got = cg.generalization_bound(alphas, 0.1, **CONSTANTS)
    assert got == pytest.approx(_plainly(alphas, [0.1] * steps, **CONSTANTS), rel=1e-12)


def test_what_is_coherent_or_still_costs_nothing():
    assert cg.generalization_bound(np.ones(5), 0.1, **CONSTANTS) == 0
    assert cg.generalization_bound(np.full(5, 0.3), 0.0, **CONSTANTS) == 0
    assert cg.generalization_bound([0.5], 0.1, **CONSTANTS | {"lipschitz": 0}) == 0


def test_early_steps_weigh_most_and_long_runs_do_not_overflow_on_the_way():
    first, last = np.ones(100), np.ones(100)
    first[0] = last[-1] = 0.5
    assert cg.generalization_bound(first, 0.1, **CONSTANTS) > 100 * cg.generalization_bound(last, 0.1, **CONSTANTS)
    assert cg.generalization_bound(np.full(100_000, 0.5), 0.1, **CONSTANTS) == np.inf
    assert np.isfinite(cg.generalization_bound(np.full(2_000, 0.5), 0.1, **CONSTANTS))


def test_it_falls_with_coherence_and_with_examples():
    values = [cg.generalization_bound(np.full(9, a), 0.1, **CONSTANTS) for a in (0, 0.2, 0.7, 1)]
    assert values == sorted(values, reverse=True)
    half = cg.generalization_bound([0.2], 0.1, **CONSTANTS | {"num_examples": 100})
    assert half == pytest.approx(cg.generalization_bound([0.2], 0.1, **CONSTANTS) / 2)


@pytest.mark.parametrize(
    ("alphas", "rates", "changed", "message"),
    [
        ([], 0.1, {}, r"Expected alphas of shape \[T\] with T >= 1, got shape \[0\]"),
        ([[0.5]], 0.1, {}, r"Expected alphas of shape \[T\] with T >= 1, got shape \[1, 1\]"),
        ([0.5, 1.5], 0.1, {}, r"Expected every value of alphas in \[0, 1\], got alphas from 0.5 to 1.5"),
        ([0.5, np.nan], 0.1, {}, r"Expected every value of alphas in \[0, 1\]"),
        ([0.5, 0.5], [0.1] * 3, {}, r"Expected learning_rates of shape \[\] or \[2\], got shape \[3\]"),
        ([0.5], -0.1, {}, r"Expected learning_rates to be finite and >= 0, got values from -0.1 to -0.1"),
        ([0.5], 0.1, {"lipschitz": -1}, r"Expected lipschitz to be finite and >= 0, got lipschitz=-1"),
        ([0.5], 0.1, {"smoothness": np.inf}, r"Expected smoothness to be finite and >= 0, got smoothness=inf"),
        ([0.5], 0.1, {"num_examples": 0}, r"Expected num_examples >= 1, got num_examples=0"),
    ],
)
def test_arguments_out_of_range(alphas, rates, changed, message):
    with pytest.raises(ValueError, match=message):
        cg.generalization_bound(alphas, rates, **CONSTANTS | changed)
