"""Claims: written before they are measured, and judged by a rule.

The effect of a claim is a paired difference, or a paired ratio, over seeds. Its 95% interval is Student's t: of the
differences, or of the logarithms of the ratios. The verdict follows from the interval alone:

    holds           all of it lies on the predicted side of no effect (0 of a difference, 1 of a ratio)
    contradicted    all of it lies on the other side
    not shown       it contains no effect
    not measured    fewer seeds than the claim asks for, or an effect that is not finite

One seed has no interval, and two have one that says nothing; a claim asks for three at the least. With fewer the effect
is reported and the verdict is "not measured": "not shown" would say that an interval was looked at.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

Verdict = Literal["holds", "not shown", "contradicted", "not measured"]

CONFIDENCE = 0.95
LEAST_SEEDS = 3


class Interval(NamedTuple):
    """A mean over seeds and the ends of its interval, which are NaN for one seed."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interval(values: np.ndarray) -> Interval:
    """mean ± t · deviation / √n over the seeds, axis 0 of `values` [n, …]; t of Student with n − 1 degrees of freedom.

    >>> interval(np.array([1.0, 2.0, 3.0])).high.round(2)
    np.float64(4.48)
    """
    number, mean = len(values), values.mean(0)
    if number < 2:
        return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * values.std(0, ddof=1) / np.sqrt(number)
    return Interval(mean, mean - half, mean + half)


def verdict(low: float, high: float, sign: int) -> Verdict:
    """What an interval says of an effect that is predicted above 0 (sign 1) or below 0 (sign −1)."""
    if not np.isfinite([low, high]).all():
        return "not measured"
    if low <= 0 <= high:
        return "not shown"
    return "holds" if (low > 0) == (sign > 0) else "contradicted"


@dataclasses.dataclass(frozen=True)
class Result:
    """A claim beside what was measured; what is not finite is None."""

    statement: str
    quantity: str
    unit: str
    predicted: str
    paper: str
    ours: str
    effect: float | None
    low: float | None
    high: float | None
    seeds: int
    verdict: Verdict
    detail: str

    @property
    def shown(self) -> str:
        """The effect, its interval and its unit, as text."""
        if self.effect is None:
            return ""
        if self.low is None or self.high is None:
            return f"{self.effect:.3g} {self.unit}"
        effect, low, high = _apart(self.effect, self.low, self.high)
        return f"{effect} [{low}, {high}] {self.unit}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the theory with everything that is fixed before it is measured.

    Raises:
        ValueError: It asks for fewer than three seeds.
    """

    statement: str
    quantity: str  # what the effect is the difference or ratio of
    unit: str  # of the effect
    sign: Literal[1, -1]  # 1: a difference above 0, a ratio above 1; −1: below
    effect: Literal["difference", "ratio"] = "difference"
    paper: str = ""  # its number, where it is known
    seeds: int = LEAST_SEEDS

    def __post_init__(self) -> None:
        if self.seeds < LEAST_SEEDS:
            raise ValueError(f"Expected seeds >= {LEAST_SEEDS} of a claim, got seeds={self.seeds}.")

    def compared(self, first: pd.Series, second: pd.Series, form: str = "{:.3g}", detail: str = "") -> Result:
        """`first` against `second`, each one number for each seed; seeds that only one of them has are left out."""
        both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"]).astype(float)
        effects = both["first"] / both["second"] if self.effect == "ratio" else both["first"] - both["second"]
        ours = "" if both.empty else " against ".join(with_spread(both[name], form) for name in both)
        return self.judged(effects, ours, detail)

    def judged(self, effects: pd.Series, ours: str = "", detail: str = "") -> Result:
        """The claim by one effect for each seed: differences, or ratios."""
        values, ratio = effects.to_numpy(float), self.effect == "ratio"
        with np.errstate(all="ignore"):
            values = np.log(values) if ratio else values
        if not np.isfinite(values).all():
            detail = f"{detail} The effect of a seed is not finite.".strip()
        if len(values) < self.seeds:
            detail = f"{detail} {len(values)} of at least {self.seeds} seeds.".strip()
        with np.errstate(all="ignore"):
            ends = [float(end) for end in interval(values)] if len(values) else [float("nan")] * 3
        mean, low, high = (_finite(np.exp(end) if ratio else end) for end in ends)
        return Result(
            statement=self.statement,
            quantity=self.quantity,
            unit=self.unit,
            predicted=f"{self.effect} {'above' if self.sign > 0 else 'below'} {1 if ratio else 0}",
            paper=self.paper,
            ours=ours,
            effect=mean,
            low=low,
            high=high,
            seeds=len(values),
            verdict=verdict(ends[1], ends[2], self.sign) if len(values) >= self.seeds else "not measured",
            detail=detail,
        )


def _apart(*values: float) -> list[str]:
    """Numbers of three digits, or of the few more that tell different ones apart.

    >>> _apart(1.00131, 1.00096, 1.00166)
    ['1.0013', '1.001', '1.0017']
    """
    texts = [[f"{value:.{digits}g}" for value in values] for digits in range(3, 7)]
    return next((each for each in texts if len(set(each)) == len(set(values))), texts[-1])


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def spread(values: pd.Series) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; 0 for one seed."""
    return float(values.mean()), float(values.std()) if len(values) > 1 else 0.0


def with_spread(values: pd.Series, form: str = "{:.3g}") -> str:
    """The mean ± the deviation, or the one value, as text."""
    mean, deviation = spread(values)
    text = form.format(mean)
    return f"{text} ± {form.format(deviation)}" if len(values) > 1 else text
