"""Stream batches through compiled programs: one program for every batch, one at the end."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cg_jax import trees
from cg_jax._compiled import Programs, compiled
from cg_jax._loss import LossFn, with_state
from cg_jax._types import PyTree
from cg_jax.batches import Batches, PaddedBatch
from cg_jax.estimators import Estimator, Problem
from cg_jax.metrics import Coherence, undefined_ratios
from cg_jax.moments import GradMoments
from cg_jax.sharding import Layout, SingleDevice, Specs


class Inputs(NamedTuple):
    """The arrays that all batches share."""

    params: PyTree
    state: PyTree  # the third argument of loss_fn, or None
    arrays: PyTree  # the estimator's own


class Flags(NamedTuple):
    """The flags of each row of a batch, [B]."""

    bad: jax.Array  # its id if its loss or gradient is non-finite, else −1
    again: jax.Array  # its id if it must be added again without the bad rows, else −1
    values: jax.Array  # the estimator's own, −1 where bad


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static configuration of a measurement. Programs are compiled for it."""

    estimator: Estimator
    layout: Layout
    guards: bool  # set non-finite batches aside until resolved
    has_aux: bool

    def problem(self, loss_fn: LossFn, inputs: Inputs) -> Problem:
        """The inputs of the estimator that all batches share."""
        axis = self.layout.axis if self.estimator.by_example else None
        return Problem(with_state(loss_fn, inputs.state), inputs.params, inputs.arrays, self.has_aux, axis)

    def specs(self, state: Any) -> Specs:
        """The sharding of each accumulated leaf."""
        return self.layout.specs_of(state, self.estimator.like_params)

    def of_batch(self, loss_fn: LossFn, inputs: Inputs, batch: tuple[PyTree, jax.Array]) -> tuple[Any, Flags]:
        """(the sums of a batch, its flags), given (rows, their ids, −1 where masked)."""
        rows, ids = batch
        sums, of_rows = self.estimator.of_batch(self.problem(loss_fn, inputs), rows, ids)
        is_bad = of_rows.is_bad & (ids >= 0)
        is_spoilt = is_bad.any() & self.guards
        # Where no row counts, an estimator may still have computed with one that is not finite.
        is_dropped = is_spoilt | ~(ids >= 0).any()
        sums = jax.tree.map(lambda leaf: jnp.where(is_dropped, jnp.zeros_like(leaf), leaf), sums)
        again = jnp.where(is_spoilt & ~is_bad, ids, -1)
        return sums, Flags(jnp.where(is_bad, ids, -1), again, jnp.where(is_bad, -1, of_rows.values))


@compiled(static=1, donate=(3,))
def step(
    loss_fn: LossFn, setup: Setup, inputs: Inputs, state: Any, batch: tuple[PyTree, jax.Array]
) -> tuple[Any, Flags]:
    """(the state with (rows, ids) added, the flags of the batch)."""
    layout, specs = setup.layout, setup.specs(state)
    of_batch = functools.partial(setup.of_batch, loss_fn)
    if setup.estimator.by_example:
        replicated = [*layout.specs, *_replicated(inputs.arrays)]
        state, flags = layout.per_shard(of_batch, inputs, replicated, state, specs, batch)
    else:
        sums, flags = of_batch(inputs, batch)
        state = layout.constrain_all(setup.estimator.update(state, sums), specs)
    return state, flags._replace(bad=layout.replicate(flags.bad))


@compiled(static=1)
def finish(loss_fn: LossFn, setup: Setup, state: Any, skipped: int) -> tuple[Coherence, GradMoments]:
    """(the coherence, its moments), over all devices."""
    del loss_fn
    if setup.estimator.by_example:
        state = setup.layout.total(state, setup.specs(state))
    return setup.estimator.finalize(state, skipped), setup.estimator.moments(state)


@compiled(static=1, donate=(4,))
def revisit(
    loss_fn: LossFn, setup: Setup, inputs: Inputs, measured: PyTree, total: jax.Array, batch: PyTree
) -> jax.Array:
    """The total with a batch (rows, ids, values) added. The total has one row per device."""
    layout = setup.layout

    def of_batch(replicated: tuple[Inputs, PyTree], batch: PyTree) -> tuple[jax.Array, None]:
        inputs, measured = replicated
        return setup.estimator.revisit(setup.problem(loss_fn, inputs), measured, *batch), None

    specs = [*layout.specs, *_replicated(inputs.arrays), *layout.kept, *_replicated(measured[1:])]
    return layout.per_shard(of_batch, (inputs, measured), specs, total, [None], batch)[0]


def _replicated(tree: PyTree) -> list[PartitionSpec]:
    return [PartitionSpec() for _ in jax.tree.leaves(tree)]


@compiled(static=1, taker="measure_coherence")
def zeros(loss_fn: LossFn, setup: Setup, inputs: Inputs, rows: PyTree) -> Any:
    """The state of no examples."""
    ids = jax.ShapeDtypeStruct(jax.tree.leaves(rows)[0].shape[:1], jnp.int32)
    alone = dataclasses.replace(setup, layout=SingleDevice())
    sums = jax.eval_shape(functools.partial(alone.of_batch, loss_fn), inputs, (rows, ids))[0]
    state = setup.estimator.init(sums)
    return setup.layout.zeros(state, setup.specs(state), by_shard=setup.estimator.by_example)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zero(layout: Layout, dtype: Any) -> jax.Array:
    """A zero sum on every device."""
    return layout.zeros(jax.ShapeDtypeStruct((), dtype), [None], by_shard=True)


@jax.jit
def _means(moments: GradMoments) -> tuple[PyTree, jax.Array]:
    """(the mean gradient, the mean squared norm)."""
    mean_grad = jax.tree.map(lambda s: s / moments.count.astype(s.dtype), moments.sum_grads)
    total = trees.total(moments.sum_sq_norms)
    return mean_grad, total / moments.count.astype(total.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _conclude(estimator: Estimator, total: jax.Array, count: jax.Array) -> jax.Array:
    """The standard error of α from the totals of all devices."""
    return estimator.conclude(total.sum(), count)


def _raise_nonfinite(bad: np.ndarray, batch: PaddedBatch, setup: Setup) -> None:
    row = int(np.argmax(bad >= 0))
    number, where = int((bad >= 0).sum()), str(bad[row])
    if len(batch.sizes) > 1:
        where += f" of process {setup.layout.process_of(row, bad.size)}'s data"
    if setup.estimator.flags_examples:
        count = f"{number} of {sum(batch.sizes)} examples in one batch that are not, the first at index {where}"
    else:
        count = f"a batch in which some are not: {number} examples, from index {where} on"
    what = "examples" if setup.estimator.flags_examples else "batches"
    raise FloatingPointError(
        f"Expected finite losses and gradients, got {count}. nonfinite='skip' leaves such {what} out and counts their "
        "examples; nonfinite='propagate' lets them through."
    )


class Measurement(NamedTuple):
    """One measurement: its programs and their inputs."""

    programs: Programs  # of the loss
    setup: Setup
    inputs: Inputs
    nonfinite: str
    revisits: bool

    def call(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """Call one of the programs above on the mesh. Reading data, which may run user code, happens outside it."""
        with self.setup.layout.active():
            return program(self.programs, self.setup, *arguments)

    def add_all(self, batches: Batches, bar: Any) -> tuple[Any, int, list[tuple[Any, Any]]]:
        """(the state after all batches, the number of skipped examples, (ids, values) of each batch)."""
        state, skipped, by_batch = None, 0, []
        # Flags are read one batch late, so that the devices compute while the host prepares the next batch.
        pending: list[tuple[PaddedBatch, Flags]] = []
        for batch in batches.batches:
            if not self.setup.estimator.by_example and not batches.is_whole(batch):
                skipped += sum(batch.sizes)
                continue
            if state is None:
                state = self.call(zeros, self.inputs, batch.rows)
            state, flags = self.call(step, self.inputs, state, (batch.rows, batch.ids))
            pending = [*pending, (batch, flags)] if self.setup.guards else []
            if len(pending) > 1:
                state, more = self.settle(state, *pending.pop(0))
                skipped += more
            if self.revisits:
                by_batch.append((batch.ids, flags.values))
            bar.update()
        for batch, flags in pending:
            state, more = self.settle(state, batch, flags)
            skipped += more
        if state is None:
            raise ValueError(
                f"Expected at least one whole batch of batch_size={batches.share}, got {skipped} examples."
            )
        return state, skipped, by_batch

    def finish(self, state: Any, skipped: int) -> tuple[Coherence, GradMoments]:
        """(the coherence, its moments), over all devices."""
        with undefined_ratios():
            return self.call(finish, state, skipped)

    def settle(self, state: Any, batch: PaddedBatch, flags: Flags) -> tuple[Any, int]:
        """(the state, the number of skipped examples) after resolving a batch that was set aside for its flags."""
        skipped, bad = 0, jax.device_get(flags.bad)
        while (bad >= 0).any():
            if self.nonfinite == "raise":
                _raise_nonfinite(bad, batch, self.setup)
            skipped += int((bad >= 0).sum())
            if not self.setup.estimator.flags_examples:  # only whole batches are flagged
                break
            state, flags = self.call(step, self.inputs, state, (batch.rows, flags.again))
            bad = jax.device_get(flags.bad)
        return state, skipped

    def stderr(
        self, batches: Batches, measured: Coherence, moments: GradMoments, by_batch: list[tuple[Any, Any]]
    ) -> jax.Array:
        """The standard error of α, by one more pass over the data."""
        if np.isnan(jax.device_get(measured.alpha)):
            return measured.alpha
        with undefined_ratios():
            mean_grad, mean_sq_norm = _means(moments)
        known = (mean_grad, measured.alpha, mean_sq_norm)
        total = _zero(self.setup.layout, measured.alpha.dtype)
        for batch, (ids, values) in zip(batches.batches, by_batch, strict=True):
            total = self.call(revisit, self.inputs, known, total, (batch.rows, ids, values))
        with undefined_ratios():
            return _conclude(self.setup.estimator, total, measured.count)
