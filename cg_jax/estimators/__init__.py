"""Estimators of coherence, by name. Each one is one file."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from cg_jax import _validate
from cg_jax.estimators.base import Estimator, OfRows, Problem
from cg_jax.estimators.batch import Batch
from cg_jax.estimators.exact import Exact
from cg_jax.estimators.signs import Signs

__all__ = ["Batch", "Estimator", "Exact", "OfRows", "Problem", "Signs", "estimator_of", "register_estimator"]

E = TypeVar("E", bound=type[Estimator])

_MISSING = {dataclasses.MISSING}
_BY_NAME: dict[str, type[Estimator]] = {}


def register_estimator(name: str, estimator: E) -> E:
    """Register an `Estimator` class under a name for `measure_coherence(estimator=name)`.

    Args:
        name: A name. It replaces an existing estimator of that name.
        estimator: A frozen dataclass. Each field has a default.

    Returns:
        The class.

    Raises:
        TypeError: estimator is not a subclass of `Estimator`.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"Expected name to be a string that is not empty, got {_validate.shown('name', name)}.")
    if not (isinstance(estimator, type) and issubclass(estimator, Estimator)) or inspect.isabstract(estimator):
        raise TypeError(
            f"Expected estimator to be a subclass of Estimator with its methods, got "
            f"{_validate.shown('estimator', estimator)}."
        )
    options = [field for field in dataclasses.fields(estimator) if field.init]
    required = [field.name for field in options if {field.default, field.default_factory} == _MISSING]
    if required:
        raise TypeError(f"Expected a default of every field of {estimator.__name__}, got none of {required}.")
    _BY_NAME[name] = estimator
    return estimator


register_estimator("exact", Exact)
register_estimator("signs", Signs)
register_estimator("batch", Batch)


def estimator_of(estimator: str | Estimator, options: Mapping[str, tuple[Any, Any]] | None = None) -> Estimator:
    """The estimator of a name and its options, or the estimator object itself.

    Args:
        estimator: A name or an object.
        options: Option → (its value, its default). A name uses the options that are fields of its class.

    Raises:
        ValueError: Unknown name, an option given beside an object, or `confidence` for an estimator without it.
    """
    options = options or {}
    changed = {name: value for name, (value, default) in options.items() if value != default}
    if isinstance(estimator, Estimator):
        if changed:
            given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            raise ValueError(f"Expected options inside estimator={estimator!r}, got {given} beside it.")
        return estimator
    _validate.one_of("estimator", estimator, _BY_NAME, "make an object of it: Exact()")
    fields = {field.name for field in dataclasses.fields(_BY_NAME[estimator])}
    if "confidence" in changed and "confidence" not in fields:
        raise ValueError(
            f"Expected estimator='exact' with confidence=True, got estimator={estimator!r}, which has no such option; "
            "'signs' and 'batch' always give alpha_stderr."
        )
    return _BY_NAME[estimator](**{name: value for name, (value, _) in options.items() if name in fields})
