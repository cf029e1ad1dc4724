"""Batches streamed through compiled programs: one for every batch, one at the end."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cg_jax import trees
from cg_jax._compiled import Programs, compiled
from cg_jax._loss import LossFn
from cg_jax.batches import Batch, Batches
from cg_jax.estimators import Estimator, Inputs, OfRows, Sums, add_batch, deviations
from cg_jax.layout import Layout, Specs
from cg_jax.metrics import Coherence, undefined_ratios
from cg_jax.moments import GradMoments

PyTree = Any

_ON_EVERY_DEVICE = PartitionSpec()


def _specs(layout: Layout, sums: Sums) -> Specs:
    """Where each leaf of the sums lies."""
    like = jax.tree.unflatten(jax.tree.structure(sums.moments.sum_grads), layout.kept)
    scalars = jax.tree.map(lambda _: False, sums)
    moments = scalars.moments._replace(sum_grads=like)
    marked = scalars._replace(moments=moments, previous=None if sums.previous is None else like)
    leaves = jax.tree.leaves(marked, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return [None if leaf is False else leaf for leaf in leaves]


@compiled(static=2, donate=(4,))
def _step(
    loss_fn: LossFn,
    how: Estimator,
    layout: Layout | None,
    inputs: Inputs,
    sums: Sums,
    batch: tuple[PyTree, jax.Array],
) -> tuple[Sums, OfRows]:
    """(sums with those of (rows, ids) added, what the batch says of its rows)."""
    if layout is not None and how.by_example:
        specs = _specs(layout, sums)
        lie = [*layout.specs, _ON_EVERY_DEVICE]
        of_batch = functools.partial(how.of_batch, loss_fn)
        sums, of_rows = layout.per_shard(of_batch, inputs, lie, sums, specs, batch)
    else:
        found, of_rows = how.of_batch(loss_fn, inputs, batch)
        sums = trees.add(sums, found) if how.by_example else add_batch(sums, found, how.batch_size)
    if layout is not None:
        if not how.by_example:
            sums = layout.constrain_all(sums, _specs(layout, sums))
        of_rows = of_rows._replace(bad=layout.constrain(of_rows.bad, _ON_EVERY_DEVICE))
    return sums, of_rows


@compiled(static=2)
def _finish(loss_fn: LossFn, how: Estimator, layout: Layout | None, sums: Sums, skipped: int) -> tuple[Coherence, Sums]:
    """(the coherence, the sums over all devices)."""
    del loss_fn
    if layout is not None and how.by_example:
        sums = layout.total(sums, _specs(layout, sums))
    return how.finish(sums, skipped), sums


@compiled(static=2, donate=(4,))
def _deviation_step(
    loss_fn: LossFn, how: Estimator, layout: Layout | None, inputs: PyTree, total: jax.Array, batch: PyTree
) -> jax.Array:
    """The total with the squared deviations of a batch added; one row for each device."""
    if layout is None:
        return total + deviations(how, loss_fn, inputs, batch)[0]
    specs = [*layout.specs, *layout.kept, _ON_EVERY_DEVICE, _ON_EVERY_DEVICE]
    return layout.per_shard(functools.partial(deviations, how, loss_fn), inputs, specs, total, [None], batch)[0]


@compiled(static=2, taker="measure_coherence")
def _zeros(loss_fn: LossFn, how: Estimator, layout: Layout | None, inputs: Inputs, rows: PyTree) -> Sums:
    """The sums of no examples."""
    shapes = how.shapes(loss_fn, inputs, rows)
    if layout is None:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return layout.zeros(shapes, _specs(layout, shapes), by_shard=how.by_example)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zero(layout: Layout | None, dtype: Any) -> jax.Array:
    """No deviation yet, of every device."""
    if layout is None:
        return jnp.zeros((), dtype)
    return layout.zeros(jax.ShapeDtypeStruct((), dtype), [None], by_shard=True)


@jax.jit
def _means(moments: GradMoments) -> tuple[PyTree, jax.Array]:
    """(the mean gradient, the mean squared norm)."""
    mean_grad = jax.tree.map(lambda s: s / moments.count.astype(s.dtype), moments.sum_grads)
    total = trees.total(moments.sum_sq_norms)
    return mean_grad, total / moments.count.astype(total.dtype)


@jax.jit
def _stderr(total: jax.Array, count: jax.Array) -> jax.Array:
    """The standard error of α from the squared deviations of all devices."""
    return jnp.where(count > 1, jnp.sqrt(total.sum()) / count.astype(total.dtype), jnp.nan)


def _raise_nonfinite(bad: np.ndarray, batch: Batch, how: Estimator, layout: Layout | None) -> None:
    row = int(np.argmax(bad >= 0))
    number, where = int((bad >= 0).sum()), str(bad[row])
    if layout is not None and len(batch.sizes) > 1:
        where += f" of process {layout.process_of(row, bad.size)}'s data"
    if how.name == "exact":
        found = f"{number} of {sum(batch.sizes)} examples in one batch that are not, the first at index {where}"
    else:
        found = f"a batch in which some are not: {number} examples, from index {where} on"
    what = "examples" if how.name == "exact" else "batches"
    raise FloatingPointError(
        f"Expected finite losses and gradients, got {found}. nonfinite='skip' leaves such {what} out and counts their "
        "examples; nonfinite='propagate' lets them through."
    )


class Run(NamedTuple):
    """One measurement."""

    programs: Programs  # of the loss
    how: Estimator
    layout: Layout | None
    inputs: Inputs
    nonfinite: str
    confidence: bool

    def call(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """One of the programs above, on the mesh; not so what is read from data, which may be the user's own code."""
        with self.layout.active() if self.layout else contextlib.nullcontext():
            return program(self.programs, self.how, self.layout, *arguments)

    def add_all(self, batches: Batches, bar: Any) -> tuple[Sums, int, list[tuple[Any, Any]]]:
        """(the sums of all batches, examples left out, (ids, squared norms) of each batch)."""
        sums, skipped, by_batch = None, 0, []
        # Flags are read one batch late, so that the devices compute while the host makes the next batch.
        pending: list[tuple[Batch, OfRows]] = []
        for batch in batches.batches:
            if not self.how.by_example and not batches.is_whole(batch):
                skipped += sum(batch.sizes)
                continue
            if sums is None:
                sums = self.call(_zeros, self.inputs, batch.rows)
            sums, of_rows = self.call(_step, self.inputs, sums, (batch.rows, batch.ids))
            pending = [*pending, (batch, of_rows)] if self.how.guard else []
            if len(pending) > 1:
                sums, more = self.settle(sums, *pending.pop(0))
                skipped += more
            if self.confidence:
                by_batch.append((batch.ids, of_rows.sq_norms))
            bar.update()
        for batch, of_rows in pending:
            sums, more = self.settle(sums, batch, of_rows)
            skipped += more
        if sums is None:
            raise ValueError(
                f"Expected at least one whole batch of batch_size={self.how.batch_size}, got {skipped} examples."
            )
        return sums, skipped, by_batch

    def finish(self, sums: Sums, skipped: int) -> tuple[Coherence, Sums]:
        """(the coherence, the sums over all devices)."""
        with undefined_ratios():
            return self.call(_finish, sums, skipped)

    def settle(self, sums: Any, batch: Batch, of_rows: OfRows) -> tuple[Sums, int]:
        """(sums, examples skipped), once a batch that was left out for its flags is dealt with."""
        skipped, bad = 0, jax.device_get(of_rows.bad)
        while (bad >= 0).any():
            if self.nonfinite == "raise":
                _raise_nonfinite(bad, batch, self.how, self.layout)
            skipped += int((bad >= 0).sum())
            if self.how.name != "exact":  # only whole batches are told apart
                break
            sums, of_rows = self.call(_step, self.inputs, sums, (batch.rows, of_rows.again))
            bad = jax.device_get(of_rows.bad)
        return sums, skipped

    def stderr(self, batches: Batches, found: Coherence, sums: Sums, by_batch: list[tuple[Any, Any]]) -> jax.Array:
        """The infinitesimal jackknife's standard error of α, by one more pass."""
        if np.isnan(jax.device_get(found.alpha)):
            return found.alpha
        with undefined_ratios():
            mean_grad, mean_sq_norm = _means(sums.moments)
        inputs = (self.inputs.params, self.inputs.state, mean_grad, found.alpha, mean_sq_norm)
        total = _zero(self.layout, found.alpha.dtype)
        for batch, (ids, sq_norms) in zip(batches.batches, by_batch, strict=True):
            total = self.call(_deviation_step, inputs, total, (batch.rows, ids, sq_norms))
        with undefined_ratios():
            return _stderr(total, found.count)
