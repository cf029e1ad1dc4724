"""Training by any of the methods that the experiments compare."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import models
from .devices import devices
from .methods import EPOCH_UNIT, METHODS, Method, check_method


class Keys(NamedTuple):
    """Separate randomness for each thing that is random, so that methods differ in nothing else."""

    init: jax.Array
    order: jax.Array
    noise: jax.Array
    test_noise: jax.Array

    @classmethod
    def of(cls, seed: int) -> "Keys":
        """The keys of a seed."""
        return cls(*jax.random.split(jax.random.key(seed), 4))


class State(NamedTuple):
    """Parameters and the state of the optimizer."""

    params: Any
    opt_state: Any


class Recipe(NamedTuple):
    """How steps are made of gradients, whatever the method."""

    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0  # added to the gradients before they are aggregated, as in the papers
    decay_at: tuple[int, ...] = ()  # epochs after which the learning rate is a tenth of what it was
    optimizer: str = "sgd"


_OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


class Trainer(NamedTuple):
    """One method's way to train one model."""

    init: Callable[[jax.Array, Any], State]  # (key, images) → state
    begin: Callable[[Any], State]  # of parameters that were trained before
    # (state, images, labels, rows [groups, B]) or (state, images [groups, B, …], labels [groups, B], None) → state;
    # jitted, the state donated
    step: Callable[..., State]
    # (states [seeds, …], images, labels [seeds, m], rows [T, seeds, groups, B], count) → states after count ≤ T steps
    # of every seed, vmapped over seeds; jitted, the states donated
    steps: Callable[..., State]
    rows_per_step: int
    per_epoch: int  # steps


@functools.cache
def trainer(model: nn.Module, method: str, recipe: Recipe, num_examples: int) -> Trainer:
    """The trainer of a method, compiled once for all seeds."""
    check_method(method, batch_norm=models.has_batch_norm(model))
    rows_per_step = METHODS[method].groups * recipe.batch_size
    per_epoch = steps_per_epoch(num_examples, rows_per_step, recipe.batch_size)
    if not per_epoch:
        what = f"{EPOCH_UNIT} mini-batches of batch_size={recipe.batch_size}"
        raise ValueError(f"Expected {what} or more to train on, got {num_examples} examples.")
    drops = {per_epoch * epoch: 0.1 for epoch in recipe.decay_at}
    rate = optax.piecewise_constant_schedule(recipe.learning_rate, drops) if drops else recipe.learning_rate
    optimizer = optax.chain(METHODS[method].transform(), _OPTIMIZERS[recipe.optimizer](rate))
    gradient = _gradient(model, METHODS[method], rows_per_step)

    def begin(params: Any) -> State:
        return State(params, optimizer.init(params))

    def init(key: jax.Array, images: jax.Array) -> State:
        return begin(model.init(key, models.as_input(images[:1])))

    def step(state: State, images: jax.Array, labels: jax.Array, rows: jax.Array | None) -> State:
        batches = (images, labels) if rows is None else (images[rows], labels[rows])
        grads, averages = gradient(state.params, batches)
        if recipe.weight_decay:
            grads = {**grads, "params": _decayed(grads["params"], state.params["params"], recipe.weight_decay)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State({**params, **averages}, opt_state)

    def steps(states: State, images: jax.Array, labels: jax.Array, rows: jax.Array, count: jax.Array) -> State:
        of_all = jax.vmap(step, in_axes=(0, None, 0, 0))
        return jax.lax.fori_loop(0, count, lambda i, states: of_all(states, images, labels, rows[i]), states)

    one, several = (jax.jit(each, donate_argnums=0) for each in (step, steps))
    return Trainer(jax.jit(init), jax.jit(begin), one, several, rows_per_step, per_epoch)


def _decayed(grads: Any, weights: Any, decay: float) -> Any:
    """Gradients, or those [k, …] of each group, of the loss and of half the squared weights times `decay`."""
    return jax.tree.map(lambda g, w: g + decay * jnp.broadcast_to(w, g.shape), grads, weights)


# (params, mini-batches [groups, B, …]) → (their mean gradients [groups, …], or one gradient [*param]; what changed).
Gradient = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def _gradient(model: nn.Module, method: Method, rows_per_step: int) -> Gradient:
    """What a step of a method begins with."""
    if method.average is None:
        return _of_mini_batches(model, method.groups)
    average = method.average(models.loss_of(model), rows_per_step)

    def gradient(params: Any, batches: Any) -> tuple[Any, dict[str, Any]]:
        return average(params, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)), {}

    return gradient


def _of_mini_batches(model: nn.Module, groups: int) -> Gradient:
    """The gradients of one mini-batch after another, each divided over the devices.

    Side by side, the compiler would make every device compute all of them.
    """
    batch_norm = models.has_batch_norm(model)
    loss = (
        models.training_loss_of(model)
        if batch_norm
        else lambda *arguments: (models.mean_loss_of(model)(*arguments), {})
    )
    of_one = jax.grad(loss, has_aux=True)

    def gradient(params: Any, batches: Any) -> tuple[Any, dict[str, Any]]:
        if groups == 1:
            return of_one(params, jax.tree.map(lambda leaf: leaf[0], batches))
        grads, averages = jax.lax.map(lambda batch: of_one(params, batch), batches)
        return grads, jax.tree.map(lambda leaf: leaf.mean(0), averages)

    return gradient


def steps_per_epoch(num_examples: int, rows_per_step: int, batch_size: int) -> int:
    """Steps of an epoch, in which every method sees the same number of examples."""
    return num_examples // (EPOCH_UNIT * batch_size) * EPOCH_UNIT * batch_size // rows_per_step


def epoch_order(key: jax.Array, epoch: int, num_examples: int) -> np.ndarray:
    """The order [num_examples] in which an epoch, counted from 0, goes through the examples."""
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), num_examples))


def epoch_rows(
    key: jax.Array, epoch: int, num_examples: int, rows_per_step: int, batch_size: int
) -> Iterator[np.ndarray]:
    """The rows of each step of an epoch (counted from 0), in an order of its own; the odd few are left out."""
    order = epoch_order(key, epoch, num_examples)
    for step in range(steps_per_epoch(num_examples, rows_per_step, batch_size)):
        yield order[step * rows_per_step : (step + 1) * rows_per_step]


def rows_from(
    key: jax.Array, step: int, num_examples: int, rows_per_step: int, batch_size: int
) -> Iterator[np.ndarray]:
    """The rows of each step, from `step` of a training on, without end."""
    epoch, skipped = divmod(step, steps_per_epoch(num_examples, rows_per_step, batch_size))
    yield from itertools.islice(epoch_rows(key, epoch, num_examples, rows_per_step, batch_size), skipped, None)
    for later in itertools.count(epoch + 1):
        yield from epoch_rows(key, later, num_examples, rows_per_step, batch_size)


def predict(model: nn.Module, params: Any, images: jax.Array, batch_size: int) -> np.ndarray:
    """Predicted classes [m]; the last batch overlaps the one before, so that one shape compiles."""
    size, parts, classes = images.shape[0], [], models.predictor(model)
    batch_size = min(batch_size, size)
    out = np.empty(size, np.int32)
    for start in range(0, size, batch_size):
        start = min(start, size - batch_size)
        part = devices().spread(jax.lax.dynamic_slice_in_dim(images, start, batch_size))
        parts.append((start, devices().replicate(classes(params, part))))
    for start, part in parts:
        out[start : start + batch_size] = part
    return out
