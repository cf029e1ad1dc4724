"""One self-contained page from the sections of a run, and its summary in JSON and in the terminal."""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from .claims import Result
from .run_folder import write_json
from .section import Section, Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0; } .scroll { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .claims td, .claims th { text-align: left; }
th { border-bottom: 2px solid #888; } figure { margin: 1.5rem 0; } img { width: 100%; }
figcaption, .note { font-size: 13px; color: #555; } pre { font-size: 12px; background: #f5f5f5; padding: 1rem; }
tr.holds td:nth-child(6) { color: #0a6b2d; font-weight: 600; }
tr.contradicted td:nth-child(6) { color: #a61717; font-weight: 600; }
.claims td:nth-child(5) { white-space: nowrap; }
.warn { background: #fff3cd; padding: .6rem 1rem; }
"""
_INTRODUCTION = """
<p>A large network can memorise random labels, yet the same network generalises when labels are real. The theory of
coherent gradients (Chatterjee &amp; Zielinski, <a href="https://arxiv.org/abs/2203.10036">arXiv 2203.10036</a>)
explains it by the average that gradient descent follows: directions that many examples share add up, those of single
examples do not. This page reports what one run measured. Each claim was written down before: the effect is a paired
difference or ratio over seeds with its 95% interval (Student&rsquo;s t). It <b>holds</b> where the interval lies on
the predicted side, is <b>contradicted</b> where it lies on the other, <b>not shown</b> where the interval contains no
effect, and <b>not measured</b> with fewer than three seeds.</p>
"""


def write(folder: Path, title: str, parts: Sequence[tuple[Path, Section]], *, complete: bool) -> None:
    """Write summary.json and report.html in `folder`, from (folder of a part, its section)."""
    sections = [section for _, section in parts]
    write_json(folder / "summary.json", {"complete": complete, "sections": [dataclasses.asdict(s) for s in sections]})
    body = [f"<h1>{html.escape(title)}</h1>", _INTRODUCTION]
    if not complete:
        body.append('<p class="warn">The run was interrupted; what follows is what had been measured until then.</p>')
    for path, section in parts:
        body += _section(path, section)
    for path, section in parts:
        body.append(f"<h2>Configuration and environment: {html.escape(section.name)}</h2>")
        for name in ("config.json", "env.json"):
            text = html.escape((path / name).read_text(encoding="utf-8"))
            body.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>{chr(10).join(body)}</body></html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _section(path: Path, section: Section) -> list[str]:
    out = [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in section.paragraphs)]
    if section.claims:
        out.append(f"<h3>Claims</h3>{_claims(section.claims)}")
    for figure in section.figures:
        data = base64.b64encode((path / "figures" / figure.file).read_bytes()).decode()
        caption = html.escape(figure.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        out.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return out + [_table(table) for table in section.tables]


_CLAIM_HEADS = ("claim", "predicted", "paper", "ours", "effect [95% interval]", "verdict", "measured")


def _claims(results: Sequence[Result]) -> str:
    lines = (
        (c.statement, c.predicted, c.paper or "–", c.ours or "–", c.shown or "–", c.verdict, c.detail) for c in results
    )
    head = "".join(f"<th>{text}</th>" for text in _CLAIM_HEADS)
    rows = "".join(
        f'<tr class="{line[5]}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in line)}</tr>' for line in lines
    )
    return f'<div class="scroll"><table class="claims"><tr>{head}</tr>{rows}</table></div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    title = html.escape(table.title)
    return f'<h3>{title}</h3>{note}<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _measured(claim: Result) -> str:
    effect = f"Effect {claim.shown}." if claim.shown else ""
    return " ".join(part for part in (claim.ours and f"{claim.ours}.", effect, claim.detail) if part)


def print_summary(sections: Sequence[Section]) -> None:
    """The claims and the tables, for the terminal."""
    for section in sections:
        print(f"\n{section.title}")
        for claim in section.claims:
            print(f"  [{claim.verdict}] {claim.statement} {_measured(claim)}".rstrip())
        for table in section.tables:
            print(f"\n  {table.title}")
            lines = [table.columns, *table.rows]
            widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
            for line in lines:
                cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
                print("   ", line[0].ljust(widths[0]), *cells, sep="  ")
