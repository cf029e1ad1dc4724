"""Coherence at full size: three kinds of labels, samples of several sizes, and estimators with BatchNorm."""

import json

import jax
import numpy as np
import pytest

from experiments import coherence_batch_norm, label_order, models, sample_sizes
from experiments.__main__ import main
from experiments.checks import check
from experiments.coherence import CoherenceConfig
from experiments.coherence_networks import CNN, MLP, NetworksConfig
from experiments.data import corrupt
from experiments.loop import measured_at
from experiments.section import frame

SEEDS = (0, 1, 2)


def _rows(r_of):
    """Two measurements of three kinds of labels, whose r differs a little between seeds."""
    return frame(
        {
            "labels": labels, "seed": seed, "step": epoch, "epoch": float(epoch),
            "train": {"r": r * (1 + seed / 100), "loss": loss}, "test": {"r": r, "loss": loss},
        }
        for labels, r in r_of.items()
        for seed in SEEDS
        for epoch, loss in ((0, 2.3), (1, 1.0))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("half", "want", "effect"), [(10.0, "holds", 2.0), (50.0, "contradicted", 0.8), (1.0, "contradicted", 0.2)]
)
def test_three_kinds_of_labels_are_in_order_or_not(half, want, effect):
    table = _rows({"real": 40.0, "half": half, "random": 5.0})
    results = label_order.claims(table)
    assert [result.verdict for result in results] == [want] * 6
    assert results[0].effect == pytest.approx(effect)
    order = "r of real labels is above r of 50% random ones, and that above r of random ones"
    assert results[1].statement == f"On the training sample, {order} at every common training loss."
    assert "real labels over 50% random ones: " in results[2].detail
    assert results[0].ours.startswith(f"real labels over 50% random ones: {40 / half:.2f}")


def test_kinds_are_compared_where_only_those_two_have_been():
    """Random labels are not learnt as far as half random ones."""
    table = _rows({"real": 40.0, "half": 10.0, "random": 5.0})
    table.loc[(table["labels"] == "random") & (table["epoch"] == 1), "train/loss"] = 2.2
    table.loc[(table["labels"] == "real") & (table["epoch"] == 1), "train/r"] = 1.0
    results = label_order.claims(table)
    assert results[1].verdict == "contradicted"
    assert results[1].effect is not None
    assert results[1].effect < 0.2


def _oracle(model, params, images, labels):
    """(r, α_unbiased) from materialised gradients in float64."""
    grads = jax.vmap(jax.grad(models.loss_of(model)), in_axes=(None, 0))(params, (images, labels))
    flat = np.concatenate([np.asarray(g, np.float64).reshape(len(labels), -1) for g in jax.tree.leaves(grads)], 1)
    r = (flat.sum(0) ** 2).sum() / (flat**2).sum()
    return r, (r - 1) / (len(labels) - 1)


def _sample(size, model):
    rng = np.random.default_rng(1)
    images = rng.random((size, 8, 8, 1), np.float32)
    labels = rng.integers(0, 10, size).astype(np.int32)
    params = model.init(jax.random.key(0), images[:1])
    return params, jax.device_put((images, labels))


def test_nested_parts_are_those_of_the_oracle():
    model = models.build("mlp", 6, 1, 10)
    params, sample = _sample(23, model)
    found = sample_sizes.coherence_by_size(model, params, sample, (5, 12), seed=3, batch_size=4)
    order = np.random.default_rng(3).permutation(23)
    assert [*found] == [5, 12, 23]
    for size, coherence in found.items():
        r, unbiased = _oracle(model, params, *(each[order[:size]] for each in sample))
        assert coherence.count == size
        assert (coherence.m_coherence, coherence.alpha_unbiased) == pytest.approx((r, unbiased), rel=1e-4)
    whole = sample_sizes.coherence_by_size(model, params, sample, (), seed=0, batch_size=50)
    assert whole[23].m_coherence == pytest.approx(found[23].m_coherence, rel=1e-5)


def _by_size(small, large):
    """Rows of real labels with (r, α_unbiased) at 500 and at 50,000 examples; a little noise over seeds."""
    return frame(
        {
            "labels": "real", "seed": seed, "step": epoch, "epoch": float(epoch),
            "sizes": {
                "500": dict(zip(("r", "alpha_unbiased"), np.multiply(small, 1 + seed / 50), strict=True)),
                "50000": dict(zip(("r", "alpha_unbiased"), large, strict=True)),
            },
        }
        for seed in SEEDS
        for epoch in (0, 1, 30)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("small", "large", "want"),
    [
        ((11.0, 0.02), (1001.0, 0.02), ["holds", "holds", "holds", "holds", "holds"]),
        ((11.0, 0.02), (1001.0, 0.04), ["holds", "holds", "contradicted", "holds", "holds"]),
        ((11.0, 0.02), (1001.0, 0.01), ["holds", "holds", "holds", "contradicted", "holds"]),
        ((11.0, 0.02), (9.0, 0.2), ["contradicted", "contradicted", "contradicted", "holds", "contradicted"]),
        ((11.0, 0.02), (1001.0, -0.02), ["not measured", "holds", "not measured", "not measured", "not measured"]),
    ],
)
def test_claims_on_sizes_follow_the_numbers(small, large, want):
    assert [result.verdict for result in sample_sizes.claims(_by_size(small, large), (500, 50_000))] == want


def test_estimators_with_batch_norm_are_those_of_the_oracle():
    model = models.build("cnn_bn", 4, None, 10)
    assert models.has_batch_norm(model)
    params, sample = _sample(24, model)
    found = coherence_batch_norm.estimates(model, params, sample, 6)
    fixed = {"params": params["params"]}
    loss = models.loss_of(model)
    grads = jax.vmap(
        jax.grad(lambda own, example: loss(own, example, {"batch_stats": params["batch_stats"]})), in_axes=(None, 0)
    )(fixed, sample)
    flat = np.concatenate([np.asarray(g, np.float64).reshape(24, -1) for g in jax.tree.leaves(grads)], 1)
    assert found["exact"] == pytest.approx((flat.sum(0) ** 2).sum() / (flat**2).sum(), rel=1e-4)
    means = flat.reshape(4, 6, -1).mean(1)
    of_batches = (means.sum(0) ** 2).sum() / (4 * (means**2).sum())
    c = (24 - 6) / (6 * (24 - 1))
    assert found["control"] == pytest.approx(24 * c * of_batches / (1 - of_batches * (1 - c)), rel=1e-3)
    assert found["batch"] != pytest.approx(found["control"], rel=0.01)


def _estimates(batch, control):
    return frame(
        {"labels": labels, "seed": seed, "step": step, "epoch": float(step), "loss": 1.0}
        | {"exact": r, "batch": batch * r ** (batch / 2), "control": control * r * (1 + seed / 100)}
        for labels, r in (("real", 20.0), ("random", 2.0))
        for seed in SEEDS
        for step in (0, 1, 5)
    )


@pytest.mark.parametrize(
    ("batch", "control", "want"), [(2.0, 1.1, "holds"), (2.0, 9.0, "contradicted"), (-2.0, 1.1, "not measured")]
)
def test_claims_on_estimators_follow_the_numbers(batch, control, want):
    results = coherence_batch_norm.claims(_estimates(batch, control))
    assert results[2].verdict == want
    assert results[0].verdict == "holds"
    table = _estimates(2.0, 1.1)
    table["labels"] = table["labels"].map({"real": "random", "random": "real"})
    assert [result.verdict for result in coherence_batch_norm.claims(table)[:2]] == ["contradicted"] * 2


def test_a_grid_over_all_of_training():
    assert measured_at(100, CoherenceConfig(epochs=10, log_grid=3)) == [0, 10, 100, 1000]


def test_half_of_the_labels_are_drawn():
    labels = np.zeros(1000, np.int32)
    changed = (corrupt(jax.random.key(0), labels, label_order.SHARES["half"], 10) != labels).mean()
    assert changed == pytest.approx(0.45, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coherence", "--labels", "real", "real"], "Expected labels to be different ones, at least one"),
        (["coherence", "--log-grid", "-1"], "Expected log_grid >= 0, got log_grid=-1."),
        (["coherence-mlp", "--sizes", "20", "10"], "Expected sizes to be rising numbers >= 2, got sizes=(20, 10)."),
        (["coherence-mlp", "--data", "digits", "--num-train", "300"], "Expected sizes up to 300, the training"),
        (["coherence-mlp", "--model", "cnn_bn"], "Expected no sizes for data=fashion_mnist, model=cnn_bn and"),
        (["coherence-batchnorm", "--model", "cnn"], "Expected a model with BatchNorm on data in memory, got model=cnn"),
        (["coherence-batchnorm", "--estimator", "batch"], "Expected estimator=exact, since both are measured"),
    ],
)
def test_bad_options_are_one_clear_error(arguments, message, tmp_path, capsys):
    depth = ["--depth", "1"] if arguments[0] == "coherence-mlp" and "cnn_bn" not in arguments else []
    assert main([*arguments, *depth, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_parts_are_the_networks():
    parts = NetworksConfig(seed=4).parts()
    names = ["coherence-mlp", "coherence-cnn", "coherence-resnet", "coherence-batchnorm"]
    assert [part.name for part in parts] == names
    assert [part.seeds for part in parts] == [5, 3, 3, 3]
    assert {part.seed for part in parts} == {4}
    for part in parts:
        check(part)
    assert MLP.config.sizes[0] == 500
    assert MLP.config.sizes[-1] == CNN.config.num_train == 50_000


def test_the_mlp_leaves_figures_and_claims(tmp_path):
    out = tmp_path / "run"
    assert main(["coherence-mlp", "--smoke", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["labels"] for row in rows} == {"real", "half", "random"}
    assert [*rows[0]["sizes"]] == ["100", "200"]
    assert rows[0]["train"]["count"] == 360
    section = json.loads((out / "summary.json").read_text())["sections"][0]
    assert len(section["claims"]) == 11
    assert [figure["file"] for figure in section["figures"]] == ["coherence.png", "per_tensor.png", "sizes.png"]
    before = (out / "figures" / "sizes.png").read_bytes()
    assert main(["figures", str(out)]) == 0
    assert (out / "figures" / "sizes.png").read_bytes() == before


@pytest.mark.slow
def test_all_networks_leave_one_report(tmp_path):
    out = tmp_path / "run"
    assert main(["coherence-networks", "--smoke", "--out", str(out)]) == 0
    sections = json.loads((out / "summary.json").read_text())["sections"]
    assert [section["name"] for section in sections] == [part.name for part in NetworksConfig(smoke=True).parts()]
    assert [len(section["claims"]) for section in sections] == [11, 6, 3]
    assert all((out / section["name"] / "figures" / "coherence.png").exists() for section in sections[:2])
    assert (out / "coherence-batchnorm" / "figures" / "estimators.png").exists()
