"""The house: what imports what, how long files and functions are, which names are retired; nothing is unused."""

import ast
import itertools
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cg_jax", "experiments", "benchmarks", "examples")
MAX_FILE, MAX_FUNCTION = 300, 50
RETIRED = {"found", "how", "made", "todo", "lie", "lies", "behind", "relaxed"}

# The floors of each folder, from the ground up: a module imports only from floors below its own. A folder stands in
# the one above it as one entry, and has floors inside.
FLOORS = {
    "cg_jax": [
        ["_types"],
        ["_jaxprs", "_leaves", "trees"],
        ["_compat", "_validate", "incoming"],
        ["order_statistics"],
        ["_compiled", "_data", "_loss", "bound", "moments", "rules", "sharding", "weighting"],
        ["_per_batch", "batches", "collective", "ghost", "metrics", "slots"],
        ["aggregate", "gradients", "micro_batch"],
        ["checked", "coordinatewise", "per_example", "statistics", "weighted"],
        ["estimators"],
        ["stream"],
        ["measure"],
        ["__init__"],
    ],
    "cg_jax.sharding": [["axes", "explicit_axes"], ["layout"], ["on_mesh"], ["__init__"]],
    "cg_jax.estimators": [["base"], ["batch", "exact", "signs"], ["__init__"]],
    "cg_jax.weighting": [["base"], ["clipping", "composition", "geometric", "selection"], ["__init__"]],
    "cg_jax.ghost": [
        ["norm", "product"],
        ["evaluation", "factors", "varying"],
        ["chunks", "primitives"],
        ["activity", "products", "rules"],
        ["capture"],
        ["views"],
        ["uses"],
        ["inline"],
        ["backward", "plan"],
        ["cost", "passes"],
        ["blocks", "explanation", "instances"],
        ["by_primitive"],
        ["tensors"],
        ["kept"],
        ["scalars"],
        ["columns", "engine"],
        ["__init__"],
    ],
    "cg_jax.ghost.primitives": [
        ["base"],
        ["arithmetic", "arranging", "calls", "convolution", "lookups", "matmul"],
        ["__init__"],
    ],
}


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _modules(package):
    """Dotted name → file; a package is the module __init__."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}


MODULES = _modules("cg_jax")
FLOOR = {
    f"{folder}.{name}": number
    for folder, floors in FLOORS.items()
    for number, names in enumerate(floors)
    for name in names
}


def _as_module(name):
    """The module that a dotted name stands for, or None."""
    return name if name in MODULES else f"{name}.__init__" if f"{name}.__init__" in MODULES else None


def _imports(module):
    """The modules of cg_jax that a module imports, wherever in it, and so for types alone too."""
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Import):
            yield from filter(None, (_as_module(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            for alias in node.names:
                yield from filter(None, [_as_module(f"{node.module}.{alias.name}") or _as_module(node.module or "")])


def _where_they_part(module, other):
    """The entries of the one folder that holds both, in which the two differ."""
    one, two = module.split("."), other.split(".")
    depth = next(i for i, (a, b) in enumerate(itertools.zip_longest(one, two)) if a != b)
    return ".".join(one[: depth + 1]), ".".join(two[: depth + 1])


def test_every_module_has_a_floor_and_every_entry_a_module():
    entries = {".".join(module.split(".")[:depth]) for module in MODULES for depth in range(2, module.count(".") + 2)}
    assert entries == set(FLOOR)
    assert {entry for entry in entries if f"{entry}.__init__" in MODULES} == set(FLOORS) - {"cg_jax"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_floors_below(module):
    for other in _imports(module):
        here, there = _where_they_part(module, other)
        assert FLOOR[there] < FLOOR[here], f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if name.startswith("cg_jax.ghost.")])
def test_the_engine_stands_alone(module):
    others = {other.split(".")[1] for other in _imports(module)}
    assert others <= {"ghost", "_compat", "_compiled", "_jaxprs", "_loss", "_types", "_validate", "trees"}


def test_only_one_module_touches_the_internals_of_jax():
    def touches(node):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return any(name.startswith(("jax._src", "jax.interpreters")) for name in names)

    touching = {name for name, path in MODULES.items() if any(map(touches, ast.walk(_tree(path))))}
    assert touching <= {"cg_jax._compat"}


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_are_short(package):
    long = []
    for name, path in _modules(package).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        long += [f"{name}: {lines} lines"] if lines > MAX_FILE else []
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = _lines_of_code(node)
                long += [f"{name}.{node.name}: {lines} lines"] if lines > MAX_FUNCTION else []
    assert not long


def _lines_of_code(function):
    """Lines of a function without its docstring, which may be long where it is public."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("module", sorted(MODULES))
def test_retired_names_stay_retired(module):
    def names(node):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname

    used = {name.strip("_") for node in ast.walk(_tree(MODULES[module])) for name in names(node) if name}
    assert not used & RETIRED


def test_the_picture_shows_every_entry(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "architecture.py"))["draw"](tmp_path / "architecture.png")
    assert (tmp_path / "architecture.png").stat().st_size > 0
