"""Coherence of a whole data set: batches of one shape are streamed through one compiled step, on a device or a mesh."""

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cg_jax import _compat, _validate
from cg_jax._compiled import Programs, programs_of
from cg_jax._data import checked, is_arrays
from cg_jax._loss import LossFn
from cg_jax.batches import batches_of
from cg_jax.estimators import ESTIMATORS, Estimator, Inputs, Sums
from cg_jax.layout import Layout, as_auto, auto_context
from cg_jax.metrics import Coherence
from cg_jax.statistics import METHODS
from cg_jax.stream import Run

PyTree = Any

NONFINITE = ("raise", "skip", "propagate")


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


@contextlib.contextmanager
def _note_on_lists(data: Any) -> Iterator[None]:
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


def _check_mesh(mesh: Any, data_axis: str | None) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"Expected mesh to be a jax.sharding.Mesh or None, got {type(mesh).__name__}; jax.make_mesh makes one."
        )
    if data_axis is not None and (mesh is None or not isinstance(data_axis, str)):
        what = "with mesh" if mesh is None else "to be the name of one axis"
        raise ValueError(f"Expected data_axis {what}, got data_axis={data_axis!r}.")


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
        estimator: "exact"; or one that needs no per-example gradients, for losses that the engine is not for:
            "signs", Q ≈ Σ_b ‖Σᵢ εᵢ gᵢ‖² with random signs εᵢ = ±1, one term for each batch on each device, the mean of
            two draws: three ordinary backward passes. Its sums over a batch are in the dtype of the model: for float16
            and narrower ones take "exact".
            "batch", from mean gradients of disjoint batches of k = batch_size, for losses that see the whole batch
            (BatchNorm in training): α = c α_W / (1 − α_W (1 − c)), c = (m − k)/(k (m − 1)), with α_W that of the mean
            gradients. Batches must be random: shuffle data that comes in order of class. Those that are not whole are
            left out and counted in num_skipped; m is what was used. Every batch ends in an all-reduce. One batch alone:
            α is NaN.
        confidence: Estimator "exact": give alpha_stderr, the infinitesimal jackknife's standard error of α over new
            samples of m examples, by one more pass over the data (arrays or a list). It is about the mean α of such
            samples, which is above the population's by (1 − α)/m: see alpha_unbiased. Near the orthogonal limit, below
            α of about 10/m, it is too large (up to twice). Estimators "signs" and "batch" always give alpha_stderr, of
            the estimate around the exact α of the same examples: of "signs" by the draws of signs; of "batch" by how
            far pairs of batches are apart (NaN below 4 batches), too large where norms differ much between examples.
            Both are rough where they follow from few batches. NaN too where squares of squared norms leave the range of
            the dtype.
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
        ValueError: batch_size < 1, unknown method, estimator or nonfinite, empty data, leading axes that disagree, a
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
    _validate.one_of("method", method, METHODS)
    _validate.one_of("estimator", estimator, ESTIMATORS)
    seed = _validate.at_least("seed", seed, 0) % 2**32
    _validate.one_of("nonfinite", nonfinite, NONFINITE)
    _check_mesh(mesh, data_axis)
    data = checked(params, data)
    _check_confidence(confidence, estimator, data)
    _check_outside(params, state, data)
    layout = None if mesh is None else _layout(mesh, data_axis, params, state)
    axis = layout.axis if layout is not None and estimator != "batch" else None
    # Where only the shapes of batches matter, programs do not depend on batch_size.
    k = batch_size if estimator == "batch" else 0
    how = Estimator(estimator, method, k, nonfinite != "propagate", axis, has_aux)
    programs = programs_of(loss_fn)
    # Data on the host is moved because it was asked for: transfer guards are about what was not.
    with auto_context(), jax.transfer_guard("allow"):
        inputs = Inputs(params, state, jnp.asarray(seed, jnp.uint32))
        found, sums = _measured(programs, how, layout, inputs, data, batch_size, nonfinite, confidence, progress)
    _warn_of_zeros(found, sums)
    return found


def _layout(mesh: Mesh, data_axis: str | None, params: PyTree, state: PyTree) -> Layout:
    """The layout of parameters and state; sums are like the parameters alone."""
    kept = Layout.of(mesh, data_axis, params).kept
    return dataclasses.replace(Layout.of(mesh, data_axis, (params, state)), kept=kept)


def _warn_of_zeros(found: Coherence, sums: Sums) -> None:
    squares = jax.tree.leaves(sums.moments.sum_sq_norms)
    count, mean, *squares = jax.device_get((found.count, found.mean_grad_norm, *squares))
    if count > 0 and not any((mean, *squares)):  # random signs may cancel
        warnings.warn(
            f"Expected some gradient other than zero, got {count} that are zero or so small that their squares are, so "
            "that the coherence is NaN; measure a loss that can be differentiated (cross-entropy, not accuracy).",
            stacklevel=3,
        )


def _measured(
    programs: Programs,
    how: Estimator,
    layout: Layout | None,
    inputs: Inputs,
    data: Any,
    batch_size: int,
    nonfinite: str,
    confidence: bool,
    progress: bool,
) -> tuple[Coherence, Sums]:
    """(the coherence, the sums that it follows from), arguments checked."""
    params, state = inputs.params, inputs.state
    if layout is None:
        params, state, data = as_auto(params), as_auto(state), as_auto(data) if is_arrays(data) else data
    else:
        params, state = layout.place((params, state))
        if not how.by_example:
            _validate.divides("the data axis", layout.num_shards, "batch_size", batch_size)
    read = functools.partial(batches_of, data, batch_size, layout, whole=not how.by_example)
    inputs = inputs._replace(params=params, state=state)
    run, batches = Run(programs, how, layout, inputs, nonfinite, confidence), read()
    with _bar(progress, batches.number) as bar:
        with _note_on_lists(data):
            sums, skipped, by_batch = run.add_all(batches, bar)
        found, sums = run.finish(sums, skipped)
        if confidence:
            found = dataclasses.replace(found, alpha_stderr=run.stderr(read(), found, sums, by_batch))
    return found, sums
