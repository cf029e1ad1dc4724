"""EXPERIMENTS: everything that can be run, by name. A new experiment is one file, and one line here."""

from . import (
    adversarial_init,
    bound,
    calibration,
    coherence,
    coherence_batch_norm,
    coherence_networks,
    demo,
    early_stopping,
    easy_hard,
    illustration,
    imagenet,
    linear_to_deep,
    noise,
    noisy_labels,
    predictor,
    robust,
    width_depth,
    winsorize,
)
from .experiment import AnyExperiment


def by_name(*experiments: AnyExperiment) -> dict[str, AnyExperiment]:
    """Experiments by their names; ValueError where one has none, or that of another."""
    names = [each.name for each in experiments]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"Expected a name of its own for every experiment, got {names}.")
    return dict(zip(names, experiments, strict=True))


EXPERIMENTS = by_name(
    calibration.EXPERIMENT,
    coherence.EXPERIMENT,
    coherence_networks.EXPERIMENT,
    coherence_networks.MLP,
    coherence_networks.CNN,
    coherence_networks.RESNET,
    coherence_batch_norm.EXPERIMENT,
    noise.EXPERIMENT,
    demo.EXPERIMENT,
    imagenet.COHERENCE,
    imagenet.NOISE,
    robust.EXPERIMENT,
    noisy_labels.EXPERIMENT,
    early_stopping.EXPERIMENT,
    easy_hard.EXPERIMENT,
    width_depth.EXPERIMENT,
    linear_to_deep.EXPERIMENT,
    adversarial_init.EXPERIMENT,
    bound.EXPERIMENT,
    illustration.EXPERIMENT,
    winsorize.EXPERIMENT,
    predictor.EXPERIMENT,
)
