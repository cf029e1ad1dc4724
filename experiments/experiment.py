"""What an experiment is."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from .configs import Config, RunConfig
from .loop import Problem
from .run_folder import RunFolder
from .section import Row, Section

OneConfig = TypeVar("OneConfig", bound=Config)
ManyConfig = TypeVar("ManyConfig", bound=RunConfig)


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[OneConfig]):
    """One experiment: all of it stands in one file, and one line of registry.py names it.

    The command line has the fields of `config`'s class as options, their values as defaults, and `help` or the class's
    docstring as help.
    """

    config: OneConfig
    measure: Callable[[OneConfig, Problem, RunFolder], None]  # train and measure, from where the folder stands
    section: Callable[[OneConfig, list[Row], Path], Section]  # claims, tables, and figures drawn into a folder, of rows
    help: str = ""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return self.config.name

    def parts(self, config: OneConfig) -> tuple[OneConfig]:
        """Itself."""
        return (config,)


@dataclasses.dataclass(frozen=True)
class Several(Generic[ManyConfig]):
    """Experiments that are run one after another into folders of one folder, with one report."""

    config: ManyConfig
    configs: Callable[[ManyConfig], Sequence[Config]]  # of its experiments, by their names
    help: str = ""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return self.config.name

    def parts(self, config: ManyConfig) -> tuple[Config, ...]:
        """The configs of its experiments."""
        return tuple(self.configs(config))


AnyExperiment = Experiment[Any] | Several[Any]
