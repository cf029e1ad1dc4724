"""The one module that touches JAX's internals, or looks up what changes between its releases."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray, Tracer
from jax.extend import core
from jax.sharding import AxisType

# Calls whose body may be evaluated in place without changing what differentiation gives. custom_jvp and custom_vjp
# calls are not among them: their rules must be respected.
_INLINABLE = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
# Primitives that surely have a reverse mode, so that it need not be tried.
_DIFFERENTIABLE = frozenset(
    {"add", "add_any", "concatenate", "conv_general_dilated", "div", "dot_general", "gather", "max", "min", "mul"}
    | {"select_n", "sub"}
)
_REMATERIALISED = frozenset({"checkpoint", "remat", "remat2"})


class Body(NamedTuple):
    """The body of a scan or of a checkpoint: f(constants, carry, slices) → (carry, slices)."""

    jaxpr: Any
    consts: Sequence[Any]
    num_consts: int
    num_carry: int
    length: int | None  # None: a checkpoint, which runs once and has constants only

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(constants, what begins the carry, slices) of the operands."""
        end = self.num_consts + self.num_carry
        return list(operands[: self.num_consts]), list(operands[self.num_consts : end]), list(operands[end:])


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a constant written into it."""
    return isinstance(atom, core.Literal)


def _closed(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(open jaxpr, its constants) of an open or a closed jaxpr."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def inner_jaxpr(eqn: Any, checkpoints: bool) -> tuple[Any, Sequence[Any]] | None:
    """(body, constants) of a call that may be evaluated in place, of a checkpoint if so asked; else None."""
    key = _INLINABLE.get(eqn.primitive.name)
    if checkpoints and is_checkpoint(eqn):
        key = "jaxpr"
    return None if key is None else _closed(eqn.params[key])


def is_checkpoint(eqn: Any) -> bool:
    """Whether an equation is a `jax.checkpoint`."""
    return eqn.primitive.name in _REMATERIALISED and not eqn.params.get("differentiated")


def _scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many begin the carry."""
    if "ft_in" in eqn.params:  # newer JAX: operands in groups
        consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
        return len(list(consts)), len(list(carry))
    return eqn.params["num_consts"], eqn.params["num_carry"]


def carry_of(eqn: Any) -> range:
    """The positions of the operands that begin a scan's carry."""
    num_consts, num_carry = _scan_counts(eqn)
    return range(num_consts, num_consts + num_carry)


def body_of(eqn: Any) -> Body | None:
    """The body of a scan or a checkpoint, else None."""
    if eqn.primitive.name == "scan":
        return Body(*_closed(eqn.params["jaxpr"]), *_scan_counts(eqn), eqn.params["length"])
    if is_checkpoint(eqn):
        return Body(*_closed(eqn.params["jaxpr"]), len(eqn.invars), 0, None)
    return None


def checkpoint_like(eqn: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, rematerialised in the way that the checkpoint `eqn` was."""
    return jax.checkpoint(f, prevent_cse=eqn.params.get("prevent_cse", True), policy=eqn.params.get("policy"))


def checkpoint_in(jaxpr: Any) -> Any:
    """The first checkpoint among the equations of a jaxpr and of the calls in it, or None."""
    for eqn in jaxpr.eqns:
        inner = inner_jaxpr(eqn, checkpoints=False)
        found = eqn if is_checkpoint(eqn) else checkpoint_in(inner[0]) if inner else None
        if found is not None:
            return found
    return None


def scan_of_checkpoints(eqn: Any, checkpoint: Any, operands: Sequence[Any]) -> list[Any]:
    """A scan, every step of it rematerialised in the way that `checkpoint` was; its outputs as a list."""
    call = body_of(eqn)
    assert call is not None
    consts, init, slices = call.split(operands)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(call.jaxpr, call.consts))

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = checkpoint_like(checkpoint, run)(*consts, *carry, *row)
        return list(outs[: call.num_carry]), list(outs[call.num_carry :])

    again = {name: eqn.params[name] for name in ("reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, init, slices, call.length, **again)
    return [*carry, *stacked]


def bind(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Evaluate one equation on `operands`, some of its parameters changed; its outputs as a list."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **(eqn.primitive.get_bind_params(eqn.params) | changed))
    return list(out) if eqn.primitive.multiple_results else [out]


def source_of(eqn: Any) -> str:
    """The user's file and line that made an equation, or the empty string."""
    try:
        from jax._src import source_info_util

        return source_info_util.summarize(eqn.source_info)
    except (ImportError, AttributeError):
        return ""


def keep_source(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """While it is open, new equations are said to come from the user's line that made `eqn`."""
    try:
        from jax._src import source_info_util

        return source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack)
    except (ImportError, AttributeError, TypeError):
        return contextlib.nullcontext()


def _inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""

    def is_jaxpr(value: Any) -> bool:
        return isinstance(value, core.ClosedJaxpr | core.Jaxpr)

    return [leaf for leaf in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(leaf)]


def _primitives(jaxpr: Any) -> Iterator[str]:
    """The names of the primitives of a jaxpr, those of its inner jaxprs too."""
    for eqn in _closed(jaxpr)[0].eqns:
        yield from _primitives_of(eqn)


def _primitives_of(eqn: Any) -> Iterator[str]:
    """The name of an equation's primitive, and those of its inner jaxprs."""
    yield eqn.primitive.name
    for inner in _inner_jaxprs(eqn):
        yield from _primitives(inner)


def operations(eqn: Any) -> int:
    """About how many multiplications and additions an equation takes: products are counted, all else by its results."""
    inner = _inner_jaxprs(eqn)
    if inner:
        repeats = eqn.params.get("length") or 1 if eqn.primitive.name == "scan" else 1
        return repeats * sum(operations(each) for jaxpr in inner for each in _closed(jaxpr)[0].eqns)
    made = sum(out.aval.size for out in eqn.outvars if hasattr(out.aval, "size"))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * made * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return 2 * made * kernel.size // max(1, kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]])
    return made


def holds_jaxprs(eqn: Any) -> bool:
    """Whether an equation is a loop, a branch or a call with a rule of its own."""
    return bool(_inner_jaxprs(eqn))


def holds(eqn: Any, name: str) -> bool:
    """Whether a primitive of that name stands in an inner jaxpr of an equation."""
    return name in list(_primitives_of(eqn))[1:]


def has_custom_vjp(eqn: Any) -> bool:
    """Whether a custom_vjp decides what an equation's cotangents are: they need not be linear in the output's."""
    return any(name.startswith("custom_vjp") for name in _primitives_of(eqn))


def has_custom_rule(eqn: Any) -> bool:
    """Whether an equation holds a custom_jvp or custom_vjp, whose rule may ask which operands are differentiated."""
    return any(name.startswith(("custom_jvp", "custom_vjp")) for name in _primitives_of(eqn))


def has_forward_mode(f: Any, primals: Any, tangents: Any) -> bool:
    """Whether `jax.jvp` can do f(*primals). It refuses a custom_vjp: at once, or in a jit only when it is compiled."""
    try:
        jaxpr = jax.make_jaxpr(lambda p, t: jax.jvp(f, p, t)[1])(primals, tangents)
    except TypeError as error:
        if "custom_vjp" in str(error):
            return False
        raise
    return "custom_lin" not in _primitives(jaxpr)


def has_reverse_mode(eqn: Any, positions: Sequence[int]) -> bool:
    """Whether JAX can differentiate one equation, in reverse mode, with respect to the operands at `positions`.

    It refuses some primitives (a while loop), which a loss may hold where no gradient passes.
    """
    if eqn.primitive.name in _DIFFERENTIABLE:
        return True

    def gradient(operands: list[Any]) -> Any:
        def outputs(views: list[Any]) -> list[Any]:
            values = list(operands)
            for position, view in zip(positions, views, strict=True):
                values[position] = view
            return [out for out in bind(eqn, values) if jax.numpy.issubdtype(out.dtype, jax.numpy.inexact)]

        outs, pull = jax.vjp(outputs, [operands[position] for position in positions])
        return pull(outs)

    avals = [atom.aval for atom in eqn.invars]
    try:
        jax.eval_shape(gradient, avals)
    except (ValueError, TypeError, NotImplementedError):
        return False
    return True


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes of an enclosing shard_map that any leaf varies over; none where that is not tracked."""
    return frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))


def _varying(value: Any) -> frozenset[str]:
    aval = value if isinstance(value, ShapedArray | jax.ShapeDtypeStruct) else jax.typeof(value)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", None) or frozenset() if kind is None else kind.varying


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Each leaf, made to vary over those of `axes` that it does not vary over yet; the values stay.

    Inside shard_map a gradient with respect to what is the same on all devices is summed over them. One with respect to
    what may differ is not.
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def vary_like(tree: Any, other: Any) -> Any:
    """Each leaf, made to vary over the axes that its like in `other` varies over."""
    return jax.tree.map(lambda leaf, like: vary(leaf, _varying(like)), tree, other)


def transposed(f: Callable[..., Any], shape: Sequence[int], cotangent: Any) -> Any:
    """fᵀ(cotangent) of a linear f of one array of that shape, in the cotangent's dtype, without a sum over devices."""
    (leaf, *_) = jax.tree.leaves(cotangent)
    zeros_in = vary(jax.numpy.zeros(tuple(shape), leaf.dtype), varying_axes(cotangent))
    return jax.vjp(f, zeros_in)[1](cotangent)[0]


def auto_shards(tree: Any) -> int:
    """Over how many devices at most the compiler may divide arrays: those of Auto axes of the mesh that they are on."""
    sizes = [1]
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        kinds = () if mesh is None else zip(mesh.axis_types, mesh.axis_sizes, strict=True)
        sizes.append(math.prod(size for kind, size in kinds if kind == AxisType.Auto))
    return max(sizes)


def zeros(like: Any, leading: tuple[int, ...] = ()) -> Any:
    """Zeros [*leading, *shape] of the dtype of an aval, which vary over the axes that it varies over."""
    return vary(jax.numpy.zeros((*leading, *like.shape), like.dtype), _varying(like))


def all_gather_invarying(tile: Any, axis_name: Any) -> Any:
    """The tiles of all devices one after the other, as a value that is the same on all of them."""
    return jax.lax.all_gather(tile, axis_name, tiled=True, to="invarying")


def bound_axes() -> tuple[str, ...]:
    """The names of the axes of the shard_map, pmap or vmap around, as far as can be told."""
    try:
        from jax._src import core as internal

        return tuple(map(str, internal.trace_ctx.axis_env.axis_names()))
    except (ImportError, AttributeError):
        return ()


def tracked_axes() -> frozenset[str]:
    """The axes of the shard_map around over which JAX keeps track of what varies."""
    return frozenset(axis for axis in bound_axes() if axis in _varying(jax.lax.axis_index(axis)))


def dtypes_in(jaxpr: Any) -> set[Any]:
    """The dtypes of all that the equations of a jaxpr give, those of its inner jaxprs too."""
    jaxpr, found = _closed(jaxpr)[0], set()
    for eqn in jaxpr.eqns:
        found |= {out.aval.dtype for out in eqn.outvars if hasattr(out.aval, "dtype")}
        found = found.union(*map(dtypes_in, _inner_jaxprs(eqn)))
    return found


def cache_size(jitted: Any) -> int:
    """How many compiled programs a jitted function holds."""
    return jitted._cache_size()


def is_tracer(value: Any) -> bool:
    """Whether `value` stands for an array inside a traced function."""
    return isinstance(value, Tracer)


def backend() -> str:
    """The platform that arrays go to when nothing else is said: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()
