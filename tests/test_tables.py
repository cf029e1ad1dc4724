"""The tables of the documentation are those of the numbers beside them."""

import json
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "weighting.md"


def _row(**sides):
    entries = {side: {"ratio": ratio, "temp_mb": 2.0} | extra for side, (ratio, extra) in sides.items()}
    return {"name": "MLP", "batch_size": 8, "plain_ms": 1234.5, "plain_temp_mb": 0.51, "sides": entries}


def test_the_committed_page_has_the_committed_numbers():
    text = PAGE.read_text(encoding="utf-8")
    assert tables.filled(text, RESULTS) == text


def test_a_table_marks_goals_and_names_the_best_microbatch_size(tmp_path):
    row = _row(
        clip_norm=(1.04, {"met": True}), agreement=(1.94, {"met": False}), optax=(81.46, {}), jax_privacy=(8, {})
    )
    row["microbatch_ms"] = {"1": 3.0, "None": 2.0}
    (tmp_path / "weighted.json").write_text(json.dumps({"results": [row]}))
    page = "before\n<!-- weighted -->\nold\n<!-- end of weighted -->\nafter\n"
    with pytest.raises(KeyError, match="coordinatewise"):
        tables.filled(page, tmp_path)
    sides = {side: {"ms": 1.5, "temp_mb": 340.2} for side in ("plain", "coordinatewise", "jnp.median")}
    record = {"results": [row], "coordinatewise": {"sides": sides}}
    (tmp_path / "weighted.json").write_text(json.dumps(record))
    text = tables.filled(page, tmp_path)
    assert text.startswith("before\n<!-- weighted -->\n\n| model | batch |")
    assert text.endswith("|\n\n<!-- end of weighted -->\nafter\n")
    assert "| MLP | 8 | 1.23e+03 | **1.04** | – | – | 1.94 ! | – | – | 81.5 | 8 (None) | 0.51, 2, –, 2 |" in text
    assert "| 1.5 | 340 |" in tables.coordinatewise(record)
