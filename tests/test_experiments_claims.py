"""The verdicts follow from the numbers, by the rule."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from experiments import figures, label_order, moments
from experiments.checks import check
from experiments.claims import Claim, interval, spread, verdict, with_spread
from experiments.coherence import CoherenceConfig
from experiments.comparison import shares
from experiments.loop import measured_at
from experiments.noise import NoiseConfig
from experiments.section import curve, frame


def _run(labels, seed, points):
    """Rows of one run from (epoch, training loss, r)."""
    return [
        {
            "labels": labels, "seed": seed, "step": 10 * epoch, "epoch": float(epoch),
            "train": {"r": r, "loss": loss}, "test": {"r": r / 2, "loss": loss},
        }
        for epoch, loss, r in points
    ]  # fmt: skip


REAL = [(0, 2.3, 40.0), (1, 1.0, 40.0), (2, 0.1, 10.0)]
LOW = [(0, 2.3, 4.0), (1, 1.0, 4.0), (2, 0.1, 4.0)]
CROSSING = [(0, 2.3, 4.0), (1, 1.0, 4.0), (2, 0.1, 100.0)]


SEEDS = (0, 1, 2)


def _table(real, random):
    """Three seeds, whose r differs a little."""
    rows = []
    for seed in SEEDS:
        for labels, points in (("real", real), ("random", random)):
            rows += _run(labels, seed, [(epoch, loss, r * (1 + seed / 100)) for epoch, loss, r in points])
    return frame(rows)


def _claims(table):
    return {result.statement: result for result in label_order.claims(table)}


AT_LOSS = "On the training sample, r of real labels is above r of random ones at every common training loss."
AT_EPOCH = "On the training sample, r of real labels is above r of random ones at every common epoch."


def test_r_at_a_loss_is_interpolated_in_log_r():
    run = frame(_run("real", 0, [(0, 2.0, 100.0), (1, 1.0, 1.0)]))
    assert label_order.r_at_loss(run, "train", 1.5) == pytest.approx(10.0)
    assert np.isnan(label_order.r_at_loss(run, "train", 0.5))


def test_the_claim_holds_where_real_is_above_random_throughout():
    table = _table(REAL, LOW)
    assert _claims(table)[AT_LOSS].verdict == "holds"
    assert label_order.at_equal_loss(table, "train")["real"].index.min() == 0.1
    assert len(_claims(table)) == 6


def test_the_claim_says_down_to_where_it_holds():
    found = _claims(_table(REAL, CROSSING))
    assert found[AT_LOSS].verdict == "contradicted"
    assert "Above 1 in every seed from 2.25 down to 0.75" in found[AT_LOSS].detail
    assert "at 0.5 it is not in 3 of 3 seed(s) (ratio 0.77)" in found[AT_LOSS].detail
    assert found[AT_EPOCH].verdict == "contradicted"
    assert "up to 1" in found[AT_EPOCH].detail


def test_one_seed_against_it_is_enough_for_not_shown():
    rows = [*_run("real", 0, REAL), *_run("random", 0, LOW), *_run("real", 1, REAL), *_run("random", 1, LOW)]
    rows += [*_run("real", 2, LOW), *_run("random", 2, REAL)]
    assert _claims(frame(rows))[AT_LOSS].verdict == "not shown"


def test_nothing_in_common_is_not_measured():
    result = _claims(_table([(0, 2.3, 40.0), (1, 2.29, 40.0)], LOW))[AT_LOSS]
    assert result.verdict == "not measured"
    assert result.effect is None
    assert "The runs have no training loss in common." in result.detail


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_measure_nothing(seeds):
    table = _table(REAL, LOW)
    result = _claims(table[table["seed"] < seeds])[AT_LOSS]
    assert result.verdict == "not measured"
    assert result.effect == pytest.approx(2.5)
    assert (result.low is None) == (seeds == 1)
    assert f"{seeds} of at least 3 seeds." in result.detail
    with pytest.raises(ValueError, match="Expected seeds >= 3 of a claim, got seeds=2"):
        Claim("", "", "", 1, seeds=2)


@pytest.mark.parametrize(
    ("low", "high", "sign", "want"),
    [
        *[(1, 2, 1, "holds"), (-2, -1, -1, "holds"), (1, 2, -1, "contradicted"), (-2, -1, 1, "contradicted")],
        *[(-1, 2, 1, "not shown"), (0, 2, 1, "not shown"), (-2, 0, 1, "not shown"), (0, 0, -1, "not shown")],
        *[(np.nan, np.nan, 1, "not measured"), (1, np.inf, 1, "not measured")],
    ],
)
def test_the_rule(low, high, sign, want):
    assert verdict(low, high, sign) == want


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    first, second = (pd.Series(rng.normal(size=6), index=range(6)) for _ in range(2))
    result = Claim("", "", "", 1).compared(first, second.sample(frac=1, random_state=0))
    want = scipy.stats.ttest_rel(first, second).confidence_interval()
    assert (result.low, result.high) == pytest.approx(want, rel=1e-5)
    assert result.effect == pytest.approx((first - second).mean(), rel=1e-5)
    ratio = Claim("", "", "×", 1, "ratio").compared(np.exp(first), np.exp(second))
    assert (ratio.low, ratio.high) == pytest.approx(tuple(np.exp(want)), rel=1e-5)
    assert ratio.predicted == "ratio above 1"
    assert ratio.shown == f"{ratio.effect:.3g} [{ratio.low:.3g}, {ratio.high:.3g}] ×"


def test_what_is_not_finite_is_not_measured():
    numbers = pd.Series([1.0, 2.0, 3.0])
    for other in (numbers * 0, numbers * np.nan, -numbers):
        result = Claim("", "", "×", 1, "ratio").compared(numbers, other)
        assert result.verdict == "not measured"
        assert result.effect is None
        assert "The effect of a seed is not finite." in result.detail


def test_an_effect_without_deviation_has_a_verdict():
    numbers = pd.Series([1.0, 2.0, 3.0])
    assert Claim("", "", "", -1).compared(numbers, numbers + 1).verdict == "holds"
    assert Claim("", "", "", -1).compared(numbers, numbers).verdict == "not shown"


OF_MINI_BATCHES = ("sgd", "mean3", "m3", "rm3", "ra3")


def _noise_rows(better, seeds=SEEDS):
    rows = []
    for seed in seeds:
        for method in OF_MINI_BATCHES:
            for epoch, pristine in ((0, 0.1), (1, 0.91), (2, 0.99)):
                good = method == better
                rows.append(
                    {
                        "method": method, "seed": seed, "step": epoch, "epoch": float(epoch), "pristine": pristine,
                        "corrupt": 0.1 if good else 0.5, "corrupt_true": 0.5, "chance": 0.1, "gap": 0.0, "loss": 1.0,
                        "test": seed / 100 + (0.9 if good else 0.5 + epoch / 10), "train": 0.5,
                    }
                )  # fmt: skip
    return rows


def test_noise_claims_follow_the_numbers():
    verdicts = {result.statement: result.verdict for result in moments.claims(frame(_noise_rows("m3")))}
    assert all(found == "holds" for text, found in verdicts.items() if " M3 has" in text)
    assert all(found == "not shown" for text, found in verdicts.items() if " RM3 has" in text)
    assert len(verdicts) == 12
    others = {result.statement: result.verdict for result in moments.claims(frame(_noise_rows("sgd")))}
    against = [found for text, found in others.items() if text.endswith("than SGD.")]
    assert against == ["contradicted"] * 6


def test_a_point_that_a_seed_does_not_reach_is_not_measured():
    table = frame(_noise_rows("m3"))
    table.loc[(table["method"] == "m3") & (table["seed"] == 1), "pristine"] = 0.5
    results = [result for result in moments.claims(table) if "learnt, M3" in result.statement]
    assert [result.verdict for result in results] == ["not measured"] * 2
    assert all("Not every run reached that point." in result.detail for result in results)


def test_the_moments_of_a_run():
    table = frame(row for row in _noise_rows("m3", [0]) if row["method"] == "sgd")
    epochs = {when: moments.moments(table, when)["epoch"].tolist() for when in ("best", "last", "learnt")}
    assert epochs == {"best": [2], "last": [2], "learnt": [1]}
    assert moments.moments(table[:1], "learnt").empty


def test_shares_count_the_right_examples():
    labels, true, guess = np.array([0, 1, 2, 3]), np.array([0, 1, 9, 8]), np.array([0, 5, 2, 8])
    counted = shares(guess, labels, true)
    assert counted == {"train": 0.5, "pristine": 0.5, "corrupt": 0.5, "corrupt_true": 0.5, "corrupt_share": 0.5}


def test_spread_over_seeds():
    assert spread(pd.Series([1.0, 3.0])) == pytest.approx((2.0, 2**0.5))
    assert spread(pd.Series([1.0])) == (1.0, 0.0)
    assert with_spread(pd.Series([1.0, 3.0]), "{:.1f}") == "2.0 ± 1.4"


def test_a_curve_goes_as_far_as_all_seeds_came():
    rows = _run("real", 0, REAL) + _run("real", 1, REAL[:2])
    along = curve(frame(rows), "train/r")
    assert along.epoch.tolist() == [0, 1]
    assert along.mean.tolist() == along.low.tolist() == along.high.tolist() == [40, 40]
    alone = curve(frame(_run("real", 0, REAL)), "train/r")
    assert np.isnan(alone.low).all()


def test_a_curve_on_a_logarithmic_axis_has_a_geometric_mean():
    rows = [*_run("real", 0, [(0, 2.0, 1.0)]), *_run("real", 1, [(0, 2.0, 100.0)])]
    along = curve(frame(rows), "train/r", log=True)
    assert along.mean == pytest.approx([10.0])
    assert along.low == pytest.approx(np.exp(interval(np.log([[1.0], [100.0]])).low))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CoherenceConfig(epochs=0), r"Expected epochs >= 1, got epochs=0"),
        (CoherenceConfig(every=0), r"Expected every >= 1"),
        (CoherenceConfig(learning_rate=0.0), r"Expected learning_rate > 0"),
        (CoherenceConfig(seed=-1), r"Expected seed >= 0"),
        (CoherenceConfig(model="resnet", depth=9), r"Expected depth in \(8, 18\)"),
        (NoiseConfig(noise=1.0), r"Expected 0 <= noise < 1, got noise=1.0"),
    ],
)
def test_bad_options_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        check(config)


def test_measurements_are_logarithmic_in_the_first_epoch_then_one_every_so_many():
    steps = measured_at(78, CoherenceConfig(epochs=4))
    assert steps[:4] == [0, 1, 2, 3]
    assert steps[-4:] == [78, 156, 234, 312]
    assert measured_at(78, CoherenceConfig(epochs=4, every=3))[-3:] == [78, 234, 312]
    assert measured_at(78, NoiseConfig(epochs=4)) == [0, 78, 156, 234, 312]
    assert measured_at(78, NoiseConfig(epochs=4, every=3)) == [0, 234, 312]
    assert measured_at(3, CoherenceConfig(epochs=1)) == [0, 1, 2, 3]


def test_tensors_of_a_module_are_taken_together():
    parts = {
        "A/kernel": {"share": 0.5, "alpha": 0.2, "r": 20.0},
        "A/bias": {"share": 0.25, "alpha": 0.8, "r": 80.0},
        "A/scale": {"share": 0.0, "alpha": None, "r": None},  # no gradient: 0/0
        "B/kernel": {"share": 0.0, "alpha": None, "r": None},
    }
    found = figures._by_module({"per_tensor": parts, "train": {"count": 100}})["per_tensor"]
    assert found["A"]["r"] == pytest.approx(100 * (0.5 * 0.2 + 0.25 * 0.8) / 0.75)
    assert np.isnan(found["B"]["r"])
