"""EXPERIMENTS: everything that can be run, by name. A new experiment is one file, and one line here."""

from . import coherence, demo, imagenet, noise
from .experiment import AnyExperiment

EXPERIMENTS: dict[str, AnyExperiment] = {
    each.name: each
    for each in (
        coherence.EXPERIMENT,
        noise.EXPERIMENT,
        demo.EXPERIMENT,
        imagenet.COHERENCE,
        imagenet.NOISE,
    )
}
