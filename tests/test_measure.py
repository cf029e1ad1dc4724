"""Streaming a data set: one shape, one compilation, any kind of data, gradients that are not finite."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import compilations, mlp_params, same_coherence
from helpers import mlp_loss as loss_fn

import cg_jax as cg

M = 5_000
PARAMS = mlp_params(20, 30, 10)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(M, 20)).astype(np.float32), rng.integers(0, 10, M)


def test_batches_that_do_not_divide_equal_one_batch_and_compile_once(data):
    with compilations("step") as names:
        streamed = cg.measure_coherence(loss_fn, PARAMS, data, batch_size=128)
    assert len(names) == 1
    whole = cg.measure_coherence(loss_fn, PARAMS, data, batch_size=M)
    assert int(streamed.count) == M == int(whole.count)
    same_coherence(streamed, whole)

    others = mlp_params(20, 30, 10, seed=1)
    with compilations() as names:
        again = cg.measure_coherence(loss_fn, others, data, batch_size=128)
    assert not names
    assert float(again.loss) != float(streamed.loss)


def test_the_result_is_that_of_the_oracle(data):
    rows = jax.tree.map(lambda leaf: leaf[:50], data)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
        rows = (rows[0].astype(np.float64), rows[1])
        got = cg.measure_coherence(loss_fn, params, rows, batch_size=16)
        losses, grads = oracle.per_example(loss_fn, params, rows)
    for field, value in oracle.ratios(np.concatenate([g.reshape(50, -1) for g in grads], 1)).items():
        np.testing.assert_allclose(getattr(got, field), value, rtol=1e-10, err_msg=field)
    np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-12)


def _rows(data, start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], data)


def _in_batches(data, size):
    for start in range(0, len(data[1]), size):
        yield _rows(data, start, start + size)


class Loader:
    """An object that can be iterated again and again, as PyTorch's DataLoader."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return _in_batches(self.data, 64)


def test_every_kind_of_data_gives_the_same(data):
    data = jax.tree.map(lambda leaf: leaf[:300], data)
    want = cg.measure_coherence(loss_fn, PARAMS, data, batch_size=64)
    for same in (
        jax.tree.map(jnp.asarray, data),
        list(_in_batches(data, 64)),
        _in_batches(data, 64),
        _in_batches(data, 50),
        Loader(data),
        [_rows(data, 0, 7), _rows(data, 7, 71), *_in_batches(_rows(data, 71, 300), 64)],
    ):
        same_coherence(cg.measure_coherence(loss_fn, PARAMS, same, batch_size=64), want)


def test_both_methods_agree(data):
    data = jax.tree.map(lambda leaf: leaf[:300], data)
    measured = (cg.measure_coherence(loss_fn, PARAMS, data, batch_size=64, method=m) for m in ("ghost", "vmap"))
    engine, plain = measured
    same_coherence(engine, plain)


def test_a_batch_larger_than_batch_size_is_refused(data):
    with pytest.raises(ValueError, match=r"Expected batches of at most batch_size=32 examples, got one of 64"):
        cg.measure_coherence(loss_fn, PARAMS, _in_batches(data, 64), batch_size=32)


def test_data_without_batches_or_of_no_kind_is_refused():
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match=r"Expected data to hold at least one batch, got an empty iterable"):
            cg.measure_coherence(loss_fn, PARAMS, empty, batch_size=32)
    with pytest.raises(TypeError, match=r"Expected data to be a pytree of arrays or an iterable of batches, got int"):
        cg.measure_coherence(loss_fn, PARAMS, 3, batch_size=32)


def _spoilt(data, rows):
    images = data[0][:300].copy()
    images[rows, 3] = np.nan
    return images, data[1][:300]


def test_what_is_not_finite_raises_with_how_many_and_the_first_index(data):
    message = r"got 2 of 64 examples in one batch that are not, the first at index 130\. nonfinite='skip'"
    with pytest.raises(FloatingPointError, match=message):
        cg.measure_coherence(loss_fn, PARAMS, _spoilt(data, [130, 150, 299]), batch_size=64)
    with pytest.raises(FloatingPointError, match=r"got 1 of 44 examples .* index 299"):
        cg.measure_coherence(loss_fn, PARAMS, _spoilt(data, [299]), batch_size=64)


@pytest.mark.parametrize("method", ["ghost", "vmap"])
@pytest.mark.parametrize("rows", [[130, 150, 299], list(range(64)), list(range(300))])
def test_what_is_not_finite_can_be_skipped(data, rows, method):
    got = cg.measure_coherence(loss_fn, PARAMS, _spoilt(data, rows), batch_size=64, nonfinite="skip", method=method)
    assert int(got.num_skipped) == len(rows)
    assert int(got.count) == 300 - len(rows)
    if len(rows) == 300:
        assert np.isnan(got.alpha)
        return
    kept = np.setdiff1d(np.arange(300), rows)
    moments = cg.grad_moments(loss_fn)(PARAMS, jax.tree.map(lambda leaf: leaf[kept], data))
    same_coherence(got, cg.coherence(moments, num_skipped=len(rows)))


def test_a_gradient_that_overflows_is_skipped_though_its_loss_does_not():
    def loss(w, x):
        return jnp.sqrt(w * x)

    got = cg.measure_coherence(loss, 1.0, jnp.array([1.0, 0.0, 4.0]), batch_size=2, nonfinite="skip")
    assert (int(got.num_skipped), int(got.count)) == (1, 2)
    np.testing.assert_allclose(got.mean_grad_norm, 0.75)


def test_what_is_not_finite_can_be_let_through(data):
    got = cg.measure_coherence(loss_fn, PARAMS, _spoilt(data, [130]), batch_size=64, nonfinite="propagate")
    assert np.isnan(got.alpha)
    assert int(got.count) == 300
    assert int(got.num_skipped) == 0


def test_padding_repeats_a_valid_row():
    def loss(w, x):  # its derivative at x = 0 is 0/0
        return jnp.sqrt(jnp.sum((w * x) ** 2))

    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    result = cg.measure_coherence(loss, jnp.ones(3), rows, batch_size=4, nonfinite="propagate")
    assert int(result.count) == 5
    assert np.isfinite(result.alpha)


def test_integer_leaves_of_the_parameters_are_held_fixed():
    params = {"w": jnp.asarray(0.0), "n": jnp.asarray(2)}
    data = np.array([1.0, 4.0, 7.0], np.float32)
    result = cg.measure_coherence(lambda p, x: 0.5 * (p["n"] * p["w"] - x) ** 2, params, data, batch_size=2)
    assert list(result.per_tensor) == ["w"]
    np.testing.assert_allclose(result.alpha, 144 / (3 * 66), rtol=1e-6)


def test_progress_draws_a_bar_and_silence_draws_none(data, capsys):
    data = jax.tree.map(lambda leaf: leaf[:300], data)
    cg.measure_coherence(loss_fn, PARAMS, data, batch_size=64)
    assert capsys.readouterr() == ("", "")
    cg.measure_coherence(loss_fn, PARAMS, data, batch_size=64, progress=True)
    drawn = capsys.readouterr().err
    assert "coherence" in drawn
    assert "/5 [" in drawn


def test_progress_without_tqdm_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True draws its bar with tqdm: pip install tqdm"):
        cg.measure_coherence(loss_fn, PARAMS, data, batch_size=128, progress=True)
