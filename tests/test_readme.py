"""The code in the README runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_it_runs(number):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_it_shows_two_uses_in_python_and_links_to_what_is_there():
    assert len(BLOCKS) == 2
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).is_file() for link in links)


@pytest.mark.parametrize("line", re.findall(r"^python -m experiments (.*)$", TEXT, re.MULTILINE))
def test_its_command_lines_are_understood(line):
    import tyro

    from experiments.__main__ import Choice

    config = tyro.cli(Choice, args=line.split())
    assert config.seeds == 5
