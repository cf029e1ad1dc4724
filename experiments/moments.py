"""Methods compared at moments of their trainings: tables and claims. Of lines that METHODS' names and seeds mark."""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from .claims import Claim, Result, with_spread
from .methods import METHODS
from .section import Table

# What is measured, and what tables call it. Each is a share of examples.
QUANTITIES = {
    "pristine": "pristine examples",
    "corrupt": "corrupt examples, as labelled",
    "corrupt_true": "corrupt examples, true label",
    "test": "test examples",
    "gap": "generalisation gap",
    "valid": "validation examples",
    "rare": "test examples of the rare class",
}
_LEARNT = 0.9

_WHEN = {
    "best": "At the epoch of the best test accuracy",
    "selected": "At the epoch of the best validation accuracy",
    "last": "At the last epoch",
    "learnt": "At the first epoch with 90% of the pristine examples learnt",
}


def whens(table: pd.DataFrame) -> tuple[str, ...]:
    """The moments that methods are compared at: the best test epoch only where nothing is held out to select one by."""
    return ("selected" if "valid" in table else "best", "last", "learnt")


def moments(table: pd.DataFrame, when: str) -> pd.DataFrame:
    """The line of every run at its best test epoch, its best validation epoch ("selected"), its last, or the first with
    90% of the pristine learnt, if any.

    Of equal epochs the first. Indexed by method and seed.
    """
    runs = ["method", "seed"]
    if when in ("best", "selected"):
        rows = table.loc[table.groupby(runs)["test" if when == "best" else "valid"].idxmax()]
    elif when == "last":
        rows = table.groupby(runs).tail(1)
    else:
        rows = table[table["pristine"] >= _LEARNT].groupby(runs).head(1)
    return rows.set_index(runs)


def of_method(method: str, at_moment: pd.DataFrame, seeds: int) -> pd.DataFrame | None:
    """The lines of a method by seed, or None unless every seed has one."""
    if method not in at_moment.index.get_level_values("method"):
        return None
    lines = pd.DataFrame(at_moment.loc[method])
    return lines if len(lines) == seeds else None


def in_percent(values: pd.Series) -> str:
    """Mean ± deviation of shares, in per cent; a dash where there is nothing to count."""
    return "–" if values.isna().any() else with_spread(100 * values.astype(float), "{:.1f}")


def table_at(table: pd.DataFrame, when: str) -> Table:
    """All quantities of all methods at a moment."""
    at_moment, seeds, out = moments(table, when), table["seed"].nunique(), []
    quantities = [key for key in QUANTITIES if key in table]
    others = {"learning rate": ("learning_rate", "{:g}")} if "learning_rate" in table else {}
    others |= {"epoch": ("epoch", "{:.1f}")}
    others |= {"training loss [nats]": ("loss", "{:.2f}")} if "loss" in table else {}
    for name in table["method"].unique():
        label, lines = METHODS[name].label, of_method(name, at_moment, seeds)
        if lines is None:
            out.append((label, "not reached", *("" for _ in range(len(quantities) + len(others) - 1))))
            continue
        cells = [
            form.format(lines[key].iloc[0]) if key == "learning_rate" else with_spread(lines[key], form)
            for key, form in others.values()
        ]
        out.append((label, *cells, *(in_percent(lines[key]) for key in quantities)))
    note = "The epoch is chosen by test accuracy: an upper bound that no practitioner has." if when == "best" else ""
    heads = ("method", *others, *(f"{QUANTITIES[key]} [%]" for key in quantities))
    return Table(_WHEN[when], heads, tuple(out), note)


class Comparison(NamedTuple):
    """What is predicted of a method and those it is compared with."""

    when: str
    key: str
    sign: int
    statement: str
    only: tuple[str, ...] | None = None  # of the rivals that are compared; None: all
    rivals_when: str | None = None  # their moment, where it is another


_CONTROLS = ("mean3", "ra3")


def _comparisons(table: pd.DataFrame) -> Iterable[Comparison]:
    """What is predicted, given what was measured."""
    chosen = whens(table)[0]
    at = "At its best epoch" if chosen == "best" else "At its selected epoch"
    if table["corrupt"].notna().any():
        learnt = "With 90% of the pristine learnt, {a} has memorised fewer corrupt examples than {b}."
        yield Comparison("learnt", "corrupt", -1, learnt)
        yield Comparison("last", "test", 1, "At the last epoch {a} has a higher test accuracy than {b}.")
        yield Comparison(chosen, "test", 1, at + " {a} has a higher test accuracy than {b}.")
        if chosen == "selected":
            stopped = "At the last epoch {a} has a higher test accuracy than {b} has at its selected epoch."
            yield Comparison("last", "test", 1, stopped, ("sgd",), "selected")
    else:
        yield Comparison("last", "test", -1, "At the last epoch {a} has a lower test accuracy than {b}.", _CONTROLS)
        yield Comparison(chosen, "test", -1, at + " {a} has a lower test accuracy than {b}.", _CONTROLS)
    if "rare" in table:
        for when, text in (("last", "At the last epoch"), (chosen, at)):
            fewer = text + " {a} recognises fewer examples of the rare class than {b}."
            yield Comparison(when, "rare", -1, fewer, _CONTROLS)


def claims(table: pd.DataFrame, where: str = "") -> list[Result]:
    """Whether each robust method is better than its rivals and, where labels are right or a class is rare, its price.

    `where` begins the statements.
    """
    out: list[Result] = []
    seeds, at_moments = table["seed"].nunique(), {when: moments(table, when) for when in whens(table)}
    methods, compared = set(table["method"]), [*_comparisons(table)]
    for robust in [name for name, method in METHODS.items() if method.rivals and name in methods]:
        for other in dict.fromkeys((*METHODS[robust].rivals, "sgd")):
            for each in compared if other in methods else ():
                if other in (each.only or METHODS[robust].rivals):
                    mine = of_method(robust, at_moments[each.when], seeds)
                    theirs = of_method(other, at_moments[each.rivals_when or each.when], seeds)
                    out.append(_judged(each, where, (robust, mine), (other, theirs), seeds))
    return out


def _judged(
    compared: Comparison,
    where: str,
    first: tuple[str, pd.DataFrame | None],
    second: tuple[str, pd.DataFrame | None],
    seeds: int,
) -> Result:
    (robust, mine), (other, theirs) = first, second
    statement = where + compared.statement.format(a=METHODS[robust].short, b=METHODS[other].label)
    quantity = f"accuracy on {QUANTITIES[compared.key]}, {robust} less {other}"
    claim = Claim(statement, quantity, "points", 1 if compared.sign > 0 else -1)
    if mine is None or theirs is None:
        return claim.judged(pd.Series(dtype=float), detail="Not every run reached that point.")
    wins = (compared.sign * (mine[compared.key] - theirs[compared.key]) > 0).sum()
    detail = f"So in {wins} of {seeds} seed(s)."
    return claim.compared(100 * mine[compared.key], 100 * theirs[compared.key], "{:.1f}%", detail)
