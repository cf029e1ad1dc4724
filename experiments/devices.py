"""The devices of a run: one, all of this machine's, or those of several processes on several machines."""

import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.configs import Cluster

# When a process has not answered for so long, the others end.
_SECONDS = 20


def start(cluster: Cluster) -> None:
    """Join the other processes: those that the options tell of, or that the environment does.

    Raises:
        ValueError: Some of the three options are given, but not all.
    """
    given = [cluster.coordinator, cluster.num_processes, cluster.process_id]
    if any(value is not None for value in given) and any(value is None for value in given):
        raise ValueError("Expected coordinator, num_processes and process_id together, got only some of them.")
    if cluster.coordinator is None and not _told_by_environment():
        return
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        heartbeat_timeout_seconds=_SECONDS,
    )


def _told_by_environment() -> bool:
    """Whether a launcher that `jax.distributed.initialize` knows has started several processes."""
    number = max(int(os.environ.get(name) or 1) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    hosts = max(os.environ.get(name, "").count(",") + 1 for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return number > 1 or hosts > 1 or kubernetes or "JAX_COORDINATOR_ADDRESS" in os.environ


def exit_with(main: Callable[[], int]) -> None:
    """End this process as `main` does.

    Of several processes one that fails ends at once: an orderly end would wait for the others, and they for it.
    """
    try:
        status = main()
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        status = 1
    if status and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def writes() -> bool:
    """Whether this process writes files and draws bars: the first does."""
    return jax.process_index() == 0


def agreed(error: Exception | None) -> None:
    """Raise `error`, which the first process met, in it; end the others."""
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if failed and error is None:
            raise ValueError("the first process says why.")
    if error is not None:
        raise error


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes. Without a mesh, on one device."""

    mesh: Mesh | None

    def replicate(self, tree: Any) -> Any:
        """The whole of `tree` on every device."""
        return jax.device_put(tree) if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, P()))

    def spread(self, rows: Any) -> Any:
        """Rows [B, …], B/n of them on each device; all of them on every device where n does not divide B."""
        if self.mesh is None or len(rows) % self.mesh.size:
            return self.replicate(rows)
        return jax.device_put(rows, NamedSharding(self.mesh, P("data")))


@functools.cache
def devices() -> Devices:
    """All devices of all processes, along one axis "data"."""
    number = len(jax.devices())
    return Devices(None if number == 1 else jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,)))
