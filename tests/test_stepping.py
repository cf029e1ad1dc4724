"""Trainings of several seeds in one program, against each of them alone; trainings that continue one another."""

import jax
import numpy as np
import pytest

from experiments import configs, loop, models
from experiments.arrays import InMemory
from experiments.coherence import CoherenceConfig
from experiments.data import Noise
from experiments.run_folder import RunFolder
from experiments.stepping import CHUNK, Alone, Together
from experiments.train import Keys, Recipe, trainer

TINY = configs.smoked(CoherenceConfig(smoke=True))


def _measured(examples, model, params):
    guesses = examples.guess("train", model, params)
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return {"right": float((guesses.guess == guesses.labels).mean()), "sum": float(weights.sum())}


def _training(seed, arm="one", **options):
    marks = {"arm": arm, "seed": seed}
    return loop.Training(f"{arm} {seed}", marks, "sgd", (0.5, 0.0), _measured, lambda row: {}, **options)


def _run(folder, trainings, config=TINY):
    problem, run = loop.opened(config), RunFolder(folder, config)
    loop.train_all(config, problem, run, trainings)
    return run.rows


@pytest.mark.parametrize("method", ["sgd", "m3", "rm3"])
def test_seeds_in_one_program_take_the_steps_of_each_alone(method):
    data, model = InMemory(TINY), models.build("mlp", 8, 2, 10)
    keys = [Keys.of(seed) for seed in range(3)]
    examples = [data.noisy(key, Noise(0.5)) for key in keys]
    how = trainer(model, method, Recipe(20, 0.5, weight_decay=0.01, decay_at=(1,)), data.num_train)
    states = [jax.device_get(how.init(key.init, each.first)) for key, each in zip(keys, examples, strict=True)]
    steps, ticks = CHUNK + 7, []
    together = Together(how, examples, 0)
    stacked = together.advance(jax.tree.map(lambda *leaves: np.stack(leaves), *states), steps, ticks.append)
    assert ticks == [CHUNK, 7]
    for params, each, state in zip(together.params(stacked), examples, states, strict=True):
        alone = Alone(how, each, 0).advance(state, steps, ticks.append)
        for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_the_images_are_on_the_devices_once_for_all_seeds():
    data = InMemory(TINY)
    one, two = (data.noisy(Keys.of(seed), Noise(0.5)) for seed in range(2))
    assert one.arrays("train")[0] is two.arrays("train")[0]
    assert one.arrays("train")[1] is not two.arrays("train")[1]


def test_what_one_program_trains(tmp_path):
    """All seeds of an MLP; each alone where the images of seeds differ, or the model convolves."""

    def groups(training, model="mlp"):
        config = TINY if model == "mlp" else configs.smoked(CoherenceConfig(smoke=True, model=model))
        differing = {frozenset(): (config, loop.opened(config))}
        return [len(each) for each in loop._together(differing, [training(seed) for seed in range(3)])]

    assert groups(_training) == [3]
    assert groups(lambda seed: _training(seed, "even" if seed % 2 else "odd")) == [2, 1]
    assert groups(lambda seed: _training(seed)._replace(noise=Noise(validation=0.1))) == [1, 1, 1]
    assert groups(lambda seed: _training(seed)._replace(method="clip")) == [1, 1, 1]
    assert groups(_training, "cnn") == [1, 1, 1]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_trainings_of_several_seeds_go_on_bit_for_bit(tmp_path, stop):
    """Stopped after so many measured steps, in the first training or in the one that continues it."""
    config = configs.smoked(CoherenceConfig(smoke=True, save_every=5))
    trainings = [_training(seed, arm, continues=arm == "two") for seed in (0, 1) for arm in ("one", "two")]
    whole = _run(tmp_path / "whole", trainings, config)

    class Stopped(Exception):
        pass

    seen = []

    def measured(examples, model, params):
        if len(seen) == 2 * stop:
            raise Stopped
        seen.append(1)
        return _measured(examples, model, params)

    with pytest.raises(Stopped):
        _run(tmp_path / "stopped", [each._replace(measure=measured) for each in trainings], config)
    assert _run(tmp_path / "stopped", trainings, config) == whole
    names = [tmp_path / name / "metrics.jsonl" for name in ("whole", "stopped")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_training_continues_from_the_end_of_the_one_before(tmp_path):
    rows = _run(tmp_path, [_training(seed, arm, continues=arm == "two") for seed in (0, 1) for arm in ("one", "two")])
    for seed in (0, 1):
        one, two = ([row for row in rows if (row["arm"], row["seed"]) == (arm, seed)] for arm in ("one", "two"))
        assert two[0]["step"] == 0
        assert two[0]["sum"] == one[-1]["sum"] != one[0]["sum"]
        assert two[-1]["sum"] != two[0]["sum"]


def test_a_training_continues_none_of_another_seed(tmp_path):
    trainings = [_training(0), _training(1, "two", continues=True)]
    with pytest.raises(ValueError, match="Expected a training of the same seed before two 1, which continues it"):
        _run(tmp_path, trainings)
