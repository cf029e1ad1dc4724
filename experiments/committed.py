"""COMMITTED: the runs whose results are committed, by name. `make results` and the page of results go through it."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

# Every committed run by its name, and what `python -m experiments` is told for it.
COMMITTED: dict[str, tuple[str, ...]] = {
    "illustration": ("illustration",),
    "calibration": ("calibration",),
    "coherence": ("coherence",),
    "noise": ("noise",),
    "winsorize": ("winsorize",),
    "easy-hard": ("easy-hard",),
    "noisy-labels": ("noisy-labels",),
    "early-stopping": ("early-stopping",),
    "adversarial-init": ("adversarial-init",),
    "width-depth": ("width-depth",),
    "linear-to-deep": ("linear-to-deep",),
    "bound": ("bound",),
    "predictor": ("predictor",),
}
