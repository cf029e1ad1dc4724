"""The code of the guides in docs/ runs as it stands, block after block."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["weighting.md", "theory.md"])
def test_its_blocks_run_in_order(page):
    names = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, f"docs/{page}", "exec"), names)


@pytest.mark.parametrize("page", ["weighting.md", "theory.md"])
def test_its_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / page).read_text(encoding="utf-8"))
    assert links
    assert all((DOCS / link.split("#")[0]).is_file() for link in links if not link.startswith("http"))
