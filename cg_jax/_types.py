"""Types that all modules share."""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""Any nesting of tuples, lists, dicts and other registered nodes, with arrays as leaves; JAX has no type for it."""
