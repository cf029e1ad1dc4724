"""One of several processes of a measurement: `python worker.py HOST:PORT NUMBER ID` prints what it found as JSON.

Process p of n holds examples p, p + n, … of 101, so that not all have as many. `python worker.py` alone holds all.
"""

import json
import os
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg

M, BATCH = 101, 16


def loss_fn(p, example):
    x, label = example
    return -jax.nn.log_softmax(jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])[label]


def batch_loss(p, batch):
    return jax.vmap(loss_fn, (None, 0))(p, batch).mean()


def in_batches(data, size):
    for start in range(0, len(data[1]), size):
        yield jax.tree.map(lambda leaf, s=start: leaf[s : s + size], data)


def measurements(number, process):
    """(name, what was measured), one after another."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (20, 16), "b1": (16,), "w2": (16, 8), "b2": (8,)}
    params = {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    data = rng.normal(size=(M, 20)).astype(np.float32), rng.integers(0, 8, M).astype(np.int32)
    spoilt = data[0].copy(), data[1]
    spoilt[0][[7, 60, 100]] = np.nan
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))

    def own(data):
        return jax.tree.map(lambda leaf: leaf[process::number], data)

    def measure(data, params=params, loss=loss_fn, batch_size=BATCH, **more):
        return cg.measure_coherence(loss, params, data, batch_size=batch_size, mesh=mesh, **more)

    yield "arrays", measure(own(data))
    yield "jackknife", measure(own(data), confidence=True)
    yield "batches", measure(in_batches(own(data), BATCH // number))
    yield "uneven batches", measure(in_batches(own(data), 1 + process))
    yield "one batch", measure(own(data), batch_size=10**9)
    yield "small batches", measure(in_batches(own(data), 1 + process), batch_size=10**9)
    yield "skip", measure(own(spoilt), nonfinite="skip")
    # Process p's rows of a batch are its p-th part: the batches are those of one process.
    parts = [leaf[:96].reshape(6, number, BATCH // number, *leaf.shape[1:])[:, process] for leaf in data]
    rests = [leaf[96:][process::number] for leaf in data]
    images, labels = (np.concatenate([p.reshape(-1, *p.shape[2:]), r]) for p, r in zip(parts, rests, strict=True))
    yield "batch", measure((images, labels), loss=batch_loss, estimator="batch")
    images[0] = np.nan
    yield "skip batch", measure((images, labels), loss=batch_loss, estimator="batch", nonfinite="skip")
    divided = jax.device_put(params, {name: NamedSharding(mesh, P("data") if name == "w2" else P()) for name in params})
    yield "fully sharded", measure(own(data), params=divided)
    there = jax.make_array_from_callback((96, 20), NamedSharding(mesh, P("data")), lambda i: data[0][:96][i])
    labels = jax.make_array_from_callback((96,), NamedSharding(mesh, P("data")), lambda i: data[1][:96][i])
    yield "on devices", measure((there, labels))
    try:
        measure(own(spoilt))
    except FloatingPointError as error:
        yield "error", error
    yield "disagreement", _error(lambda: measure(own(data), batch_size=BATCH * (1 + process)))
    yield "other rows", _error(lambda: measure(own((data[0][:, : 20 - process], data[1]))))
    yield "no data", _error(lambda: measure(own(data) if process == 0 else (data[0][:0], data[1][:0])))
    yield "still there", measure(own(data))


def _error(call):
    try:
        call()
    except ValueError as error:
        return error
    return ValueError("none")


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    number, process = 1, 0
    if len(sys.argv) > 1:
        number, process = int(sys.argv[2]), int(sys.argv[3])
        jax.distributed.initialize(sys.argv[1], number, process, heartbeat_timeout_seconds=10)
    found = {}
    for name, result in measurements(number, process):
        if os.environ.get("HANG_AFTER") == name:
            print("measured", flush=True)
            time.sleep(0 if str(process) in os.environ["GOES_ON"] else 3600)
        if isinstance(result, Exception):
            found[name] = str(result)
            continue
        fields = ("alpha", "m_coherence", "loss", "count", "num_skipped", "alpha_stderr", "mean_grad_norm")
        found[name] = {field: float(getattr(result, field)) for field in fields}
        found[name]["w2"] = float(result.per_tensor["w2"].alpha)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
