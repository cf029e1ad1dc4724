"""The loop of all experiments: train, measure when it is to be measured, save, and go on where it stopped."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from . import arrays, models
from .checkpoint import Position
from .checks import check
from .configs import TFDS, Config, described
from .data import Noise
from .devices import devices, together, writes
from .errors import first_line
from .examples import Data, Examples
from .methods import EPOCH_UNIT, METHODS
from .run_folder import RunFolder
from .section import Row
from .stepping import taking
from .train import Keys, Recipe, State, Trainer, trainer


class Training(NamedTuple):
    """One training of the several that a run consists of."""

    title: str
    marks: dict[str, Any]  # what its rows are told apart by; the seed is one of them
    method: str
    noise: tuple[float, float] | Noise  # what is done to the labels; of two numbers, the shares that are redrawn
    measure: Callable[[Examples, nn.Module, Any], Row]  # of parameters
    shown: Callable[[Row], dict[str, str]]  # beside the bar
    changes: Mapping[str, Any] = MappingProxyType({})  # options of the config that this training has otherwise
    # Whether it begins from the parameters with which the one before it in the list, of the same seed, ended.
    continues: bool = False


class Problem(NamedTuple):
    """What is trained on what."""

    data: Data
    model: nn.Module


class Clock:
    """Seconds spent, by what for; adds to the dictionary that it is given."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        for what in ("training", "measuring", "saving"):
            seconds.setdefault(what, 0.0)

    @contextlib.contextmanager
    def on(self, what: str) -> Generator[None]:
        """While it is open, time is spent on `what`."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = ", ".join(f"{what} {100 * spent / max(total, 1e-9):.0f}%" for what, spent in self.seconds.items())
        return f"{total:,.0f} s: {shares}"


def measured_at(per_epoch: int, config: Config) -> list[int]:
    """Steps to measure at: 0, a logarithmic grid in the first epoch, then every so many epochs, and the last.

    With log_grid, 0 and a logarithmic grid to the last.
    """
    last = per_epoch * config.epochs
    if config.log_grid:
        return sorted({0, *np.round(np.geomspace(1, last, config.log_grid + 1)[1:]).astype(int).tolist()})
    grid = np.geomspace(1, per_epoch, min(per_epoch, config.early)) if config.early else np.zeros(1)
    epochs = range(0, config.epochs, config.every)
    return sorted({*np.round(grid).astype(int).tolist(), *(per_epoch * e for e in epochs), last})


def opened(config: Config) -> Problem:
    """The data set and the model that the config names, which fit together, before anything is written.

    Raises:
        ValueError: They do not.
        OSError: The data cannot be read.
    """
    data = _open(config)
    least = EPOCH_UNIT * config.batch_size
    if data.num_train < least:
        what = f"{EPOCH_UNIT} mini-batches of batch_size={config.batch_size}"
        raise ValueError(f"Expected at least {least} training examples, {what}, got {data.num_train}.")
    smallest = min((data.measured[sample] for sample in config.samples), default=data.num_train)
    if not config.by_example and smallest < 2 * config.measure_batch_size:
        what = f"2 batches of measure_batch_size={config.measure_batch_size} to measure on with estimator batch"
        raise ValueError(f"Expected at least {what}, got {smallest} examples in a sample.")
    config.check_size(data.num_train)
    model = models.build(config.model, config.width, config.depth, data.num_classes)
    try:
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *data.image_shape), np.float32))
    except Exception as error:  # whatever the layers of a network say of their sizes
        what = f"width={config.width} and depth={config.depth} for images {[*data.image_shape]}: {first_line(error)}"
        raise ValueError(f"Expected sizes that {config.model} can have, got {what}") from None
    return Problem(data, model)


Stage = Callable[[Sequence[Row]], Sequence[Training]]


def train_all(
    config: Config, problem: Problem, folder: RunFolder, trainings: Sequence[Training], *later: Stage
) -> None:
    """All trainings, from where the folder's last checkpoint stands.

    Those that differ by their seed alone are one program where that is faster (models.Network.vmapped); all others
    follow one another. What comes later may depend on what was measured before: each stage says its trainings from the
    rows until then.
    """
    differing: _Differing = {}
    position, leaves = _position(folder)
    clock, first, ended = Clock(position.seconds), 0, None
    for stage in (lambda _: trainings, *later):
        stages_own = stage(folder.rows)
        _add_differing(differing, config, problem, stages_own)
        groups = _together(differing, stages_own)
        _check_continuing(groups)
        for part, group in enumerate(groups, first):
            if part < position.part:
                continue
            step = position.step if part == position.part else -1
            own, its_problem = differing[_key(group[0])]
            begun = ended if group[0].continues else None
            ended = _train(own, folder, its_problem, group, Position(part, step, 0, clock.seconds), leaves, begun)
            leaves = None
        first += len(groups)
    if writes():
        print(f"\n{described(config)}")
        print(f"Time of {folder.path.name}: {clock}.")


def _together(differing: "_Differing", trainings: Sequence[Training]) -> list[list[Training]]:
    """The trainings, those that one program trains together; else each alone, in their order."""
    groups: dict[Any, list[Training]] = {}
    for number, training in enumerate(trainings):
        marks = {name: value for name, value in training.marks.items() if name != "seed"}
        alike = repr((marks, training.method, training.noise, training.continues, sorted(training.changes.items())))
        own, problem = differing[_key(training)]
        groups.setdefault(alike if _vmapped(own, problem, training) else number, []).append(training)
    return list(groups.values())


def _check_continuing(groups: Sequence[Sequence[Training]]) -> None:
    """ValueError where what continues, continues no training of the same seed."""
    for number, group in enumerate(groups):
        seeds, before = ([each.marks["seed"] for each in part] for part in (group, groups[number - 1]))
        if group[0].continues and (not number or seeds != before):
            raise ValueError(f"Expected a training of the same seed before {group[0].title}, which continues it.")


def _vmapped(config: Config, problem: Problem, training: Training) -> bool:
    """Whether its seeds can be one program, and are faster so: all of them have the same images."""
    noise = _noise(training)
    same = isinstance(problem.data, arrays.InMemory) and noise.rare == 1 and not noise.validation
    return same and models.MODELS[config.model].vmapped and METHODS[training.method].average is None


def _noise(training: Training) -> Noise:
    return Noise(*training.noise[:2]) if len(training.noise) == 2 else Noise(*training.noise)


def _key(training: Training) -> frozenset[tuple[str, Any]]:
    return frozenset(training.changes.items())


# The config and the problem of trainings, by their changes.
_Differing = dict[frozenset[tuple[str, Any]], tuple[Config, Problem]]
# Options that change steps alone: the same data and model serve.
_OF_STEPS = frozenset(("learning_rate", "weight_decay", "decay_at", "optimizer", "epochs", "every"))


def _add_differing(differing: _Differing, config: Config, problem: Problem, trainings: Sequence[Training]) -> None:
    """Add the config and the problem of every training; checked before any of them is begun."""
    for training in trainings:
        if _key(training) not in differing:
            own = dataclasses.replace(config, **training.changes)
            if training.changes:
                check(own)
            differing[_key(training)] = own, problem if set(training.changes) <= _OF_STEPS else opened(own)


def _open(config: Config) -> Data:
    """The data set that the config names."""
    if config.data_dir is not None and not config.data_dir.is_dir():
        what = "which is no folder" if config.data_dir.exists() else "which does not exist"
        raise NotADirectoryError(f"Expected data_dir to be the folder of {config.data}, got {config.data_dir}, {what}.")
    if not config.data.startswith(TFDS):
        return arrays.InMemory(config)
    try:
        from .images import Images

        return Images(config)
    except ImportError as error:
        raise FileNotFoundError(f"Expected the extra tfds to be installed, to read {config.data}: {error}") from None


def _position(folder: RunFolder) -> tuple[Position, list[np.ndarray] | None]:
    """Where to begin, which the first process knows, and its state; the others know how far, and no leaves."""
    restored = together(folder.restore, lambda: None)
    position, leaves = restored or (Position(0, -1, 0, {}), None)
    if jax.process_count() > 1:
        part, step = multihost_utils.broadcast_one_to_all(np.array(position[:2], np.int32))
        position = position._replace(part=int(part), step=int(step))
    return position, leaves


def _filled(state: Any, leaves: list[np.ndarray] | None) -> Any:
    """The state that the leaves of a checkpoint are of; where there are several processes, those of the first."""
    like, structure = jax.tree.flatten(jax.device_get(state))
    kept = like if leaves is None else leaves
    if [np.shape(leaf) for leaf in kept] != [np.shape(leaf) for leaf in like]:
        raise ValueError("Expected a checkpoint of this training, got one of another version: name another folder.")
    if jax.process_count() > 1:
        kept = multihost_utils.broadcast_one_to_all(kept)
    return jax.tree.unflatten(structure, kept)


def _train(
    config: Config,
    folder: RunFolder,
    problem: Problem,
    trainings: Sequence[Training],
    start: Position,
    leaves: list[np.ndarray] | None,
    begun: list[Any] | None,
) -> list[Any]:
    """One training, or those of several seeds, of which `start.step` steps are done; the parameters it ends with."""
    data, model = problem
    keys = [Keys.of(training.marks["seed"]) for training in trainings]
    examples = [data.noisy(key, _noise(each)) for key, each in zip(keys, trainings, strict=True)]
    recipe = Recipe(config.batch_size, config.learning_rate, config.weight_decay, config.decay_at, config.optimizer)
    method = trainer(model, trainings[0].method, recipe, examples[0].num_train)
    wanted, clock, done = measured_at(method.per_epoch, config), Clock(start.seconds), max(start.step, 0)
    states = _states(method, keys, examples, begun)
    stepper, state = taking(method, examples, states, done, vmapped=_vmapped(config, problem, trainings[0]))
    state: State = devices().replicate(_filled(state, leaves))

    def note(step: int) -> None:
        with clock.on("training"):
            jax.block_until_ready(state)
        for training, own, params in zip(trainings, examples, stepper.params(state), strict=True):
            with clock.on("measuring"):
                row = training.marks | {"step": step, "epoch": step / method.per_epoch}
                row |= training.measure(own, model, params)
            folder.add(**row)
            folder.time(**training.marks, step=step, **clock.seconds)
            bar.set_postfix(training.shown(row))

    def save(step: int) -> None:
        with clock.on("saving"):
            folder.save(start._replace(step=step, seconds=clock.seconds), state)

    title = trainings[0].title if len(trainings) == 1 else f"{trainings[0].title} and {len(trainings) - 1} more seeds"
    with tqdm(total=wanted[-1], initial=done, desc=title, unit="step", disable=not writes()) as bar:
        if start.step < 0:
            save(-1)  # what cannot be written is known before anything is computed
            note(0)
        for step in sorted({*wanted, *range(0, wanted[-1], config.save_every)}):
            if step <= done:
                continue
            with clock.on("training"):
                state = stepper.advance(state, step - done, bar.update)
            done = step
            if step in wanted:
                note(step)
            if step % config.save_every == 0 or step == wanted[-1]:
                save(step)
    return stepper.params(state)


def _states(
    method: Trainer, keys: Sequence[Keys], examples: Sequence[Examples], begun: list[Any] | None
) -> list[State]:
    """What every seed begins with, on the host."""
    if begun is not None:
        return jax.device_get([method.begin(params) for params in begun])
    return jax.device_get([method.init(key.init, each.first) for key, each in zip(keys, examples, strict=True)])
