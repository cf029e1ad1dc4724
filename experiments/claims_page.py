"""`python -m experiments.claims_page`: write README.md beside this file from the JSON of experiments/results alone."""

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from .claims import Result, Verdict
from .committed import COMMITTED, RESULTS
from .seconds import minutes_of

PAGE = "README.md"

_INTRODUCTION = """\
# The claims of the theory, measured

<!-- Written by `python -m experiments.claims_page` from the files in results/; not to be edited. -->

Each claim of the theory of coherent gradients ([docs/theory.md](../docs/theory.md); Chatterjee & Zielinski 2022,
[arXiv 2203.10036](https://arxiv.org/abs/2203.10036)) was written down, and committed, before the run that tests it. The
effect is a paired difference or ratio over seeds with its 95% interval (Student's t). A claim **holds** where the
interval lies on the predicted side of no effect, is **contradicted** where it lies on the other, **not shown** where
the interval contains no effect, and **not measured** with fewer than three seeds, or where the effect of one is not
finite.
"""
_AFTER = """
`make results` measures all of it again, one experiment after another, and `make results-NAME` one. Both go on where
they were stopped. Minutes are those of training, measuring and saving, on the machine that the env.json of the run
describes. `make results-smoke` tries every experiment, small. `python -m experiments figures experiments/results/NAME`
draws the figures of a folder again, from its metrics.jsonl alone.
"""
_OTHERS = """
## Other committed runs

- [demo](results/demo/summary.json): `make demo`, coherence and noise in under five minutes; the figures are in
  [coherence](results/demo/coherence/figures/coherence.png) and [noise](results/demo/noise/figures/noise.png).
- [robust_mnist5k](results/robust_mnist5k/summary.json) and [robust_fashion](results/robust_fashion/summary.json): every
  robust average under seven kinds of wrong labels and rare classes; see [docs/label_noise.md](../docs/label_noise.md).
"""


class Part(NamedTuple):
    """One section of a committed run, with the folder that its numbers are in."""

    folder: Path
    link: str  # of the folder, from the page
    content: dict[str, Any]  # as in summary.json
    claims: list[Result]


class Run(NamedTuple):
    """A committed run."""

    name: str
    folder: Path
    parts: list[Part]


def runs_in(results: Path) -> list[Run]:
    """The committed runs that are there, in the order of COMMITTED."""
    return [_run(name, results / name) for name in COMMITTED if (results / name / "summary.json").is_file()]


def _run(name: str, folder: Path) -> Run:
    sections = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["sections"]
    return Run(name, folder, [_part(folder, f"results/{name}", section) for section in sections])


def _part(folder: Path, link: str, content: dict[str, Any]) -> Part:
    """A section of a run in `folder`; one of several has a folder of its own in it."""
    claims, name = [Result(**claim) for claim in content["claims"]], content["name"]
    if (folder / name).is_dir():
        folder, link = folder / name, f"{link}/{name}"
    return Part(folder, link, content, claims)


def page(results: Path) -> str:
    """The whole page."""
    runs = runs_in(results)
    missing = [name for name in COMMITTED if name not in {run.name for run in runs}]
    lines = [_INTRODUCTION, _counted(runs), "", *_summary(runs), _AFTER.rstrip()]
    lines += [f"\nNot committed yet: {', '.join(missing)}."] if missing else []
    for run in runs:
        lines += ["", *_of_run(run)]
    return "\n".join([*lines, _OTHERS])


def write() -> None:
    """Write the page of the committed results."""
    (RESULTS.parent / PAGE).write_text(page(RESULTS), encoding="utf-8")


def _counted(runs: Sequence[Run]) -> str:
    """How many claims have which verdict."""
    verdicts = Counter(claim.verdict for run in runs for part in run.parts for claim in part.claims)
    counts = ", ".join(f"{verdict} {verdicts[verdict]}" for verdict in get_args(Verdict))
    return f"{verdicts.total()} claims in {len(runs)} experiments: {counts}."


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    """The table that the page opens with: a line for each experiment, and one for each of its claims."""
    heads = ("claim", "paper", "ours", "effect [95% interval]", "verdict", "figure", "command", "minutes")
    lines: list[tuple[str, ...]] = []
    for run in runs:
        about = f"**[{run.name}](#{run.name})**"
        lines.append((about, "", "", "", "", "", f"`make results-{run.name}`", _minutes(run)))
        for part in run.parts:
            figures = " ".join(
                f"[{number}]({part.link}/figures/{figure['file']})"
                for number, figure in enumerate(part.content["figures"], 1)
            )
            for claim in part.claims:
                texts = (claim.statement, claim.paper, claim.ours, claim.shown)
                lines.append((*(text(each) or "–" for each in texts), claim.verdict, figures, "", ""))
    return table(heads, lines)


def _minutes(run: Run) -> str:
    minutes = minutes_of(run.folder)
    return "" if minutes is None else f"{minutes:.0f}" if minutes >= 1 else "< 1"


def _of_run(run: Run) -> Iterator[str]:
    """The section of a run: what was asked, the figures, the claims, what was found."""
    minutes = _minutes(run)
    yield f"## {run.name}\n\n`make results-{run.name}`{minutes and f', minutes: {minutes}'}."
    for part in run.parts:
        yield from _of_part(part)
        if part.folder != run.folder:
            yield from _findings(part.folder)
    yield from _findings(run.folder)


def _of_part(part: Part) -> Iterator[str]:
    title = part.content["title"]
    yield f"\n### {text(title)}"
    for paragraph in part.content["paragraphs"]:
        yield f"\n{text(paragraph)}"
    for figure in part.content["figures"]:
        yield f"\n![{title}]({part.link}/figures/{figure['file']})\n\n{text(figure['caption'])}"
    if part.claims:
        yield ""
        yield from _claims(part.claims)
    for each in part.content["tables"]:
        yield f"\n<details><summary>{html.escape(each['title'])}</summary>\n"
        if each["note"]:
            yield f"{text(each['note'])}\n"
        yield from table([*map(text, each["columns"])], [[*map(text, row)] for row in each["rows"]])
        yield "\n</details>"
    files = (f"[{name}]({part.link}/{name})" for name in ("metrics.jsonl", "config.json", "env.json"))
    yield f"\nFiles: {', '.join(files)}."


def _claims(claims: Sequence[Result]) -> Iterator[str]:
    heads = ("claim", "quantity", "predicted", "paper", "ours", "effect [95% interval]", "seeds", "verdict", "measured")
    cells = (
        (c.statement, c.quantity, c.predicted, c.paper, c.ours, c.shown, str(c.seeds), c.verdict, c.detail)
        for c in claims
    )
    return table(heads, ([text(cell) or "–" for cell in line] for line in cells))


def _findings(folder: Path) -> Iterator[str]:
    """What somebody wrote of the results, where the folder has it."""
    path = folder / "findings.md"
    if path.is_file():
        yield f"\n{path.read_text(encoding='utf-8').strip()}"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table whose cells are Markdown."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def text(plain: str) -> str:
    """Plain text as Markdown of one line; what stands between backticks is code."""
    return re.sub(r"(`[^`]*`)|([\\*_|<>$~])", lambda found: found[1] or f"\\{found[2]}", " ".join(plain.split()))


if __name__ == "__main__":
    write()
