"""The devices of a run: one, all of this machine's, or those of several processes on several machines."""

import dataclasses
import functools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .configs import Cluster
from .errors import OF_INPUTS

# When a process has not answered for so long, the others end.
_SECONDS = 20
# The options of a process, as JSON, are shorter than this.
_MOST_BYTES = 8192

Result = TypeVar("Result")


def start(cluster: Cluster) -> None:
    """Join the other processes: those that the options tell of, or that the environment does.

    Raises:
        ValueError: The port is taken on this machine, or processes were given different options.
    """
    if cluster.coordinator is None and not _told_by_environment():
        return
    if cluster.coordinator is not None:
        _require_free_port(cluster)
        print(
            f"Process {cluster.process_id} waits for {cluster.num_processes} processes to meet at "
            f"{cluster.coordinator}, for up to {cluster.wait} s. JAX aborts it where one does not come, or two have "
            "the same process_id.",
            file=sys.stderr,
            flush=True,
        )
    # JAX would catch SIGTERM to save checkpoints by; nothing here asks for that, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        initialization_timeout=cluster.wait,
        heartbeat_timeout_seconds=_SECONDS,
    )
    require_same_options(cluster)


def _require_free_port(cluster: Cluster) -> None:
    """ValueError where process 0 could not listen: without this it would wait for the others in vain."""
    if cluster.process_id != 0 or cluster.coordinator is None:
        return
    port = int(cluster.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(f"Expected a free port for coordinator, got {cluster.coordinator}: {error}.") from None


def require_same_options(config: Any) -> None:
    """ValueError, in every process, where processes were given different options: they would run on, each its own way.

    What may differ between machines, folders and the number of the process, is left out.
    """
    mine = {"experiment": config.name, **dataclasses.asdict(config)}
    own = {field.name for field in dataclasses.fields(Cluster)} | {"out", "data_dir"}
    text = json.dumps({name: value for name, value in mine.items() if name not in own}).encode()
    padded = np.frombuffer(text.ljust(_MOST_BYTES), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _MOST_BYTES)
    first, *others = [json.loads(row.tobytes()) for row in rows]
    for process, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                values = f"{name}={first.get(name)} in process 0 and {name}={other.get(name)} in process {process}"
                raise ValueError(f"Expected the same options in all processes, got {values}.")


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
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("Where this is about a connection, another process has ended: its output says why.", file=sys.stderr)
        status = 1
    if status and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def writes() -> bool:
    """Whether this process writes files and draws bars: the first does."""
    return jax.process_index() == 0


def together(first: Callable[[], Result], others: Callable[[], Result]) -> Result:
    """What `first` returns, in the first process, and `others`, in the others; where one fails, all end.

    Raises:
        ValueError: Another process failed.
    """
    error: Exception | None = None
    try:
        result = first() if writes() else others()
    except OF_INPUTS as met:
        error = met
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(error is not None)))
        if failed.size and error is None:
            raise ValueError(f"Process {failed[0]} could not go on, and says why.")
    if error is not None:
        raise error
    return result  # type: ignore[possibly-unbound]


def of_first(values: np.ndarray) -> np.ndarray:
    """Whole numbers of the first process, in all of them."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values.astype(np.int32)))


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes. Without a mesh, on one device."""

    mesh: Mesh | None

    def replicate(self, tree: Any) -> Any:
        """The whole of `tree` on every device."""
        return jax.device_put(tree) if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, P()))

    def spread(self, rows: Any, axis: int = 0) -> Any:
        """Rows along an axis of length B, B/n of them on each device; all on every device where n does not divide B."""
        if self.mesh is None or rows.shape[axis] % self.mesh.size:
            return self.replicate(rows)
        return jax.device_put(rows, NamedSharding(self.mesh, P(*[None] * axis, "data")))

    def assemble(self, tree: Any, axis: int = 0) -> Any:
        """Arrays whose rows, here those of this process, follow those of the processes before it; divided."""
        if self.mesh is None or jax.process_count() == 1:
            return jax.tree.map(lambda rows: self.spread(rows, axis), tree)
        sharding = NamedSharding(self.mesh, P(*[None] * axis, "data"))
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), tree)


@functools.cache
def devices() -> Devices:
    """All devices of all processes, along one axis "data"."""
    number = len(jax.devices())
    return Devices(None if number == 1 else jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,)))
