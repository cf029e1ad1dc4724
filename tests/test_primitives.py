"""The one table of primitives, and rules that are registered for others."""

import ast
import inspect
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import cg_jax as cg
from cg_jax.ghost import primitives
from cg_jax.ghost.primitives import TABLE

GHOST = pathlib.Path(inspect.getfile(cg.ghost)).parent
FLAGS = ("is_elementwise", "is_sum", "is_widened", "is_linear", "is_identity", "rearranges", "is_differentiable")
X = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)


def _strings(node):
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


@pytest.mark.parametrize("path", sorted(GHOST.glob("*.py")), ids=lambda path: path.name)
def test_names_of_primitives_stand_in_the_table_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.Set | ast.Dict | ast.List | ast.Tuple)]
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    split = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "split" in ast.dump(node.func)]
    words = {word for node in (*lists, *compared, *split) for text in _strings(node) for word in text.split()}
    assert words & set(TABLE) == set()


def test_every_primitive_has_one_entry():
    families = [path.stem for path in (GHOST / "primitives").glob("*.py") if path.stem not in ("__init__", "base")]
    names = [name for family in families for name in getattr(primitives, family).ENTRIES]
    assert sorted(names) == sorted(TABLE)
    with pytest.raises(ValueError, match="Expected one entry for each primitive, got a second one for dot_general"):
        primitives.base.add({"dot_general": TABLE["dot_general"]})


@pytest.mark.parametrize("name", TABLE)
def test_entries_are_consistent(name):
    entry = TABLE[name]
    is_call = entry.inlines or entry.is_scan or entry.is_checkpoint or entry.custom
    assert sum(map(bool, (entry.inlines, entry.is_scan, entry.is_checkpoint, entry.custom))) <= 1
    if is_call or entry.passes is False:
        assert not any(getattr(entry, flag) for flag in FLAGS)
        assert entry.rule is entry.pull is None
    assert not entry.of_complex or entry.rule is not None
    assert not entry.is_widened or entry.is_elementwise
    assert not entry.is_sum or (entry.is_linear and entry.is_elementwise)
    assert not entry.rearranges or (entry.pull is not None and entry.is_linear and not entry.is_identity)
    assert not entry.is_copy or entry.is_identity
    assert not entry.is_many or entry.is_identity
    assert not entry.is_differentiable or entry.passes
    # What has one other operand at most, and is done entry by entry, is undone entry by entry.
    assert entry.spread is None or entry.pull is not None or entry.is_identity
    if entry.is_elementwise and (entry.is_widened or entry.is_sum):
        assert entry.pull is not None or entry.is_identity


def test_of_an_unknown_primitive_nothing_is_said():
    entry = primitives.named("no_such_primitive")
    assert entry == primitives.Primitive()
    assert entry.rule is entry.pull is entry.passes is entry.operations is None


def _doubled(x, w):
    return 2 * (x @ w)


@pytest.fixture(scope="module")
def twice():
    """A primitive of the user's own, 2 x W."""
    primitive = Primitive("twice_matmul")
    primitive.def_impl(_doubled)
    primitive.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(_doubled, multiple_results=False))
    ad.defbilinear(primitive, lambda c, x, w: 2 * (c @ w.T), lambda c, x, w: 2 * (x.T @ c))
    batching.primitive_batchers[primitive] = lambda args, dims: (jax.vmap(_doubled, dims)(*args), 0)
    return lambda w, x: jnp.sin(primitive.bind(x, w)).sum() ** 2


def _times(eqn, view):
    t, d = eqn.invars[0].aval.shape
    if view != 1:
        return None
    return cg.Product(lambda x, c: (2 * x[None], c[None]), lambda g: g[0], (1, t, d, eqn.invars[1].aval.shape[1]))


def test_a_rule_for_a_primitive_of_ones_own(twice):
    def rule_of():
        (row,) = cg.explain(twice, W, X[0])
        return row.rule, row.reason

    def norms(method="ghost"):
        return np.asarray(cg.per_example_sq_norms(twice, method=method)(W, X))

    want = norms("vmap")
    assert rule_of() == ("vjp", "no rule for twice_matmul here: its own vjp")
    np.testing.assert_allclose(norms(), want, rtol=1e-5)

    @cg.register_rule("twice_matmul")
    def rule(eqn, view):
        return _times(eqn, view)

    assert rule_of() == ("gram", "")
    np.testing.assert_allclose(norms(), want, rtol=1e-5)
    moments, plain = (cg.grad_moments(twice, method=method)(W, X) for method in ("ghost", "vmap"))
    np.testing.assert_allclose(moments.sum_grads, plain.sum_grads, rtol=1e-4, atol=1e-4)
    rule.remove()
    assert rule_of()[0] == "vjp"
    np.testing.assert_allclose(norms(), want, rtol=1e-5)


def _constant(number):
    return lambda eqn, view: cg.Norm(lambda operands, cotangent: jnp.float32(number))


def test_the_last_rule_that_was_not_removed_is_in_force():
    def loss_fn(w, x):
        return (w * x).sum()

    x, params = jnp.ones((1, 4)), jnp.ones(4)
    norm = lambda: float(cg.per_example_sq_norms(loss_fn)(params, x)[0])  # noqa: E731
    jitted = jax.jit(lambda: cg.per_example_sq_norms(loss_fn)(params, x))
    assert norm() == 4
    first = cg.register_rule("mul", _constant(1))
    assert norm() == 1  # what is compiled already is not used again
    assert jitted() == 1
    with cg.register_rule("mul", _constant(2)) as second:
        assert norm() == 2
        first.remove()
        assert norm() == 2
    assert norm() == 4
    assert jitted() == 1  # compiled by the user
    second.remove()  # once more
    with pytest.raises(RuntimeError), cg.register_rule("mul", _constant(3)):
        raise RuntimeError
    assert norm() == 4
    assert "twice_matmul" not in TABLE


def test_rules_outdate_each_program_once():
    calls = []

    def loss_fn(w, x):
        calls.append(None)
        return (w * x).sum()

    x, params = jnp.ones((2, 4)), jnp.ones(4)
    norms = cg.per_example_sq_norms(loss_fn)
    counts = []
    for _ in range(3):
        with cg.register_rule("some_primitive", _constant(1)):
            for _ in range(2):
                before = len(calls)
                norms(params, x)
                counts.append(len(calls) > before)
    assert counts == [True, False] * 3
    before = len(calls)
    norms(params, x)
    assert len(calls) > before


def test_a_decorated_rule_is_still_a_function_and_may_be_of_two_primitives():
    @cg.register_rule("mul")
    @cg.register_rule("div")
    def outer(eqn, view):
        return ("asked", eqn, view)

    inner = outer.rule
    try:
        assert outer("equation", 1) == ("asked", "equation", 1)
        assert (outer.primitive, inner.primitive) == ("mul", "div")
        assert TABLE["mul"].rule is outer
        assert TABLE["div"].rule is inner
        assert TABLE["mul"].is_linear  # all else that is known of it stays
    finally:
        outer.remove()
        inner.remove()
    assert TABLE["mul"].rule is TABLE["div"].rule is None


def test_what_is_no_rule_is_refused(twice):
    for primitive in (jax.lax.mul_p, None, 3):
        with pytest.raises(TypeError, match="Expected primitive to be the name of one"):
            cg.register_rule(primitive)
    with pytest.raises(TypeError, match=r"Expected rule to be a function of \(eqn, view\), got str"):
        cg.register_rule("mul", "add")
    with pytest.raises(TypeError, match=r"Expected rule to be a function of \(eqn, view\), got tuple"):
        cg.register_rule("mul")(())
    assert TABLE["mul"].rule is None

    def wrong(eqn, view):
        return _times(eqn, view)._replace(dims=(1, 3, 2, 4))

    with (
        cg.register_rule("twice_matmul", wrong),
        pytest.raises(ValueError, match=r"of the shapes \(\(1, 3, 2\), \(1, 3, 4\), \(4, 2\)\), as its dims"),
    ):
        cg.explain(twice, W, X[0])


def test_a_product_of_two_values_of_the_example_is_not_used():
    def loss_fn(w, x):
        return jax.lax.clamp(x[0], w, x[1]).sum()

    def product(eqn, view):
        n = eqn.outvars[0].aval.size
        return cg.Product(lambda x, c: (jnp.ones((1, 1, 1)), c[None, None]), lambda g: g[0, 0], (1, 1, 1, n))

    with cg.register_rule("clamp", product):
        got, want = (cg.per_example_sq_norms(loss_fn, method=m)(W[:, 0], X[:, :2]) for m in ("ghost", "vmap"))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_barriers_of_several_slices_in_a_scan():
    def loss_fn(p, x):
        def step(h, slices):
            w, b = jax.lax.optimization_barrier(slices)
            return jnp.tanh(h @ w) + b, None

        return jax.lax.scan(step, x, (p["w"], p["b"]))[0].sum()

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4, 4)).astype(np.float32), "b": rng.normal(size=(3, 4)).astype(np.float32)}
    got, want = (cg.per_example_sq_norms(loss_fn, method=m)(params, X[:, 0]) for m in ("ghost", "vmap"))
    chex.assert_trees_all_close(got, want, rtol=1e-5)
