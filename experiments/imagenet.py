"""The paper's two ImageNet figures: coherence and noise with a ResNet-50."""

import dataclasses
from typing import TypeVar

from . import coherence, noise
from .coherence import CoherenceConfig
from .configs import TFDS, Config
from .noise import NoiseConfig

AnyConfig = TypeVar("AnyConfig", bound=Config)


def on_imagenet(config: AnyConfig) -> AnyConfig:
    """The same with ResNet-50 on ImageNet: the usual recipe for this network without momentum."""
    return dataclasses.replace(
        config,
        name=f"imagenet-{config.name}",
        data=f"{TFDS}imagenet2012",
        model="resnet50",
        estimator="batch",
        weight_decay=1e-4,
        decay_at=(30, 60, 80),
        batch_size=256,
        measure_batch_size=256,
        epochs=90,
        save_every=5000,
    )


COHERENCE = dataclasses.replace(
    coherence.EXPERIMENT,
    config=on_imagenet(CoherenceConfig()),
    help="""Coherence of a ResNet-50 while it trains on ImageNet, with real and with random labels: the paper's figure.

    `imagenet-coherence --data-dir FOLDER`: 90 epochs with each kind of labels, measured 99 times. How many hours:
    docs/imagenet.md.""",
)
NOISE = dataclasses.replace(
    noise.EXPERIMENT,
    config=on_imagenet(NoiseConfig(methods=("sgd", "m3", "mean3"))),
    help="""A ResNet-50 on ImageNet with half of the labels redrawn, SGD against M3: the paper's figure.

    `imagenet-noise --data-dir FOLDER`: 90 epochs by SGD, M3 and M3's control, measured after each. How many hours:
    docs/imagenet.md.""",
)
