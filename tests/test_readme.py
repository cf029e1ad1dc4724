"""The code in the README runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cg_jax as cg

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_it_runs(number):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_it_shows_its_uses_in_python_and_links_to_what_is_there():
    assert len(BLOCKS) == 4
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).is_file() for link in links)


def test_the_rule_that_the_engines_page_shows_is_right():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(encoding="utf-8"), re.DOTALL)
    w, x = jnp.array([2.0, -1.0]), jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)

    def loss_fn(w, x):
        place = jnp.argmax(x[:3])
        return (jnp.sin(jax.lax.dynamic_update_slice(x, w, (place,))) * x).sum()

    names = {}
    exec(compile(block, "docs/engine.md", "exec"), names)
    with names["write"]:
        assert cg.explain(loss_fn, w, x[0])[0].rule == "norm"
        got, want = (cg.grad_moments(loss_fn, method=method)(w, x) for method in ("ghost", "vmap"))
    np.testing.assert_allclose(got.sum_sq_norms, want.sum_sq_norms, rtol=1e-5)


@pytest.mark.parametrize("line", re.findall(r"^python -m experiments (.*)$", TEXT, re.MULTILINE))
def test_its_command_lines_are_understood(line):
    import tyro

    from experiments.__main__ import choice

    config = tyro.cli(choice(), args=line.split())
    assert config.seeds == 5
