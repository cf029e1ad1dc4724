"""Coherence of a data set, streamed in batches through one compiled step, on one device or a mesh."""

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Generator, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from cg_jax import _compat, _validate
from cg_jax._compiled import programs_of
from cg_jax._data import checked, is_arrays
from cg_jax._loss import LossFn
from cg_jax._types import PyTree
from cg_jax.batches import batches_of
from cg_jax.estimators import Estimator, estimator_of
from cg_jax.gradients import METHODS
from cg_jax.metrics import Coherence
from cg_jax.moments import GradMoments
from cg_jax.sharding import layout_of
from cg_jax.sharding.explicit_axes import auto_context
from cg_jax.stream import Inputs, Measurement, Setup

NONFINITE = ("raise", "skip", "propagate")


@contextlib.contextmanager
def _bar(progress: bool, total: int | None) -> Generator[Any]:
    """A progress bar over batches, or a no-op."""
    if not progress:
        yield types.SimpleNamespace(update=lambda: None)
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True draws its bar with tqdm: pip install tqdm.") from None
    with tqdm(total=total, desc="coherence", unit="batch", leave=False) as bar:
        yield bar


def _check_read_twice(data: Any) -> None:
    if not (is_arrays(data) or isinstance(data, list)):
        raise TypeError(
            "Expected data to be arrays or a list of batches with confidence=True, which reads it twice, got "
            f"{type(data).__name__}."
        )


@contextlib.contextmanager
def _note_on_lists(data: Any) -> Generator[None]:
    """Add a note about lists to an error of a loss that received items of a list."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(data, list):
            error.add_note(
                "data is a list, so that each of its items was taken as a batch; stack examples into arrays, and give "
                "arrays that share their leading axis as a tuple, (X, Y)."
            )
        raise


def _check_outside(params: PyTree, state: PyTree, data: Any) -> None:
    leaves = jax.tree.leaves((params, state, data if is_arrays(data) else None))
    if any(_compat.is_tracer(leaf) for leaf in leaves):
        raise TypeError(
            "Expected measure_coherence outside of jit, vmap and shard_map, got traced arrays: it is a loop over "
            "compiled programs. Inside, take coherence(grad_moments(loss_fn)(params, batch))."
        )


def measure_coherence(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree | Iterable[PyTree],
    *,
    batch_size: int,
    state: PyTree = None,
    has_aux: bool = False,
    mesh: Mesh | None = None,
    data_axis: str | None = None,
    method: str = "ghost",
    estimator: str | Estimator = "exact",
    confidence: bool = False,
    nonfinite: str = "raise",
    seed: int = 0,
    progress: bool = False,
) -> Coherence:
    """Coherence α = ‖Σ gᵢ‖² / (m Σ ‖gᵢ‖²) of all m examples of `data` at `params`, streamed in batches.

    The exact result does not depend on batch_size or mesh, except for rounding. One program is compiled for each
    (loss_fn, shapes, mesh). Pass the same function object each time, since a new lambda compiles again.

    On a mesh, every device accumulates the sums of its own examples. One all-reduce of the size of the parameters ends
    the measurement, for any m. Parameters keep their sharding. Sharded over another axis (tensor parallel), they are
    never gathered, and the compiler divides the work. Sharded over the data axis (FSDP), they are gathered and their
    sums scattered for every batch, which moves twice their size each time.

    Args:
        loss_fn: As for `grad_moments`. For estimator "batch", loss_fn(params, batch) → the mean loss of a batch.
        params: Any pytree of arrays. Integer leaves are held fixed.
        data: A pytree (tuple, dict, …) of host or device arrays that share a leading axis m, any m. Or an iterable (a
            list, a generator, a loader) of batches, each such a pytree of at most batch_size rows. Leaves that NumPy
            can read (tensors of PyTorch and TensorFlow) are converted. Files that are read by slicing stay files. With
            several processes, each gives its own part of the data, any m ≥ 1: arrays on the host, or its share of every
            batch, at most batch_size / num_processes rows. An iterable then costs one small exchange between processes
            for each batch. All other arguments must be the same in every process. An error in the data of one process
            is raised in all processes. After any other error, the other processes end when that process ends.
        state: The third argument of loss_fn, which is not differentiated, such as running averages. Any pytree of
            arrays, the same for all examples. New values do not recompile. New values that loss_fn closes over would.
        has_aux: loss_fn returns (loss, aux), as for `jax.value_and_grad`. aux is dropped.
        batch_size: The maximum number of examples in one batch, over all devices. Smaller arrays form one batch of
            their own size. A shorter batch is padded by repeating a row, and the padding is masked. Batches of an
            iterable are padded to the size of the first, and to a larger size when one comes (each size is compiled).
        mesh: Shard the examples over a `jax.sharding.Mesh`, of one process or of all, with Auto or Explicit axes.
        data_axis: The axis of the mesh that examples are sharded over. By default its only axis, or "data".
        method: "ghost", or "vmap" for the plain reference. For estimator "exact".
        estimator: "exact", or an estimator without per-example gradients, for losses that do not suit the engine:
            "signs" uses random signs and three ordinary backward passes. "batch" uses mean gradients of disjoint
            batches of batch_size, for losses of a whole batch (BatchNorm in training). Or an object that holds its
            options: `Exact`, `Signs`, `Batch`, whose docstrings have the formulas, or your own `Estimator`.
        confidence: For estimator "exact": compute alpha_stderr, the infinitesimal jackknife's standard error of α over
            new samples of m examples, by one more pass over the data (arrays or a list). It refers to the mean α of
            such samples, which exceeds the population's α by (1 − α)/m: see alpha_unbiased. Near the orthogonal limit,
            for α below about 10/m, it is too large (by up to a factor of 2). "signs" and "batch" always give
            alpha_stderr, the error of the estimate around the exact α of the same examples. It is rough if it follows
            from few batches, and NaN if squares of squared norms leave the range of the dtype.
        nonfinite: The action for a non-finite loss, gradient or squared norm (a norm above 1.8e19 in float32).
            "raise": FloatingPointError with the number and the first index. "skip": skip the example and count it in
            num_skipped ("signs", "batch": the whole batch). "propagate": the result is NaN.
        seed: Seed of the random signs, ≥ 0.
        progress: Draw a progress bar (needs tqdm).

    Returns:
        A `Coherence`. Its scalars are arrays on the device. An alpha_stderr that was not requested is a NumPy NaN. If
        all gradients are zero, the result is NaN with a UserWarning.

    Raises:
        ValueError: batch_size < 1, unknown method, estimator or nonfinite, an option beside an estimator object, empty
            data, leading axes that disagree, a batch larger than batch_size, a data_axis that is not an axis of the
            mesh or is given without a mesh, estimator "batch" with a batch_size that is not a multiple of the devices,
            confidence with an estimator other than "exact", a loss that does not depend on params, or processes that
            disagree on batch_size or on the kind of a row of data.
        TypeError: loss_fn is not a function or does not return a real scalar. A leaf of params is complex, not an array
            or model state. data is not a pytree of arrays of numbers and cannot be iterated, cannot be iterated twice
            if that is needed, or is a list of arrays of different kinds instead of batches. mesh is not a mesh. The
            call is inside jit or shard_map: use `coherence` of `grad_moments` there.
        FloatingPointError: With nonfinite="raise".

    References:
        Chatterjee & Zielinski, On the Generalization Mystery in Deep Learning, 2022, https://arxiv.org/abs/2203.10036.
        For the standard error: Efron, Nonparametric Estimates of Standard Error, Biometrika 68, 1981.

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
    params = _validate.parameters(params, shapes=False)
    _validate.one_of("method", method, METHODS)
    seed = _validate.at_least("seed", seed, 0)
    options = {"method": (method, "ghost"), "confidence": (confidence, False), "seed": (seed, 0)}
    chosen = estimator_of(estimator, options)
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    layout = layout_of(mesh, data_axis, params, state)
    data = checked(params, data)
    if chosen.revisits:
        _check_read_twice(data)
    _check_outside(params, state, data)
    # The user asked to move data from the host. Transfer guards are for implicit transfers.
    with auto_context(), jax.transfer_guard("allow"):
        compiled_for, arrays = chosen.split()
        setup = Setup(compiled_for, layout, nonfinite != "propagate", has_aux)
        params, state = layout.place((params, state))
        inputs = Inputs(params, state, arrays)
        measurement = Measurement(programs_of(loss_fn), setup, inputs, nonfinite, chosen.revisits)
        measured, moments = _measured(measurement, data, batch_size, progress)
    _warn_of_zeros(measured, moments)
    return measured


def _warn_of_zeros(measured: Coherence, moments: GradMoments) -> None:
    squares = jax.tree.leaves(moments.sum_sq_norms)
    count, mean, *squares = jax.device_get((measured.count, measured.mean_grad_norm, *squares))
    if count > 0 and not mean and not any(square > 0 for square in squares):  # random signs may cancel
        warnings.warn(
            f"Expected some gradient other than zero, got {count} that are zero or so small that their squares are, so "
            "that the coherence is NaN; measure a loss that can be differentiated (cross-entropy, not accuracy).",
            stacklevel=3,
        )


def _measured(measurement: Measurement, data: Any, batch_size: int, progress: bool) -> tuple[Coherence, GradMoments]:
    """(the coherence, the moments that it follows from), arguments checked."""
    by_example, layout = measurement.setup.estimator.by_example, measurement.setup.layout
    if not by_example:
        _validate.divides("the data axis", layout.num_shards, "batch_size", batch_size)
    read = functools.partial(batches_of, data, batch_size, layout, whole=not by_example)
    batches = read()
    with _bar(progress, batches.number) as bar:
        with _note_on_lists(data):
            state, skipped, by_batch = measurement.add_all(batches, bar)
        measured, moments = measurement.finish(state, skipped)
        if measurement.revisits:
            stderr = measurement.stderr(read(), measured, moments, by_batch)
            measured = dataclasses.replace(measured, alpha_stderr=stderr)
    return measured, moments
