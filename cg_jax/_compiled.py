"""Programs that are compiled once for each loss and freed with it.

`jax.jit` keeps its static arguments, and everything they capture, forever. So the loss is not a static argument here.
A table maps the identity of the loss to its programs. Table and programs refer to the loss weakly. The loss needs no
hash and no equality.
"""

import contextlib
import dataclasses
import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cg_jax import _compat

# After this many losses with the same code and shapes, the caller probably creates a new loss for each call.
_MANY = 8
# The number of items that `_kind` inspects in a captured list.
_FEW = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """A loss and the programs compiled for it."""

    loss_fn: Callable[..., Any]
    recall: Callable[[], Callable[..., Any]]  # returns the loss; programs hold no reference to it
    compiled: dict[Any, Any]


# The ids of a loss's parts → (weak references to them, its programs).
_TABLE: dict[tuple[int, ...], tuple[tuple[weakref.ref[Any], ...], dict[Any, Any]]] = {}


def programs_of(loss_fn: Callable[..., Any]) -> Programs:
    """The programs of a loss. If the loss takes no weak reference, only the caller holds its programs."""
    parts = _parts(loss_fn)
    key = tuple(map(id, parts))
    if key not in _TABLE:
        try:
            refs = tuple(weakref.ref(part, functools.partial(_forget, key)) for part in parts)
        except TypeError:
            return Programs(loss_fn, lambda: loss_fn, {})
        _TABLE.setdefault(key, (refs, {}))
    refs, compiled = _TABLE[key]
    return Programs(loss_fn, functools.partial(_recall, refs), compiled)


def _parts(loss_fn: Callable[..., Any]) -> tuple[Any, ...]:
    """The objects that identify a loss: of a bound method, which is new at every access, its function and owner."""
    if isinstance(loss_fn, types.MethodType) or type(loss_fn).__name__ == "BoundMethod":  # Equinox has its own
        function, owner = (getattr(loss_fn, name, None) for name in ("__func__", "__self__"))
        if function is not None and owner is not None:
            return function, owner
    return (loss_fn,)


def _recall(refs: tuple[weakref.ref[Any], ...]) -> Callable[..., Any]:
    parts: list[Any] = [ref() for ref in refs]
    return types.MethodType(*parts) if len(parts) == 2 else parts[0]


def _forget(key: tuple[int, ...], _: Any, table: dict[tuple[int, ...], Any] = _TABLE) -> None:
    table.pop(key, None)


# Incremented whenever all compiled programs become invalid.
_epoch = 0


def outdate() -> None:
    """Invalidate all compiled programs, because the rules they were compiled with have changed."""
    global _epoch
    _epoch += 1


class Compiled:
    """The jitted body(loss_fn, *static, *arrays). Call it with the `Programs` of a loss instead of the loss.

    `taker` is the name of a public function. If given, warn when many losses with the same code are compiled for it.
    """

    def __init__(self, body: Callable[..., Any], static: int, donate: tuple[int, ...] = (), taker: str = "") -> None:
        self.body, self.static, self.donate, self.taker = body, static, donate, taker

    def __call__(self, programs: Programs, *arguments: Any) -> Any:
        program = self._program(programs, arguments)
        return program(*arguments[self.static :])

    def lower(self, programs: Programs, *arguments: Any) -> Any:
        """As `jax.stages.Wrapped.lower`."""
        return self._program(programs, arguments).lower(*arguments[self.static :])

    def _program(self, programs: Programs, arguments: tuple[Any, ...]) -> Any:
        static, arrays = arguments[: self.static], arguments[self.static :]
        key = (self, static, _epoch)
        if key not in programs.compiled:
            body, recall = self.body, programs.recall

            def on_arrays(*arrays: Any) -> Any:
                return body(recall(), *static, *arrays)

            on_arrays.__name__ = on_arrays.__qualname__ = body.__name__
            is_new = all(compiled is not self for compiled, *_ in programs.compiled)
            for outdated in [each for each in programs.compiled if each[0] is self and each[2] != _epoch]:
                del programs.compiled[outdated]
            programs.compiled[key] = jax.jit(on_arrays, donate_argnums=tuple(i - self.static - 1 for i in self.donate))
            if self.taker and is_new:
                _count(self.taker, programs.loss_fn, arrays)
            elif self.taker and not any(map(_compat.is_tracer, jax.tree.leaves(arrays))):
                self._count_options(programs, static)
        return programs.compiled[key]

    def _count_options(self, programs: Programs, static: tuple[Any, ...]) -> None:
        """Warn once if many functions with the same code, such as new lambdas, were passed beside one loss."""
        options = [value for value in jax.tree.leaves(static) if isinstance(value, types.FunctionType)]
        others = [
            value for compiled, each, _ in programs.compiled if compiled is self for value in jax.tree.leaves(each)
        ]
        for option in options:
            code = option.__code__
            if sum(isinstance(each, types.FunctionType) and each.__code__ is code for each in others) == _MANY:
                warnings.warn(
                    f"Expected the same function object at every call, got {_MANY} of the same code, for each of which "
                    f"{self.taker} compiled anew: {code.co_qualname}, {code.co_filename}:{code.co_firstlineno}; define "
                    "it once.",
                    stacklevel=2,
                )


def compiled(static: int, donate: tuple[int, ...] = (), taker: str = "") -> Callable[[Callable[..., Any]], Compiled]:
    """A decorator: see `Compiled`. `static` arguments follow the loss; `donate` counts from the loss on."""
    return lambda body: Compiled(body, static, donate, taker)


# Code of a loss → (public function, captured values, shapes) → the number of losses compiled with that code.
_COUNTS: weakref.WeakKeyDictionary[types.CodeType, dict[Any, int]] = weakref.WeakKeyDictionary()


def _count(taker: str, loss_fn: Callable[..., Any], arrays: Any) -> None:
    """Warn once if many losses share one code. Inside the user's own jit nothing is compiled for them."""
    leaves, code = jax.tree.leaves(arrays), _code(loss_fn)
    if code is None or any(map(_compat.is_tracer, leaves)):
        return
    counts = _COUNTS.setdefault(code, {})
    shapes = tuple((np.shape(leaf), str(jax.numpy.result_type(leaf))) for leaf in leaves)
    key = (taker, _kind(loss_fn), shapes)
    counts[key] = counts.get(key, 0) + 1
    if counts[key] == _MANY:
        warnings.warn(
            f"Expected the same loss_fn object at every call, got {_MANY} of the same code and shapes, each of which "
            f"{taker} compiled anew: {code.co_qualname}, {code.co_filename}:{code.co_firstlineno}; define loss_fn "
            "once, and pass what changes between calls in params, batch or state.",
            stacklevel=2,
        )


def _unwrapped(loss_fn: Any) -> Any:
    """The function that a loss calls, without its wrappers."""
    for _ in range(_MANY):
        wrapped = (getattr(loss_fn, name, None) for name in ("__func__", "__wrapped__"))
        inner = loss_fn.func if isinstance(loss_fn, functools.partial) else next(filter(callable, wrapped), None)
        if inner is None:
            break
        loss_fn = inner
    return loss_fn if isinstance(loss_fn, types.FunctionType) else type(loss_fn).__call__


def _code(loss_fn: Any) -> types.CodeType | None:
    """The code of a loss, or None if it is not known."""
    return getattr(_unwrapped(loss_fn), "__code__", None)


def _kind(value: Any, depth: int = 4) -> Any:
    """A key that distinguishes losses with the same code: the functions, names and types that they capture.

    Arrays and numbers do not count. They are data, which a loss should receive as arguments.
    """
    if isinstance(value, str | bool) or depth == 0:
        return value if isinstance(value, str | bool) else None
    if isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else value
        return tuple(_kind(item, depth - 1) for item in itertools.islice(items, _FEW))
    if not callable(value):
        return type(value).__qualname__
    captured = value.args if isinstance(value, functools.partial) else ()
    for cell in getattr(_unwrapped(value), "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            captured += (cell.cell_contents,)
    return (type(value).__qualname__, hash(_code(value)), *(_kind(each, depth - 1) for each in captured))
