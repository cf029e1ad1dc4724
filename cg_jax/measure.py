"""Coherence of a whole data set: batches of one shape are streamed through one compiled step, on a device or a mesh."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cg_jax import _validate, trees
from cg_jax.batches import Batch, Batches, batches_of, is_arrays
from cg_jax.estimators import ESTIMATORS, Estimator, OfRows, Sums, add_batch, deviations
from cg_jax.layout import Layout, Specs
from cg_jax.metrics import Coherence
from cg_jax.per_example import LossFn
from cg_jax.statistics import METHODS

PyTree = Any

NONFINITE = ("raise", "skip", "propagate")
_ON_EVERY_DEVICE = PartitionSpec()


def _specs(layout: Layout, sums: Sums) -> Specs:
    """Where each leaf of the sums lies."""
    like = jax.tree.unflatten(jax.tree.structure(sums.moments.sum_grads), layout.kept)
    scalars = jax.tree.map(lambda _: False, sums)
    moments = scalars.moments._replace(sum_grads=like)
    marked = scalars._replace(moments=moments, previous=None if sums.previous is None else like)
    leaves = jax.tree.leaves(marked, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return [None if leaf is False else leaf for leaf in leaves]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    how: Estimator, layout: Layout | None, params: PyTree, sums: Sums, batch: tuple[PyTree, jax.Array]
) -> tuple[Sums, OfRows]:
    """(sums with those of (rows, ids) added, what the batch says of its rows)."""
    if layout is not None and how.by_example:
        specs = _specs(layout, sums)
        sums, of_rows = layout.per_shard(how.of_batch, params, layout.specs, sums, specs, batch)
    else:
        found, of_rows = how.of_batch(params, batch)
        sums = trees.add(sums, found) if how.by_example else add_batch(sums, found, how.batch_size)
    if layout is not None:
        if not how.by_example:
            sums = layout.constrain_all(sums, _specs(layout, sums))
        of_rows = of_rows._replace(bad=layout.constrain(of_rows.bad, _ON_EVERY_DEVICE))
    return sums, of_rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish(how: Estimator, layout: Layout | None, sums: Sums, skipped: int) -> tuple[Coherence, Sums]:
    """(the coherence, the sums over all devices)."""
    if layout is not None and how.by_example:
        sums = layout.total(sums, _specs(layout, sums))
    return how.finish(sums, skipped), sums


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _deviation_step(
    how: Estimator, layout: Layout | None, inputs: PyTree, total: jax.Array, batch: PyTree
) -> jax.Array:
    """The total with the squared deviations of a batch added; one row for each device."""
    if layout is None:
        return total + deviations(how, inputs, batch)[0]
    specs = [*layout.specs, *layout.kept, _ON_EVERY_DEVICE]
    return layout.per_shard(functools.partial(deviations, how), inputs, specs, total, [None], batch)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(how: Estimator, layout: Layout | None, params: PyTree, rows: PyTree) -> Sums:
    """The sums of no examples."""
    shapes = how.shapes(params, rows)
    if layout is None:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return layout.zeros(shapes, _specs(layout, shapes), by_shard=how.by_example)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zero(layout: Layout | None, dtype: Any) -> jax.Array:
    """No deviation yet, of every device."""
    if layout is None:
        return jnp.zeros((), dtype)
    return layout.zeros(jax.ShapeDtypeStruct((), dtype), [None], by_shard=True)


def _raise_nonfinite(bad: np.ndarray, batch: Batch, layout: Layout | None) -> None:
    row = int(np.argmax(bad >= 0))
    number, where = int((bad >= 0).sum()), str(bad[row])
    if layout is not None and len(batch.sizes) > 1:
        where += f" of process {layout.process_of(row, bad.size)}'s data"
    raise FloatingPointError(
        f"Expected finite losses and gradients, got {number} of {sum(batch.sizes)} examples in one batch "
        f"that are not, the first at index {where}. nonfinite='skip' leaves such examples out and counts them; "
        "nonfinite='propagate' lets them through."
    )


@contextlib.contextmanager
def _bar(progress: bool, total: int | None) -> Iterator[Any]:
    """A progress bar over batches, or what stands in for one."""
    if not progress:
        yield types.SimpleNamespace(update=lambda: None)
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True draws its bar with tqdm: pip install tqdm.") from None
    with tqdm(total=total, desc="coherence", unit="batch", leave=False) as bar:
        yield bar


def _check_confidence(confidence: bool, estimator: str, data: Any) -> None:
    if not confidence:
        return
    if estimator != "exact":
        raise ValueError(
            f"Expected estimator='exact' with confidence=True, got estimator={estimator!r}, whose alpha_stderr, "
            "that of the estimate, is always given."
        )
    if not (is_arrays(data) or isinstance(data, list)):
        raise TypeError(
            "Expected data to be arrays or a list of batches with confidence=True, which reads it twice, got "
            f"{type(data).__name__}."
        )


class _Run(NamedTuple):
    """One measurement."""

    how: Estimator
    layout: Layout | None
    params: PyTree
    nonfinite: str
    confidence: bool

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
                sums = _zeros(self.how, self.layout, self.params, batch.rows)
            sums, of_rows = _step(self.how, self.layout, self.params, sums, (batch.rows, batch.ids))
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

    def settle(self, sums: Any, batch: Batch, of_rows: OfRows) -> tuple[Sums, int]:
        """(sums, examples skipped), once a batch that was left out for its flags is dealt with."""
        skipped, bad = 0, np.asarray(of_rows.bad)
        while (bad >= 0).any():
            if self.nonfinite == "raise":
                _raise_nonfinite(bad, batch, self.layout)
            skipped += int((bad >= 0).sum())
            if self.how.name != "exact":  # only whole batches are told apart
                break
            sums, of_rows = _step(self.how, self.layout, self.params, sums, (batch.rows, of_rows.again))
            bad = np.asarray(of_rows.bad)
        return sums, skipped

    def stderr(self, batches: Batches, found: Coherence, sums: Sums, by_batch: list[tuple[Any, Any]]) -> jax.Array:
        """The infinitesimal jackknife's standard error of α, by one more pass."""
        mean_grad = jax.tree.map(lambda s: s / sums.moments.count, sums.moments.sum_grads)
        inputs, total = (self.params, mean_grad, found.alpha), _zero(self.layout, found.alpha.dtype)
        for batch, (ids, sq_norms) in zip(batches.batches, by_batch, strict=True):
            total = _deviation_step(self.how, self.layout, inputs, total, (batch.rows, ids, sq_norms))
        return jnp.sqrt(total.sum()) / trees.total(sums.moments.sum_sq_norms)


def measure_coherence(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree | Iterable[PyTree],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    data_axis: str | None = None,
    method: str = "ghost",
    estimator: str = "exact",
    confidence: bool = False,
    nonfinite: str = "raise",
    seed: int = 0,
    progress: bool = False,
) -> Coherence:
    """Coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of all m examples of `data` at `params`, streamed in batches.

    The exact result does not depend on batch_size or mesh but for rounding. One program is compiled for each (loss_fn,
    shapes, mesh): pass the same function object again, for a fresh lambda compiles again.

    On a mesh every device adds up the sums of its own examples, and one all-reduce of the size of the parameters ends
    the measurement, whatever m is. Parameters stay as they lie: divided over another axis (tensor parallel) they are
    never gathered, and the compiler divides the work; divided over the data axis (FSDP) they are gathered and their
    sums scattered for every batch, which moves twice their size for each.

    Args:
        loss_fn: loss_fn(params, example) → scalar, the loss of ONE example; for estimator "batch", loss_fn(params,
            batch) → the mean loss of a batch.
        params: Any pytree of arrays; integer leaves are held fixed.
        data: A pytree (tuple, dict, …) of host or device arrays that share a leading axis m, any m; or an iterable (a
            list, a generator, a loader) of batches, each such a pytree of at most batch_size rows. Of several processes
            each gives its own part of the data, any m: arrays on the host, or its share of every batch. An iterable
            then costs one small exchange between processes for each batch.
        batch_size: Examples in one batch, over all devices; a shorter batch is padded by repeating a row, and the
            padding is masked.
        mesh: Divide the examples over a `jax.sharding.Mesh`, of one process or of all.
        data_axis: The axis of the mesh that examples are divided over; without it its only axis, or "data".
        method: "ghost", or "vmap" for the plain reference; of estimator "exact".
        estimator: "exact"; or one that needs no per-example gradients, for losses that the engine is not for:
            "signs", Q ≈ Σ_b ‖Σᵢ εᵢ gᵢ‖² with random signs εᵢ = ±1 and one term for each batch on each device: two
            ordinary backward passes.
            "batch", from mean gradients of disjoint batches of k = batch_size, for losses that see the whole batch
            (BatchNorm in training): α = c α_W / (1 − α_W (1 − c)), c = (m − k)/(k (m − 1)), with α_W that of the mean
            gradients. Batches that are not whole are left out and counted in num_skipped; m is what was used. Every
            batch ends in an all-reduce. One batch alone: α is NaN.
        confidence: Estimator "exact": give alpha_stderr, the infinitesimal jackknife's standard error of α over new
            samples of m examples, by one more pass over the data (arrays or a list). Near the orthogonal limit, below
            α of about 10/m, it is too large (up to twice). Estimators "signs" and "batch" always give alpha_stderr: of
            the estimate, around the exact α of the same examples (NaN below 2 and 4 batches).
        nonfinite: What a loss or gradient that is not finite does. "raise": FloatingPointError with how many and the
            first index. "skip": the example is left out and counted in num_skipped ("signs", "batch": its whole
            batch). "propagate": the result is NaN.
        seed: Of the random signs.
        progress: Draw a bar (needs tqdm).

    Returns:
        A `Coherence`; its scalars are arrays on the device.

    Raises:
        ValueError: batch_size < 1, unknown method, estimator or nonfinite, empty data, leading axes that disagree, a
            batch larger than batch_size, data_axis that is none of the mesh, estimator "batch" with a batch_size that
            the devices do not divide, confidence with another estimator than "exact", or a loss that does not depend
            on params.
        TypeError: loss_fn is no function or does not return a real scalar, a leaf of params is complex or no array,
            data is no pytree of arrays and cannot be iterated, or cannot be iterated twice where it has to be.
        FloatingPointError: With nonfinite="raise".

    References:
        Chatterjee & Zielinski, On the Generalization Mystery in Deep Learning, 2022, https://arxiv.org/abs/2203.10036.
        Of the standard error: Efron, Nonparametric Estimates of Standard Error, Biometrika 68, 1981.

    Examples:
        >>> import numpy as np, cg_jax as cg
        >>> def loss_fn(w, x):
        ...     return 0.5 * (w - x) ** 2
        >>> result = cg.measure_coherence(loss_fn, 0.0, np.array([1.0, 4.0, 7.0], np.float32), batch_size=2)
        >>> print(f"α = {result.alpha:.4f} over {result.count} examples")
        α = 0.7273 over 3 examples
    """
    batch_size = _validate.at_least("batch_size", batch_size, 1)
    _validate.function("loss_fn", loss_fn)
    _validate.parameters(params)
    _validate.one_of("method", method, METHODS)
    _validate.one_of("estimator", estimator, ESTIMATORS)
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    _check_confidence(confidence, estimator, data)
    layout = None if mesh is None else Layout.of(mesh, data_axis, params)
    if layout is not None:
        params = layout.place(params)
        if estimator == "batch":
            _validate.divides("the data axis", layout.num_shards, "batch_size", batch_size)
    how = Estimator(estimator, loss_fn, method, batch_size, nonfinite != "propagate", seed)
    read = functools.partial(batches_of, data, batch_size, layout, whole=not how.by_example)
    run, batches = _Run(how, layout, params, nonfinite, confidence), read()
    with layout.active() if layout else contextlib.nullcontext(), _bar(progress, batches.number) as bar:
        sums, skipped, by_batch = run.add_all(batches, bar)
        found, sums = _finish(how, layout, sums, skipped)
        if confidence:
            found = dataclasses.replace(found, alpha_stderr=run.stderr(read(), found, sums, by_batch))
    return found
