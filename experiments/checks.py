"""The options of an experiment, checked before anything is loaded or written."""

import math

from .configs import TFDS, Cluster, Config, SeededConfig
from .data import DATASETS
from .models import MODELS

# Keys are made of seeds of 32 bits; a larger one would silently be the same as a smaller.
_SEEDS = 2**32


def check_cluster(cluster: Cluster) -> None:
    """ValueError where the options that tell of other processes do not fit together."""
    given = {name: getattr(cluster, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if cluster.wait < 1:
        raise ValueError(f"Expected wait >= 1, got wait={cluster.wait}.")
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(
            f"Expected coordinator, num_processes and process_id together, got no {' and no '.join(missing)}."
        )
    host, _, port = str(cluster.coordinator).rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"Expected coordinator as HOST:PORT, got coordinator={cluster.coordinator}.")
    if given["num_processes"] < 1:
        raise ValueError(f"Expected num_processes >= 1, got num_processes={cluster.num_processes}.")
    if not 0 <= given["process_id"] < given["num_processes"]:
        numbers = f"process_id={cluster.process_id} and num_processes={cluster.num_processes}"
        raise ValueError(f"Expected 0 <= process_id < num_processes, got {numbers}.")


_COUNTS = (
    *("epochs", "batch_size", "measure_batch_size", "num_train", "num_test", "width", "depth"),
    *("image_size", "num_measured", "read_threads", "every", "save_every"),
)


def check(config: SeededConfig) -> None:
    """ValueError naming the option, its value and its bound, before anything is loaded or written."""
    check_cluster(config)
    if config.seeds < 1:
        raise ValueError(f"Expected seeds >= 1, got seeds={config.seeds}.")
    if config.seed < 0:
        raise ValueError(f"Expected seed >= 0 and finite, got seed={config.seed}.")
    if config.seed + config.seeds > _SEEDS:
        raise ValueError(f"Expected seed + seeds <= 2**32, got seed={config.seed} and seeds={config.seeds}.")
    if isinstance(config, Config):
        _check_training(config)
    config.check()


def _check_training(config: Config) -> None:
    for name in _COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1, got {name}={value}.")
    for name in ("early", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"Expected {name} >= 0 and finite, got {name}={getattr(config, name)}.")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"Expected learning_rate > 0 and finite, got learning_rate={config.learning_rate}.")
    if config.log_grid < 0:
        raise ValueError(f"Expected log_grid >= 0, got log_grid={config.log_grid}.")
    _check_data(config)
    if any(epoch < 1 for epoch in config.decay_at) or len(set(config.decay_at)) < len(config.decay_at):
        raise ValueError(f"Expected decay_at to be different epochs >= 1, got decay_at={config.decay_at}.")
    _check_model(config)


def _check_model(config: Config) -> None:
    if config.model not in MODELS:
        raise ValueError(f"Expected model in {(*MODELS,)}, got model={config.model}.")
    depths = MODELS[config.model].depths
    if config.depth is not None and depths is not None and config.depth not in depths:
        allowed = f"depth in {depths}" if depths else "no depth"
        raise ValueError(f"Expected {allowed} for {config.model}, got depth={config.depth}.")


def _check_data(config: Config) -> None:
    if config.data.startswith(TFDS) and config.data != TFDS:
        return
    if config.data not in DATASETS:
        raise ValueError(f"Expected data in {(*DATASETS,)} or {TFDS}NAME, got data={config.data}.")
    options = ("image_size", "num_measured", *(() if DATASETS[config.data].reads_folder else ("data_dir",)))
    for name in options:
        value = getattr(config, name)
        if value != getattr(Config, name):
            raise ValueError(f"Expected no {name} for data={config.data}, which does not use it, got {name}={value}.")
