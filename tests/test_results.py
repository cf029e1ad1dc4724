"""The committed results: their table, their page, their figures, and how they are measured again."""

import dataclasses
import json
import shutil
import subprocess

import pandas as pd
import pytest

from experiments import claims_page, reproduce
from experiments.claims import Claim
from experiments.claims_page import COMMITTED, RESULTS
from experiments.registry import EXPERIMENTS
from experiments.runner import draw_again

TINY = ("coherence", "--data", "digits", "--width", "8", "--batch-size", "20", "--epochs", "1", "--early", "0")


def _folders():
    """Committed runs, as the page and the repository have them."""
    return sorted(path.parent for path in RESULTS.glob("*/config.json"))


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_run_is_one_of_an_experiment(name):
    assert COMMITTED[name][0] in EXPERIMENTS
    for more in ((), ("--smoke",)):
        config = reproduce.asked(name, *more)
        assert config.name == COMMITTED[name][0]
        assert config.seeds >= 3


def test_a_committed_run_is_what_its_command_measures():
    for folder in [path for path in _folders() if path.name in COMMITTED]:
        reproduce.require_usable(folder, reproduce.asked(folder.name))
        assert reproduce.complete(folder)


def test_the_committed_page_is_that_of_the_committed_results():
    assert (RESULTS.parent / "README.md").read_text(encoding="utf-8") == claims_page.page(RESULTS)


def test_the_links_of_the_page_lead_to_files():
    page = claims_page.page(RESULTS)
    links = [part.split(")")[0] for part in page.split("](")[1:]]
    assert all((RESULTS.parent / link).is_file() for link in links if not link.startswith(("http", "#")))


def test_committed_results_are_small():
    listed = subprocess.run(["git", "ls-files", RESULTS], cwd=RESULTS, capture_output=True, text=True, check=False)
    sizes = [path.stat().st_size for line in listed.stdout.split() if (path := RESULTS / line).is_file()]
    assert sum(sizes) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("folder", _folders(), ids=lambda path: path.name)
def test_a_committed_folder_is_drawn_again_bit_for_bit(folder, tmp_path):
    copy = tmp_path / folder.name
    left = shutil.ignore_patterns("figures", "report.html", ".lock", "checkpoints", "timings.jsonl")
    shutil.copytree(folder, copy, ignore=left)
    draw_again(copy)
    written = [path for path in copy.rglob("*") if path.suffix in (".png", ".json")]
    assert any(path.suffix == ".png" for path in written)
    for path in written:
        assert path.read_bytes() == (folder / path.relative_to(copy)).read_bytes(), path.name
    assert {path.relative_to(folder) for path in folder.rglob("*.png")} == {
        path.relative_to(copy) for path in written if path.suffix == ".png"
    }


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Results and runs in a folder of the test, and one small run in the table."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    for module in (reproduce, claims_page):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(COMMITTED, "tiny", TINY)
    return tmp_path


def _interrupted(*_):
    raise KeyboardInterrupt


def test_what_is_complete_is_kept_and_not_run_again(elsewhere, monkeypatch):
    kept = elsewhere / "results" / "tiny"
    kept.mkdir(parents=True)
    (kept / "findings.md").write_text("**Found** by hand.")
    (kept / "figures").mkdir()
    (kept / "figures" / "old.png").touch()
    with monkeypatch.context() as stopped:
        stopped.setattr("experiments.loop.train_all", _interrupted)
        assert dict(reproduce.failed(reproduce.Config(("tiny",)))) == {"tiny": 130}
    assert sorted(path.name for path in kept.iterdir()) == ["figures", "findings.md"]
    assert reproduce.reproduced("tiny") == 0
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    figures = {"figures/coherence.png", "figures/per_tensor.png"}
    assert names == {"config.json", "env.json", "findings.md", "metrics.jsonl", "summary.json", "time.json", *figures}
    assert set(json.loads((kept / "time.json").read_text())) == {"training", "measuring", "saving"}
    page = (elsewhere / "README.md").read_text()
    assert "**Found** by hand." in page
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    monkeypatch.setattr(reproduce, "run", _interrupted)
    assert reproduce.reproduced("tiny") == 0
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_a_run_with_other_options_is_not_taken_for_complete(elsewhere, capsys):
    out = elsewhere / "runs" / "tiny"
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"experiment": "coherence", "epochs": 99}))
    assert dict(reproduce.failed(reproduce.Config(("tiny",)))) == {"tiny": 1}
    assert "Expected the options that the run in out=" in capsys.readouterr().err


def test_a_failure_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(reproduce, "smoked", lambda name: int(name == "noise"))
    assert reproduce.main(["noise", "bound", "--smoke"]) == 1
    assert reproduce.main(["bound", "--smoke"]) == 0
    ended = []
    monkeypatch.setattr(reproduce, "smoked", lambda name: ended.append(name) or 130)
    assert reproduce.main(["--smoke"]) == 130
    assert len(ended) == 1


@pytest.mark.slow
def test_one_is_tried_small(elsewhere):
    # The tests of the other experiments have a smoke run each.
    assert reproduce.main(["noise", "--smoke"]) == 0
    assert not (elsewhere / "runs").exists()
    assert not (elsewhere / "results").exists()


@pytest.fixture
def results(tmp_path):
    """A run of one section, and one of two in folders of their own."""
    claim = Claim("A | b_c holds.", "q", "×", 1, "ratio", paper="2")
    result = dataclasses.asdict(claim.compared(pd.Series([2.0, 2.1, 2.2]), pd.Series([1.0, 1.0, 1.0])))
    table = {"title": "T <1>", "columns": ["x", "y"], "rows": [["1", "2"]], "note": "N."}
    one = {
        "title": "One", "paragraphs": ["Why *so* `a_b`."], "claims": [result, result],
        "figures": [{"file": "a.png", "caption": "The a."}], "tables": [table],
    }  # fmt: skip
    root = tmp_path / "results"
    for name, parts in (("bound", ["bound"]), ("noise", ["first", "second"])):
        for part in parts[1:] and parts:
            (root / name / part).mkdir(parents=True)
        (root / name).mkdir(parents=True, exist_ok=True)
        content = {"complete": True, "sections": [{"name": part, **one} for part in parts]}
        (root / name / "summary.json").write_text(json.dumps(content))
    (root / "bound" / "findings.md").write_text("Here they **part**.\n")
    (root / "bound" / "time.json").write_text(json.dumps({"training": 100.0, "measuring": 20.0, "saving": 0.0}))
    return root


def test_the_page_has_a_line_for_every_claim(results):
    lines = claims_page.page(results).splitlines()
    assert "6 claims in 2 experiments: holds 6, not shown 0, contradicted 0, not measured 0." in lines
    start = lines.index("| --- | --- | --- | --- | --- | --- | --- | --- |")
    noise, *claims, bound = lines[start + 1 : start + 7]
    assert noise == "| **[noise](#noise)** |  |  |  |  |  | `make results-noise` |  |"
    assert bound == "| **[bound](#bound)** |  |  |  |  |  | `make results-bound` | 2 |"
    parts = ["first", "first", "second", "second"]
    for line, part in zip(claims, parts, strict=True):
        assert line.startswith("| A \\| b\\_c holds. | 2 | 2.1 ± 0.1 against 1 ± 0 | 2.1 [")
        assert line.endswith(f"] × | holds | [1](results/noise/{part}/figures/a.png) |  |  |")


def test_a_section_has_what_was_asked_and_what_was_found(results):
    page = claims_page.page(results)
    section = page[page.index("## bound") : page.index("## Other")]
    assert "`make results-bound`, minutes: 2." in section
    assert "Why \\*so\\* `a_b`." in section
    assert "![One](results/bound/figures/a.png)\n\nThe a." in section
    assert "| A \\| b\\_c holds. | q | ratio above 1 | 2 | 2.1 ± 0.1 against 1 ± 0 |" in section
    assert "<summary>T &lt;1&gt;</summary>\n\nN.\n\n| x | y |" in section
    assert section.rstrip().endswith("Here they **part**.")
    assert "![One](results/noise/second/figures/a.png)" in page
