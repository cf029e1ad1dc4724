"""Coherence of a whole data set: batches of one shape are streamed through one compiled step, on a device or a mesh."""

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
from cg_jax.batches import batches_of
from cg_jax.estimators import Estimator, estimator_of
from cg_jax.metrics import Coherence
from cg_jax.moments import GradMoments
from cg_jax.sharding import layout_of
from cg_jax.sharding.explicit_axes import auto_context
from cg_jax.stream import Inputs, Measurement, Setup

PyTree = Any

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
    """Beside an error of a loss that was given items of a list, what a list means."""
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

    The exact result does not depend on batch_size or mesh but for rounding. One program is compiled for each (loss_fn,
    shapes, mesh): pass the same function object again, for a fresh lambda compiles again.

    On a mesh every device adds up the sums of its own examples, and one all-reduce of the size of the parameters ends
    the measurement, whatever m is. Parameters stay as they lie: divided over another axis (tensor parallel) they are
    never gathered, and the compiler divides the work; divided over the data axis (FSDP) they are gathered and their
    sums scattered for every batch, which moves twice their size for each.

    Args:
        loss_fn: As for `grad_moments`; for estimator "batch", loss_fn(params, batch) → the mean loss of a batch.
        params: Any pytree of arrays; integer leaves are held fixed.
        data: A pytree (tuple, dict, …) of host or device arrays that share a leading axis m, any m; or an iterable (a
            list, a generator, a loader) of batches, each such a pytree of at most batch_size rows. What NumPy can read
            (tensors of PyTorch and TensorFlow) is converted; a file that is read by slicing stays one. Of several
            processes each gives its own part of the data, any m ≥ 1: arrays on the host, or its share of every batch,
            at most batch_size / num_processes rows. An iterable then costs one small exchange between processes for
            each batch.
            All other arguments are the same in every process. An error that one process meets in its data is raised in
            all; one that it meets elsewhere ends the others when it ends.
        state: What loss_fn takes as its third argument and what is not differentiated, such as running averages: any
            pytree of arrays, the same for all examples. New values compile nothing again, as new values that loss_fn
            closes over would.
        has_aux: loss_fn returns (loss, aux), as for `jax.value_and_grad`; aux is dropped.
        batch_size: Examples in one batch, over all devices, at most: arrays of fewer make one batch of their own size.
            A shorter batch is padded by repeating a row, and the padding is masked; those of an iterable to the first
            of them, and to a larger one when it comes (each size is compiled).
        mesh: Divide the examples over a `jax.sharding.Mesh`, of one process or of all, its axes Auto or Explicit.
        data_axis: The one axis of the mesh that examples are divided over; without it its only axis, or "data".
        method: "ghost", or "vmap" for the plain reference; of estimator "exact".
        estimator: "exact", or an estimator that needs no per-example gradients, for losses that the engine is not for:
            "signs" by random signs, three ordinary backward passes; "batch" from mean gradients of disjoint batches of
            batch_size, for losses that see the whole batch (BatchNorm in training). Or an object with its options
            inside: `Exact`, `Signs`, `Batch`, whose docstrings have the formulas, or an `Estimator` of your own.
        confidence: Estimator "exact": give alpha_stderr, the infinitesimal jackknife's standard error of α over new
            samples of m examples, by one more pass over the data (arrays or a list). It is about the mean α of such
            samples, which is above the population's by (1 − α)/m: see alpha_unbiased. Near the orthogonal limit, below
            α of about 10/m, it is too large (up to twice). "signs" and "batch" always give alpha_stderr, of the
            estimate around the exact α of the same examples; rough where it follows from few batches. NaN where squares
            of squared norms leave the range of the dtype.
        nonfinite: What a loss or gradient that is not finite does, or one whose squared norm is not (a norm above
            1.8e19 in float32). "raise": FloatingPointError with how many and the
            first index. "skip": the example is left out and counted in num_skipped ("signs", "batch": its whole
            batch). "propagate": the result is NaN.
        seed: Of the random signs, ≥ 0.
        progress: Draw a bar (needs tqdm).

    Returns:
        A `Coherence`; its scalars are arrays on the device, an alpha_stderr that was not asked for a NaN of NumPy's. A
        UserWarning, and NaN, where all gradients are zero.

    Raises:
        ValueError: batch_size < 1, unknown method, estimator or nonfinite, an option beside an estimator object, empty
            data, leading axes that disagree, a
            batch larger than batch_size, data_axis that is none of the mesh or without one, estimator "batch" with a
            batch_size that the devices do not divide, confidence with another estimator than "exact", a loss that does
            not depend on params, or processes that do not agree on batch_size or on what a row of data is.
        TypeError: loss_fn is no function or does not return a real scalar; a leaf of params is complex, no array or
            state of a model; data is no pytree of arrays of numbers and cannot be iterated, or cannot be iterated twice
            where it has to be, or is a list of arrays of several kinds, which are no batches; mesh is none; or this is
            called inside jit or shard_map, where `coherence` of `grad_moments` is for.
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
    params = _validate.parameters(params, shapes=False)
    options = {"method": (method, "ghost"), "confidence": (confidence, False), "seed": (seed, 0)}
    chosen = estimator_of(estimator, options)
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    layout = layout_of(mesh, data_axis, params, state)
    data = checked(params, data)
    if chosen.revisits:
        _check_read_twice(data)
    _check_outside(params, state, data)
    # Data on the host is moved because it was asked for: transfer guards are about what was not.
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
