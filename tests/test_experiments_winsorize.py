"""Winsorised SGD: its steps, its options, and the claims judged on rows made by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.__main__ import main
from experiments.checks import check
from experiments.methods import PER_SIDE
from experiments.section import frame
from experiments.train import Recipe, trainer
from experiments.winsorize import ORDER, WinsorizeConfig, claims, measure, section

CLIPS = {"winsor1": 1, "winsor2": 2, "winsor4": 4, "winsor8": 8, "cw_median": 9}


def test_a_step_is_the_winsorised_mean_of_one_mini_batch():
    """Against materialised gradients, sorted; with 9 of 20 examples per side it is the median."""
    rng, rate = np.random.default_rng(0), 0.5
    images = jnp.asarray(rng.normal(size=(60, 4, 4, 1)), jnp.float32)
    labels, model = jnp.asarray(rng.integers(0, 10, 60), jnp.int32), models.build("mlp", 8, 1, 10)
    assert CLIPS.keys() == PER_SIDE.keys()
    for name, clip in CLIPS.items():
        method = trainer(model, name, Recipe(20, rate), 60)
        assert (method.rows_per_step, method.per_epoch) == (20, 3)
        state = method.init(jax.random.key(1), images)
        params = jax.tree.map(jnp.array, state.params)  # the step donates its state
        rows = 20 + jnp.arange(20)
        each = jax.vmap(jax.grad(models.loss_of(model)), (None, 0))(params, (images[rows], labels[rows]))
        state = method.step(state, images, labels, rows[None])
        for leaf, start, grads in zip(*map(jax.tree.leaves, (state.params, params, each)), strict=True):
            grads = np.asarray(grads, np.float64)
            ordered = np.sort(grads, axis=0)
            want = np.asarray(start) - rate * np.clip(grads, ordered[clip], ordered[19 - clip]).mean(0)
            np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-6)


def _rows(ends):
    """Rows of three seeds that end at (training, corrupt, test), by share and method, a thousandth apart."""
    return [
        {"data": "digits", "share": share, "method": method, "seed": seed, "step": step, "epoch": step}
        | dict(zip(("train", "corrupt", "test"), values, strict=True))
        | {"pristine": values[0]}
        for share in (0.0, 0.5, 1.0)
        for method in ORDER
        for seed in range(3)
        for step, values in enumerate([(0.1, 0.1, 0.1), np.add(ends[share, method != "sgd"], seed / 1000).tolist()])
    ]


def _verdicts(ends):
    return [each.verdict for each in claims(frame(_rows(ends)), "digits")]


def test_the_claims_on_either_side():
    robust = {(0.0, True): (0.9, 0.0, 0.9), (0.5, True): (0.5, 0.05, 0.9), (1.0, True): (0.1, 0.1, 0.1)}
    plain = {(0.0, False): (1.0, 0.0, 0.9), (0.5, False): (0.9, 0.8, 0.6), (1.0, False): (0.8, 0.8, 0.1)}
    assert _verdicts(robust | plain) == ["holds"] * 5
    swapped = {(share, not other): values for (share, other), values in (robust | plain).items()}
    assert _verdicts(swapped) == ["contradicted"] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.5, 1.5)}, r"Expected shares to be different ones from 0 to 1, got shares=\(0.5, 1.5\)"),
        ({"fully": (0.1,)}, r"Expected fully to be among shares, got fully=\(0.1,\)"),
        ({"batch_size": 16}, r"Expected batch_size >= 17, to move 8 examples per side, got 16"),
        ({"model": "cnn", "depth": None}, r"Expected model=mlp, got model=cnn"),
        ({"also": "nothing"}, r"Expected data and also to be in .* got mnist5k and nothing"),
        ({"also": "mnist5k"}, r"Expected another data set than mnist5k"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(WinsorizeConfig(), **changes))


def test_seeds_are_outermost_and_few_methods_have_all_shares(monkeypatch):
    seen = []
    monkeypatch.setattr("experiments.loop.train_all", lambda config, problem, folder, trainings: seen.extend(trainings))
    measure(WinsorizeConfig(seeds=2), None, None)
    assert [each.marks["seed"] for each in seen] == [0] * 42 + [1] * 42
    first = [(each.marks["share"], each.method) for each in seen[:21]]
    assert first[:6] == [(0.5, method) for method in ORDER]
    assert [method for share, method in first if share == 0.25] == ["sgd", "winsor1", "winsor4"]
    assert {each.marks["data"] for each in seen[21:42]} == {"fashion_mnist"}
    own = dataclasses.replace(WinsorizeConfig(), **seen[21].changes)
    assert (own.data, own.num_train, own.epochs, own.every) == ("fashion_mnist", 10_000, 15, 1)
    check(own)


def test_a_run_that_was_stopped_early_is_reported(tmp_path):
    config = WinsorizeConfig(data="digits", also=None)
    ends = {(share, other): (0.9, 0.1, 0.8) for share in (0.0, 0.5, 1.0) for other in (True, False)}
    rows = [row for row in _rows(ends) if row["share"] == 0.0 and row["seed"] == 0]
    assert section(config, [], tmp_path).figures == ()
    stopped = section(config, rows, tmp_path)
    assert [figure.file for figure in stopped.figures] == ["winsorize_shares.png"]
    assert stopped.claims == ()


@pytest.mark.slow
def test_a_smoke_run_leaves_claims_and_figures(tmp_path):
    out = tmp_path / "run"
    assert main(["winsorize", "--smoke", "--out", str(out)]) == 0
    section = json.loads((out / "summary.json").read_text())["sections"][0]
    assert len(section["claims"]) == 5
    assert len(section["tables"][0]["rows"]) == 9
    for name in ("winsorize", "winsorize_shares"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
