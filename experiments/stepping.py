"""How steps are taken: those of one training at a time, or those of several seeds in one program."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .arrays import OnDevices
from .devices import devices
from .examples import Examples
from .train import State, Trainer

# The most steps that one call of the program of several seeds takes; fewer are taken of as many rows.
CHUNK = 100


class Stepper(Protocol):
    """What takes steps."""

    def advance(self, state: State, steps: int, tick: Callable[[int], Any]) -> State:
        """The state after so many steps; `tick` is told how many were taken."""
        ...

    def params(self, state: State) -> list[Any]:
        """The parameters of every seed."""
        ...


class Alone:
    """One training, one step at a time."""

    def __init__(self, method: Trainer, examples: Examples, done: int) -> None:
        self._method, self._batches = method, examples.batches(done, method.rows_per_step)

    def advance(self, state: State, steps: int, tick: Callable[[int], Any]) -> State:
        """The state after so many steps."""
        for _ in range(steps):
            batch = next(self._batches)
            jax.block_until_ready(state)  # else batches would pile up on the devices
            state = self._method.step(state, *batch)
            tick(1)
        return state

    def params(self, state: State) -> list[Any]:
        """The parameters of the one seed."""
        return [state.params]


class Together:
    """Trainings that differ by their seeds alone, on the same images; every leaf of their state is [seeds, …]."""

    def __init__(self, method: Trainer, examples: Sequence[OnDevices], done: int) -> None:
        self._method = method
        self._images = examples[0].arrays("train")[0]
        self._labels = jnp.stack([each.arrays("train")[1] for each in examples])
        self._rows = [each.rows(done, method.rows_per_step) for each in examples]

    def advance(self, state: State, steps: int, tick: Callable[[int], Any]) -> State:
        """The states after so many steps of every seed."""
        while steps:
            count = min(steps, CHUNK)
            rows = np.stack([[next(each) for each in self._rows] for _ in range(count)])
            rows = np.pad(rows, [(0, CHUNK - count), *[(0, 0)] * 3])
            jax.block_until_ready(state)
            state = self._method.steps(state, self._images, self._labels, devices().spread(rows, 3), count)
            tick(count)
            steps -= count
        return state

    def params(self, state: State) -> list[Any]:
        """The parameters of every seed."""
        leaves, structure = jax.tree.flatten(state.params)
        return [structure.unflatten([leaf[seed] for leaf in leaves]) for seed in range(len(self._labels))]


def taking(
    method: Trainer, examples: Sequence[Examples], states: Sequence[State], done: int, *, vmapped: bool
) -> tuple[Stepper, State]:
    """What takes the steps after the first `done` of trainings that begin with these states, and their one state."""
    if not vmapped:
        return Alone(method, examples[0], done), states[0]
    on_devices = [each for each in examples if isinstance(each, OnDevices)]
    return Together(method, on_devices, done), jax.tree.map(lambda *leaves: np.stack(leaves), *states)
