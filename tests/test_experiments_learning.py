"""Experiments on the learning of single examples: their numbers against an oracle, and their claims on made-up rows."""

import json

import jax
import numpy as np
import pytest

from experiments import early_stopping, easy_hard, halves, learning, models, noisy_labels
from experiments.__main__ import main
from experiments.arrays import InMemory
from experiments.checks import check
from experiments.data import Noise
from experiments.early_stopping import EarlyStoppingConfig
from experiments.easy_hard import EasyHardConfig
from experiments.noisy_labels import NoisyLabelsConfig
from experiments.section import frame
from experiments.train import Keys


@pytest.fixture(scope="module")
def small():
    config = NoisyLabelsConfig(data="digits", num_train=60, num_test=30, width=8)
    data = InMemory(config)
    model = models.build("mlp", 8, None, 10)
    examples = data.noisy(Keys.of(0), Noise(0.5))
    return examples, model, model.init(jax.random.key(1), examples.first)


def test_the_numbers_of_every_example_are_those_of_all_gradients_in_float64(small):
    examples, model, params = small
    each = learning.per_example(examples, model, params)
    images, labels = jax.device_get(examples.arrays("train"))
    loss = models.loss_of(model)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, (images, labels))
    gradients = np.concatenate([leaf.reshape(60, -1) for leaf in jax.tree.leaves(grads)], 1).astype(np.float64)
    np.testing.assert_allclose(each.sq_norms, (gradients**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(each.along, gradients @ gradients.sum(0), rtol=1e-4, atol=1e-4)
    pristine = ~each.corrupt
    total, part = gradients.sum(0), gradients[pristine].sum(0)
    assert learning.part_of(each.along, pristine) == pytest.approx(total @ part / (total @ total), rel=1e-4)
    assert each.alpha == pytest.approx(total @ total / (60 * (gradients**2).sum()), rel=1e-4)
    assert 0.3 < each.corrupt.mean() < 0.6


def _run(seed, noise, **columns):
    """Rows at the steps 0, 10, 20, …, of an epoch of 20 steps."""
    return [
        {"noise": noise, "seed": seed, "step": 10 * i, "epoch": i / 2, **dict(zip(columns, values, strict=True))}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _noisy_rows(swapped):
    rows = []
    for seed in range(5):
        shift = 0.01 * seed
        fast, slow = [0.1, 0.6 + shift, 0.95, 1.0, 1.0], [0.1, 0.1, 0.2 + shift, 0.45, 0.6]
        share, half = [0.55, 0.9 - shift, 0.8, 0.45, 0.3], [0.55] * 5
        if swapped:
            fast, slow, share = slow, fast, [0.55, 0.3, 0.2 + shift, 0.1, 0.1]
        common = {"pristine": half, "share_shuffled": half, "loss": half, "alpha": half, "test": half}
        corrupt = [1 - value for value in share]
        rows += _run(seed, 0.5, fitted_pristine=fast, fitted_corrupt=slow, share=share, share_corrupt=corrupt, **common)
        free = [0.1, 0.65, 1.0, 1.0, 1.0]
        one, none, nan = [1.0] * 5, [0.0] * 5, [float("nan")] * 5
        rows += _run(seed, 0.0, fitted_pristine=free, fitted_corrupt=nan, share=one, share_corrupt=none, **common)
    return frame(rows)


def test_noisy_labels_are_judged_in_both_directions():
    hold = noisy_labels.claims(_noisy_rows(swapped=False), 0.5)
    assert [each.verdict for each in hold] == ["holds"] * 4
    assert hold[0].effect == pytest.approx(0.29)  # (0.9 − 0.02 + 0.8) / 2 − 0.55
    against = noisy_labels.claims(_noisy_rows(swapped=True), 0.5)
    assert [each.verdict for each in against] == ["contradicted"] * 3 + ["not measured"]  # 90% are never fitted


def test_the_step_at_which_a_level_is_reached_is_interpolated():
    (run,) = [frame(_run(0, 0.5, share=[0.2, 0.4, 0.8, 0.1]))]
    assert [learning.reached(run, "share", level) for level in (0.1, 0.3, 0.6)] == pytest.approx([0, 5, 15])
    assert np.isnan(learning.reached(run, "share", 0.9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noises": (0.5, 1.0)}, "Expected noises to be different, > 0 and < 1"),
        ({"noises": ()}, "Expected noises to be different"),
        ({"data": "tfds:mnist"}, "Expected data that fits the memory"),
        ({"estimator": "batch"}, "Expected a model without BatchNorm and estimator exact"),
    ],
)
def test_wrong_options_of_noisy_labels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(NoisyLabelsConfig(**options))


def _stopping_rows(late_peak):
    """Runs whose test accuracy peaks at step 10 or at the last; the crossing lies between the steps 20 and 30."""
    rows = []
    for seed in range(5):
        shift = 0.002 * seed
        test = [0.1, 0.8 + shift, 0.75, 0.7, 0.6]
        effective, alpha, unfitted = [900, 800 + seed, 500, 100, 50], [0.1, 0.2, 0.1, 0.02, 0.01 + shift], 0.9 - shift
        if late_peak:
            test, unfitted = [0.1, 0.2, 0.3, 0.4, 0.9], 0.2 + shift
        for i, line in enumerate(_run(seed, 0.5, test=test, effective_S=effective, alpha=alpha)):
            corrupt, few = (0.1, 0.1, 0.4, 0.6 + shift, 0.9)[i], (0.9, 0.6, 0.4, 0.1, 0.05)[i]
            line["Q"] = _groups(1 - corrupt, 0.0, corrupt, 0.0)
            line["S"] = _groups(0.0, 0.0, unfitted, 1 - unfitted)
            line["count"] = _groups(0.0, 0.5, few / 2, 0.5 - few / 2) if i < 3 else _groups(0.0, 0.5, few, 0.5 - few)
            rows.append(line | {"effective_Q": 5.0, "loss": 1.0})
    return rows


def _groups(*shares):
    return dict(zip(early_stopping._GROUPS, shares, strict=True))


def test_early_stopping_is_judged_in_both_directions():
    hold = early_stopping.claims(early_stopping.with_sums(frame(_stopping_rows(late_peak=False))))
    assert [each.verdict for each in hold] == ["holds"] * 4
    assert hold[0].effect == pytest.approx(10 / 24.9, rel=0.01)
    assert hold[2].effect == pytest.approx(0.9 - 0.004 - 0.5)
    against = early_stopping.claims(early_stopping.with_sums(frame(_stopping_rows(late_peak=True))))
    assert [each.verdict for each in against] == ["contradicted", "not shown", "contradicted", "not shown"]


def test_sums_of_groups_are_of_labels_and_of_the_unfitted():
    rows = [{"seed": 0, "step": 0, "S": _groups(0.1, 0.2, 0.3, 0.4)}]
    rows[0] |= {"Q": _groups(0.4, 0.3, 0.2, 0.1), "count": _groups(0.1, 0.4, 0.2, 0.3)}
    (line,) = early_stopping.with_sums(frame(rows)).to_dict("records")
    wanted = {"S/pristine": 0.3, "S/corrupt": 0.7, "S/unfitted": 0.4, "Q/corrupt": 0.3, "Q/unfitted": 0.6}
    wanted |= {"fitted_pristine": 0.8, "fitted_corrupt": 0.6}
    assert {name: line[name] for name in wanted} == pytest.approx(wanted)


def test_a_wrong_noise_of_early_stopping_is_refused():
    with pytest.raises(ValueError, match="Expected 0 < noise < 1, got noise=0"):
        check(EarlyStoppingConfig(noise=0.0))


def test_the_effective_number_of_examples():
    assert learning.effective_number(np.ones(7)) == pytest.approx(7)
    assert learning.effective_number(np.array([0.0, 3.0, 0.0])) == pytest.approx(1)


LEARNT = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 1],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 1],
    ],
    bool,
)


def test_ranks_of_first_learnt_steps_survive_a_row():
    rows = [halves.as_row(learnt) | {"seed": 3, "step": i} for i, learnt in enumerate(LEARNT)]
    ranks = halves.learnt_ranks([*rows[::-1], {"seed": 3, "step": 0}])  # rows of other trainings say nothing
    # First for two measured steps at the steps 3 1 1 2 3 2 3, never, and the last.
    np.testing.assert_array_equal(ranks[3], [6, 1.5, 1.5, 3.5, 6, 3.5, 6, 9, 8])


def test_halves_are_of_every_class_and_equally_many():
    rng = np.random.default_rng(0)
    ranks, labels = rng.permutation(101).astype(float), rng.integers(0, 3, 101)
    parts = halves.split(ranks, labels)
    for label in range(3):
        early, late = ([i for i in parts[half] if labels[i] == label] for half in ("early", "late"))
        assert len(early) == len(late) == (labels == label).sum() // 2
        assert max(ranks[early]) < min(ranks[late])


def test_the_correlation_of_a_seed_is_its_mean_with_the_others():
    ranks = halves.correlations(frame([{"step": 0, "a": i, "b": i, "c": -i} for i in range(5)])[["a", "b", "c"]])
    assert ranks.to_dict() == pytest.approx({"a": 0, "b": 0, "c": -1})


def test_only_the_rows_that_are_asked_for_are_trained_on():
    data = InMemory(EasyHardConfig(data="digits", num_train=100, num_test=30))
    keys, rows = Keys.of(0), tuple(range(0, 100, 2))
    everything, some = data.noisy(keys, Noise()), data.noisy(keys, Noise(rows=rows, validation=0.2))
    assert (some.num_train, len(some.arrays("valid")[1])) == (40, 10)
    kept = np.concatenate([some.arrays(sample)[1] for sample in ("train", "valid")])
    np.testing.assert_array_equal(np.sort(kept), np.sort(everything.arrays("train")[1][::2]))


def _easy_rows(swapped):
    """α of the easy half is about twice that of the hard one at every loss."""
    rows = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for i, loss in enumerate((2.3, 1.2, 0.6, 0.3, 0.12, 0.04)):
            at = {"seed": seed, "step": i, "epoch": i / 2, "test": 0.5}
            alpha = {"early": 0.2 + 0.01 * seed, "late": 0.1}
            valid = {"early": 0.99 - 0.01 * seed, "late": 0.8}
            if swapped:
                alpha, valid = ({"early": each["late"], "late": each["early"]} for each in (alpha, valid))
            learnt = np.arange(40) < 8 * i
            learnt = learnt[::-1] if swapped and seed else rng.permuted(learnt) if swapped else learnt
            rows.append(at | {"arm": "all", "train": 0.5} | halves.as_row(learnt))
            own = {half: {"alpha": alpha[half], "loss": loss, "train": 0.5} for half in alpha}
            rows.append(at | {"arm": "halves"} | own)
            rows += [at | {"arm": half} | own[half] | {"train": 1.0, "valid": valid[half]} for half in own]
    return rows


def test_easy_and_hard_examples_are_judged_in_both_directions():
    def judged(rows):
        return easy_hard.claims(frame(rows), halves.learnt_ranks(rows))

    hold = judged(_easy_rows(swapped=False))
    assert [each.verdict for each in hold] == ["holds"] * 4
    assert hold[1].effect == pytest.approx((2.0 * 2.1 * 2.2) ** (1 / 3), rel=1e-4)
    against = judged(_easy_rows(swapped=True))
    assert [each.verdict for each in against[1:]] == ["contradicted"] * 3
    assert against[0].verdict == "not shown"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": 1}, "Expected seeds >= 2, as the other"), ({"validation": 0.0}, "Expected 0 < validation < 1")],
)
def test_wrong_options_of_easy_hard_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(EasyHardConfig(**options))


def _smoke(name, out, claims, picture):
    assert main([name, "--smoke", "--out", str(out)]) == 0
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    assert len(section["claims"]) == claims
    assert (out / "figures" / picture).is_file()


def test_noisy_labels_have_a_smoke_test(tmp_path):
    _smoke("noisy-labels", tmp_path / "run", 4, "noisy_labels.png")


def test_early_stopping_has_a_smoke_test(tmp_path):
    _smoke("early-stopping", tmp_path / "run", 4, "early_stopping.png")


def test_easy_hard_has_a_smoke_test(tmp_path):
    _smoke("easy-hard", tmp_path / "run", 4, "easy_hard.png")
