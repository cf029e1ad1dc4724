"""The verdicts follow from the numbers, both ways."""

import numpy as np
import pytest

from experiments import coherence, figures, noise
from experiments.checks import check
from experiments.configs import CoherenceConfig, NoiseConfig
from experiments.loop import measured_at
from experiments.section import curve, spread, with_spread
from experiments.train import METHODS


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


def test_r_at_a_loss_is_interpolated_in_log_r():
    rows = _run("real", 0, [(0, 2.0, 100.0), (1, 1.0, 1.0)])
    assert coherence.r_at_loss(rows, "train", 1.5) == pytest.approx(10.0)
    assert coherence.r_at_loss(rows, "train", 0.5) is None


def test_the_claim_holds_where_real_is_above_random_throughout():
    rows = _run("real", 0, REAL) + _run("random", 0, LOW)
    found = coherence.at_equal_loss(rows, "train")
    claim = coherence._claim("train", "training loss", found, descending=True)
    assert claim.holds is True
    assert claim.verdict == "yes"
    assert min(found) == 0.1


def test_the_claim_says_down_to_where_it_holds():
    rows = _run("real", 0, REAL) + _run("random", 0, CROSSING)
    claim = coherence._claim("train", "training loss", coherence.at_equal_loss(rows, "train"), descending=True)
    assert claim.holds is False
    assert "It holds in every seed from 2.25 down to 0.75" in claim.detail
    assert "at 0.5 it fails in 1 of 1 seed(s) (ratio 0.77)" in claim.detail
    epochs = coherence._claim("train", "epoch", coherence.at_equal_epoch(rows, "train"), descending=False)
    assert epochs.holds is False
    assert "up to 1" in epochs.detail


def test_one_seed_against_it_is_enough_for_no():
    rows = [*_run("real", 0, REAL), *_run("random", 0, LOW), *_run("real", 1, LOW), *_run("random", 1, REAL)]
    claim = coherence._claim("train", "training loss", coherence.at_equal_loss(rows, "train"), descending=True)
    assert claim.holds is False


def test_nothing_in_common_is_not_measured():
    rows = _run("real", 0, [(0, 2.3, 40.0), (1, 2.29, 40.0)]) + _run("random", 0, LOW)
    claim = coherence._claim("train", "training loss", coherence.at_equal_loss(rows, "train"), descending=True)
    assert claim.holds is None
    assert claim.verdict == "not measured"


def _noise_rows(better):
    rows = []
    for method in METHODS:
        for epoch, pristine in ((0, 0.1), (1, 0.91), (2, 0.99)):
            good = method == better
            rows.append(
                {
                    "method": method, "seed": 0, "step": epoch, "epoch": float(epoch), "pristine": pristine,
                    "corrupt": 0.1 if good else 0.5, "corrupt_true": 0.5, "test": 0.9 if good else 0.5 + epoch / 10,
                    "gap": 0.0, "loss": 1.0, "train": 0.5, "chance": 0.1,
                }
            )  # fmt: skip
    return rows


def test_noise_claims_follow_the_numbers():
    verdicts = {claim.text: claim.holds for claim in noise._claims(_noise_rows("m3"))}
    assert all(holds is True for text, holds in verdicts.items() if " M3 has" in text)
    assert all(holds is False for text, holds in verdicts.items() if " RM3 has" in text)
    assert len(verdicts) == 12


def test_the_moments_of_a_run():
    run = [row for row in _noise_rows("m3") if row["method"] == "sgd"]
    assert noise.moment(run, "best")["epoch"] == 2
    assert noise.moment(run, "last")["epoch"] == 2
    assert noise.moment(run, "learnt")["epoch"] == 1
    assert noise.moment(run[:1], "learnt") is None


def test_shares_count_the_right_examples():
    labels, true, guess = np.array([0, 1, 2, 3]), np.array([0, 1, 9, 8]), np.array([0, 5, 2, 8])
    found = noise._shares(guess, labels, true)
    assert found == {"train": 0.5, "pristine": 0.5, "corrupt": 0.5, "corrupt_true": 0.5, "corrupt_share": 0.5}


def test_spread_over_seeds():
    assert spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
    assert spread([1.0]) == (1.0, 0.0)
    assert with_spread([1.0, 3.0], "{:.1f}") == "2.0 ± 1.4"
    rows = _run("real", 0, REAL) + _run("real", 1, REAL[:2])
    epochs, mean, deviation = curve(rows, "train/r", labels="real")
    assert epochs.tolist() == [0, 1]  # as far as both seeds came
    assert mean.tolist() == [40, 40]
    assert deviation.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CoherenceConfig(epochs=0), r"Expected epochs >= 1, got epochs=0"),
        (CoherenceConfig(every=0), r"Expected every >= 1"),
        (CoherenceConfig(learning_rate=0.0), r"Expected learning_rate > 0"),
        (CoherenceConfig(seed=-1), r"Expected seed >= 0"),
        (CoherenceConfig(model="resnet", depth=9), r"Expected depth in \(8, 18\)"),
        (NoiseConfig(noise=1.0), r"Expected 0 < noise < 1, got noise=1.0"),
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
