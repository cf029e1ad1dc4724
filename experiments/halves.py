"""The examples that are learnt early, and the others: what is learnt as rows hold it, ranks, and halves by rank."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats

from .section import Row

HALVES = ("early", "late")


def as_row(learnt: np.ndarray) -> Row:
    """Which examples are learnt, [m], as bits in hexadecimal digits; and how many there are."""
    return {"learnt": np.packbits(learnt).tobytes().hex(), "count": learnt.size}


def learnt_ranks(rows: Sequence[Row]) -> pd.DataFrame:
    """The rank of every example's first-learnt step, [m, seed], from the rows that say what is learnt.

    The first-learnt step is the first measured one at which, as at the next measured one, the example is predicted as
    labelled: once may be chance. Those that never are come last. Ties share their mean rank.
    """
    learnt: dict[int, list[tuple[int, np.ndarray]]] = {}
    for row in rows:
        if "learnt" in row:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["learnt"]), np.uint8), count=row["count"])
            learnt.setdefault(row["seed"], []).append((row["step"], bits.astype(bool)))
    ranks = {}
    for seed, steps in learnt.items():
        table = np.stack([bits for _, bits in sorted(steps, key=lambda each: each[0])])
        twice = table & np.concatenate([table[1:], table[-1:]])
        first = np.where(twice.any(0), twice.argmax(0), len(table))
        ranks[seed] = scipy.stats.rankdata(first)
    return pd.DataFrame(ranks)


def split(ranks: np.ndarray, labels: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The rows of the early and of the late half of every class, equally many.

    The middle one of an odd number is in neither half.

    >>> split(np.array([4.0, 1.0, 3.0, 2.0, 5.0]), np.array([0, 0, 0, 1, 1]))
    {'early': (1, 3), 'late': (0, 4)}
    """
    halves: dict[str, list[int]] = {half: [] for half in HALVES}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[ranks[members].argsort(kind="stable")]
        half = members.size // 2
        halves["early"] += members[:half].tolist()
        halves["late"] += members[members.size - half :].tolist()
    return {half: tuple(sorted(rows)) for half, rows in halves.items()}


def correlations(ranks: pd.DataFrame) -> pd.Series:
    """Spearman's rank correlation of each seed with the others, their mean."""
    pairs = ranks.corr().to_numpy()
    others = pairs.shape[0] - 1
    return pd.Series((pairs.sum(0) - 1) / others if others else np.nan, index=ranks.columns)
