"""Checkpoints of a run, by Orbax: all that it needs to go on as if it had never been stopped.

That is how far it is, the parameters with the states of optimizer and aggregation, and the length of metrics.jsonl.
Randomness needs nothing of its own: its keys follow from the seed, the order of the examples from the step.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from .errors import first_line

# How many steps one training of a run may have; orders checkpoints by training, then by step.
_MOST_STEPS = 10**9
# A checkpoint that is not the newest is kept until two newer ones are whole.
_KEPT = 2
# The file of a checkpoint that says what the others hold; the last to be written.
_DIGEST = "sha256"


class Position(NamedTuple):
    """How far a run is."""

    part: int  # which of its trainings
    step: int  # how many steps of that are done, and measured where it was to be; −1: not even the start was
    metrics_bytes: int  # length of metrics.jsonl
    seconds: dict[str, float]  # spent until then, by what for


class Checkpoints:
    """The checkpoints in a folder. One process saves and restores; the state is the same on all."""

    def __init__(self, folder: Path) -> None:
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="checkpoints"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT,
            enable_async_checkpointing=False,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
            create=False,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, position: Position, state: Any) -> None:
        """Write a checkpoint, unless there is one of that step; the oldest goes when it is whole.

        Raises:
            OSError: It could not be written; those before are still there.
        """
        number = position.part * _MOST_STEPS + position.step + 1
        if number in self._manager.all_steps():
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
        require_space(self._folder, sum(leaf.nbytes for leaf in leaves))
        about = position._asdict() | {"leaves": [[list(leaf.shape), leaf.dtype.name] for leaf in leaves]}
        arrays = {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}
        content = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        try:
            self._manager.save(number, args=content, force=True)
            self._manager.wait_until_finished()
            folder = self._folder / str(number)
            (folder / f"{_DIGEST}.tmp").write_text(_digest(folder), encoding="utf-8")
            os.replace(folder / f"{_DIGEST}.tmp", folder / _DIGEST)
        except Exception as error:
            raise OSError(f"Expected to write a checkpoint to {self._folder}, got: {first_line(error)}") from error

    def restore(self, metrics_bytes: int) -> tuple[Position, list[np.ndarray]] | None:
        """(how far the newest whole checkpoint is, the leaves of its state), of a run with so much in metrics.jsonl.

        Those after it are damaged, and deleted. None where there is no checkpoint and nothing was measured.

        Raises:
            FileExistsError: There is no whole one; nothing was changed.
        """
        damaged: list[int] = []
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                whole = self._read(number)
                if whole[0].metrics_bytes > metrics_bytes:
                    raise ValueError("metrics.jsonl is shorter than it was then")
            except Exception as error:  # whatever a damaged file makes the reader say
                print(f"Checkpoint {number} is damaged: {first_line(error)}", file=sys.stderr)
                damaged.append(number)
                continue
            if damaged:
                print(f"The one before is used: {number}.", file=sys.stderr)
            for each in damaged:
                shutil.rmtree(self._folder / str(each))
            self._manager.reload()
            return whole
        if damaged or metrics_bytes:
            what = f"measurements in {self._folder.parent} and no whole checkpoint"
            raise FileExistsError(f"Expected a run that can go on, got {what}: name another folder, or delete that.")
        return None

    def _read(self, number: int) -> tuple[Position, list[np.ndarray]]:
        # Before Orbax sees it: what it reads wrong it may hand on, or go on reading when it has given up.
        folder = self._folder / str(number)
        if not (folder / _DIGEST).exists():
            raise ValueError("it was not written to its end")
        if (folder / _DIGEST).read_text(encoding="utf-8") != _digest(folder):
            raise ValueError("what it holds is not what was written")

        def read(**what: Any) -> Any:
            return self._manager.restore(number, args=ocp.args.Composite(**what))

        about: dict[str, Any] = dict(read(about=ocp.args.JsonRestore())["about"])
        kinds = [(tuple(shape), jax.numpy.dtype(name)) for shape, name in about.pop("leaves")]
        wanted = {str(i): np.zeros(shape, dtype) for i, (shape, dtype) in enumerate(kinds) if 0 not in shape}
        arrays = read(state=ocp.args.StandardRestore(wanted))["state"]
        leaves = [
            np.asarray(arrays[str(i)]) if 0 not in shape else np.zeros(shape, dtype)
            for i, (shape, dtype) in enumerate(kinds)
        ]
        return Position(**about), leaves


def _digest(folder: Path) -> str:
    """Of the names and the contents of all files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_DIGEST)):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def require_space(folder: Path, state_bytes: int) -> None:
    """OSError unless a further checkpoint fits on the disk, with some room for metrics."""
    needed, free = 2 * state_bytes + 2**23, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"Expected {needed / 1e6:,.0f} MB free for a checkpoint in {folder}, got {free / 1e6:,.0f} MB.")
