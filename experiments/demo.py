"""The demo: both experiments, small."""

import dataclasses

from .coherence import CoherenceConfig
from .configs import Hidden, RunConfig
from .experiment import Several
from .noise import NoiseConfig


@dataclasses.dataclass(frozen=True)
class DemoConfig(RunConfig):
    """Both experiments on mnist5k, small: under 5 minutes on 2 CPU cores."""

    name: Hidden = "demo"

    seeds: int = 3
    """Runs with different initialisation, order and noise."""
    epochs: int = 40
    """Passes over the training set, in both experiments."""
    width: int = 256
    """Units of each of the two hidden layers."""

    def parts(self) -> tuple[CoherenceConfig, NoiseConfig]:
        """The two experiments that make the demo."""
        return (
            CoherenceConfig(seeds=self.seeds, epochs=self.epochs, width=self.width),
            NoiseConfig(seeds=self.seeds, epochs=self.epochs, width=self.width),
        )


EXPERIMENT = Several(DemoConfig(), DemoConfig.parts)
