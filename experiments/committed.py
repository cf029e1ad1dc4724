"""COMMITTED: the runs whose results are committed, by name. `make results` and the page of results go through it."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

# Every committed run by its name, and what `python -m experiments` is told for it.
COMMITTED: dict[str, tuple[str, ...]] = {
    "illustration": ("illustration",),
    "calibration": ("calibration",),
    "coherence": ("coherence-networks",),
    "noise": (
        *("noise", "--methods", "sgd", "mean3", "m3", "rm3", "ra3", "clip", "agreement", "clip_agreement", "geomed"),
        *("trim_loss", "--width", "256", "--epochs", "60", "--every", "3", "--no-coherence", "--validation", "0.2"),
        *("--learning-rates", "0.03", "0.1", "0.3", "1", "--seeds", "5"),
    ),
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
