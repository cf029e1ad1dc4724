"""Every function that takes a loss, by every way through it."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cg_jax as cg

W = jnp.arange(1.0, 5.0)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
MASK = np.array([True, False, True, True, True, True, False, True])


def loss_fn(w, x):
    return jnp.tanh(w @ x) ** 2


def of_batch(loss):
    """The mean loss of a batch, by a function that holds `loss`."""
    return lambda w, batch, *more: jax.vmap(lambda x: loss(w, x, *more))(batch).mean()


def explicit(f):
    """f(params, batch) on a mesh with Explicit axes."""
    there = mesh_of(8, kind=AxisType.Explicit)
    with jax.set_mesh(there):
        return f(jax.device_put(W, NamedSharding(there, P())), jax.device_put(X, NamedSharding(there, P("data"))))


def in_shard_map(f):
    """f(params, rows) of each device's own rows."""
    return jax.jit(jax.shard_map(f, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P("data")))(W, X)


# (loss, options of the call); "batch" takes a mean loss.
TAKERS = {
    "grad_moments": lambda f, **k: cg.grad_moments(f)(W, X, **k),
    "grad_moments, vmap": lambda f, **k: cg.grad_moments(f, method="vmap")(W, X, **k),
    "grad_moments, mask": lambda f, **k: cg.grad_moments(f)(W, X, MASK, **k),
    "per_example_sq_norms": lambda f, **k: cg.per_example_sq_norms(f)(W, X, **k),
    "per_example_grads": lambda f, **k: cg.per_example_grads(f)(W, X, **k),
    "alignments": lambda f, **k: cg.alignments(f)(W, X, W, **k),
    "confidence": lambda f, **k: cg.measure_coherence(f, W, X, batch_size=4, confidence=True, **k),
    "signs": lambda f, **k: cg.measure_coherence(f, W, X, batch_size=4, estimator="signs", **k),
    "batch": lambda f, **k: cg.measure_coherence(f, W, X, batch_size=2, estimator="batch", **k),
    "mesh": lambda f, **k: cg.measure_coherence(f, W, X, batch_size=8, mesh=mesh_of(8), confidence=True, **k),
    "explain": lambda f, **k: cg.explain(f, W, X[0], **k),
}


def suited(loss, name):
    """A loss of one example, as the taker of that name wants it."""
    return of_batch(loss) if name == "batch" else loss
