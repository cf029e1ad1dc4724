"""What an experiment is."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from .configs import RunConfig, SeededConfig
from .run_folder import RunFolder
from .section import Row, Section

OneConfig = TypeVar("OneConfig", bound=SeededConfig)
ManyConfig = TypeVar("ManyConfig", bound=RunConfig)


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[OneConfig]):
    """One experiment: all of it stands in one file, and one line of registry.py names it.

    The command line has the fields of `config`'s class as options, their values as defaults, and `help` or the class's
    docstring as help.
    """

    config: OneConfig
    # (config, problem, folder): train and measure, from where the folder stands. The problem is the loop.Problem that a
    # Config names, and None of a config that names no data set.
    measure: Callable[[OneConfig, Any, RunFolder], None]
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
    configs: Callable[[ManyConfig], Sequence[SeededConfig]]  # of its experiments, by their names
    help: str = ""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return self.config.name

    def parts(self, config: ManyConfig) -> tuple[SeededConfig, ...]:
        """The configs of its experiments."""
        return tuple(self.configs(config))


AnyExperiment = Experiment[Any] | Several[Any]
