"""What every comparison of methods has: its options, its trainings, what is measured, and the learning rates."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from .configs import TFDS, Config, MethodNames
from .data import RARE_CLASS, Noise
from .devices import of_first
from .examples import Examples
from .loop import Training
from .methods import EPOCH_UNIT, METHODS, check_method
from .models import MODELS
from .section import Row

# What reports say of the options and the methods below.
BY_EXAMPLE = (
    "Other methods take the same three mini-batches as one batch of {batch} examples, and a robust average of their "
    "single gradients: clip scales every gradient down to the median norm of the batch; agreement takes the half that "
    "agrees best with the sum of the others; clip + agreement clips at the first quartile and then takes the 70% that "
    "agree best; the geometric median is four steps of Weiszfeld's iteration; smallest losses is the mean over the 70%"
    " whose loss is smallest; the winsorised mean moves the outer quarter of the values of each coordinate inwards, on "
    "either side. GAF, a rival, adds up those of the three mini-batches that agree with the first (cosine distance up "
    "to 0.97) and skips the step where none does. These shares are the same whatever share of the labels is wrong."
)
SELECTED = (
    "Their labels are as wrong as the others. The selected epoch is the first of those with the highest accuracy on "
    "them, which for SGD is early stopping."
)
TUNED = (
    "Each method takes the learning rate of {rates} that validates best: it is trained once with each, on a seed that "
    "is not reported, and the highest validation accuracy of any epoch decides."
)


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(Config):
    """Options that every comparison of methods has."""

    validation: float = 0.0
    """Share of the training examples that is held out, with its labels as they are, wrong ones too. The epoch of the
    highest accuracy on it is the selected one."""
    learning_rates: tuple[float, ...] = ()
    """Of several, each method takes the one that validates best: it is trained with each, on a seed that is not
    reported, and the highest validation accuracy of any epoch decides. Of one, that; of none, learning_rate."""
    coherence: bool = True
    """Measure the coherence of the training sample too; each time costs about an epoch of training."""
    methods: MethodNames = ("sgd", "mean3", "m3", "rm3", "ra3")
    """What is compared. Of mini-batches: sgd; m3, the median of 3, mean3, its control, and gaf, the mean of those that
    agree; rm3, the median of the last 3, and ra3, its control. Of the examples of the batch of mean3: clip, agreement,
    clip_agreement (composed), geomed (geometric median), trim_loss and, for mlp, winsorized."""

    @property
    def samples(self) -> tuple[str, ...]:
        """The training sample, or none."""
        return ("train",) if self.coherence else ()

    def check(self) -> None:
        """ValueError where methods, validation or learning_rates are wrong."""
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"Expected methods to be different ones, at least one, got methods={self.methods}.")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"Expected methods in {(*METHODS,)}, got {method}.")
            check_method(method, self.model, batch_norm=MODELS[self.model].batch_norm)
        if not 0 <= self.validation < 1:
            raise ValueError(f"Expected 0 <= validation < 1, got validation={self.validation}.")
        if self.validation and self.data.startswith(TFDS):
            raise ValueError(f"Expected no validation for data={self.data}, got validation={self.validation}.")
        rates = self.learning_rates
        if any(not 0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"Expected learning_rates to be different, > 0 and finite, got learning_rates={rates}.")
        if len(rates) > 1 and not self.validation:
            raise ValueError(f"Expected validation > 0 to choose from learning_rates={rates}, got validation=0.")

    def check_size(self, num_train: int) -> None:
        """ValueError where nothing is held out, or too little is left."""
        held_out = round(self.validation * num_train)
        if self.validation and not held_out:
            raise ValueError(f"Expected validation to be an example or more of {num_train}, got {self.validation}.")
        least = EPOCH_UNIT * self.batch_size
        if num_train - held_out < least:
            what = f"validation to leave {least} training examples, {EPOCH_UNIT} mini-batches"
            raise ValueError(f"Expected {what}, got validation={self.validation} of {num_train}.")


def training(
    config: ComparisonConfig, method: str, seed: int, noise: Noise, rate: float, marks: Mapping[str, Any]
) -> Training:
    """The training of a method that is reported. Where learning_rates are given, its rows say the one of this."""
    rates = {"learning_rate": rate} if config.learning_rates else {}
    return Training(
        " · ".join((config.name, *map(str, marks.values()), method, f"seed {seed}")),
        {**marks, "method": method, "seed": seed, **rates},
        method,
        noise,
        measurement(config, noise),
        _shown,
        rates,
    )


def _shown(row: Row) -> dict[str, str]:
    shown = {"loss": ".3f", "r": ".1f", "test": ".3f"} if "loss" in row else {"test": ".3f"}
    return {name: format(row[name], form) for name, form in shown.items() if name != "test" or "loss" not in row}


def tunings(config: ComparisonConfig, methods: Sequence[str], noise: Noise, marks: Mapping[str, Any]) -> list[Training]:
    """The trainings that choose the learning rates; none where there is no choice.

    On the seed before the first, which is not reported; accuracy on the validation examples is all that is measured.
    """
    if len(config.learning_rates) < 2:
        return []
    seed = (config.seed - 1) % 2**32
    return [
        Training(
            " · ".join((config.name, "tuning", *map(str, marks.values()), method, f"learning rate {rate:g}")),
            {"tuning": True, **marks, "method": method, "seed": seed, "learning_rate": rate},
            method,
            noise,
            _validation,
            lambda row: {"valid": f"{row['valid']:.3f}"},
            {"learning_rate": rate},
        )
        for method in methods
        for rate in config.learning_rates
    ]


def chosen(config: ComparisonConfig, methods: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate of each method, from the rows of its tuning: the one that validates best at any epoch.

    Of equals the first. Of several processes the first one's rows count.
    """
    rates = config.learning_rates or (config.learning_rate,)
    if len(rates) == 1:
        return dict.fromkeys(methods, rates[0])
    best = np.full((len(methods), len(rates)), -1.0)
    for row in rows:
        if row.get("tuning") and row["method"] in methods:
            cell = methods.index(row["method"]), rates.index(row["learning_rate"])
            best[cell] = max(best[cell], row["valid"])
    return {method: rates[i] for method, i in zip(methods, of_first(best.argmax(1)).tolist(), strict=True)}


def reported(rows: Sequence[Row]) -> list[Row]:
    """Without those of the tuning."""
    return [row for row in rows if not row.get("tuning")]


def _validation(examples: Examples, model: nn.Module, params: Any) -> Row:
    valid = examples.guess("valid", model, params)
    return {"valid": _mean(valid.guess == valid.labels)}


def measurement(config: ComparisonConfig, noise: Noise) -> Callable[[Examples, nn.Module, Any], Row]:
    """Accuracies, as shares; with coherence, training loss and m-coherence too."""

    def measure(examples: Examples, model: nn.Module, params: Any) -> Row:
        coherence = None
        if config.coherence:
            coherence, train = examples.measure("train", model, params)
        else:
            train = examples.guess("train", model, params)
        test = examples.guess("test", model, params)
        row: Row = {"test": _mean(test.guess == test.labels)}
        row |= shares(train.guess, train.labels, train.true)
        if coherence is not None:
            row |= {"loss": float(coherence.loss), "r": float(coherence.m_coherence)}
        row |= {"gap": row["train"] - row["test"], "chance": 1 / model.num_classes}
        if noise.validation:
            row |= _validation(examples, model, params)
        if noise.rare < 1:
            row["rare"] = _mean((test.guess == test.true)[test.true == RARE_CLASS])
        return row

    return measure


def shares(guess: np.ndarray, labels: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy on all training examples as labelled, on pristine ones, and on corrupt ones by either label.

    NaN where there are none.
    """
    corrupt = labels != true
    return {
        "train": _mean(guess == labels),
        "pristine": _mean((guess == true)[~corrupt]),
        "corrupt": _mean((guess == labels)[corrupt]),
        "corrupt_true": _mean((guess == true)[corrupt]),
        "corrupt_share": _mean(corrupt),
    }


def _mean(right: np.ndarray) -> float:
    return round(float(right.mean()), 5) if right.size else math.nan
