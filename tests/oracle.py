"""Float64, the dumbest way: a loop over examples, sums by NumPy."""

from typing import NamedTuple

import jax
import numpy as np


class Statistics(NamedTuple):
    """What the library says of a batch; leaves in the order of jax.tree.leaves of the floating-point parameters."""

    count: int
    losses: np.ndarray  # [B]
    sq_norms: list  # [B] for each tensor
    sum_grads: list  # [*param]
    sum_sq_norms: list  # scalars
    summed: list  # for each tensor the largest Σ |gᵢ| of its coordinates: what rounding of sum_grads is relative to


def is_float(leaf):
    return jax.numpy.issubdtype(np.asarray(leaf).dtype, np.floating)


def per_example(loss_fn, params, batch):
    """(losses [B], gradients [B, *param] of each floating-point tensor), one jax.grad at a time; needs float64 on."""
    leaves, structure = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def loss(kept, example):
        full = list(leaves)
        for place, leaf in zip(places, kept, strict=True):
            full[place] = leaf
        return loss_fn(jax.tree.unflatten(structure, full), example)

    one = jax.jit(jax.value_and_grad(loss))
    losses, grads = [], []
    for i in range(jax.tree.leaves(batch)[0].shape[0]):
        value, grad = one([leaves[p] for p in places], jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        losses.append(float(value))
        grads.append([np.asarray(g, np.float64) for g in grad])
    return np.array(losses), [np.stack(column) for column in zip(*grads, strict=True)]


def statistics(losses, grads, rows=None):
    """The statistics of the rows given (all of them if None); other rows are zero."""
    weights = np.ones(losses.size) if rows is None else np.isin(np.arange(losses.size), rows).astype(float)
    grads = [np.einsum("b...,b->b...", g, weights) for g in grads]
    sq_norms = [np.square(g).reshape(g.shape[0], -1).sum(1) for g in grads]
    return Statistics(
        count=int(weights.sum()),
        losses=losses * weights,
        sq_norms=sq_norms,
        sum_grads=[g.sum(0) for g in grads],
        sum_sq_norms=[q.sum() for q in sq_norms],
        summed=[np.abs(g).sum(0).max() for g in grads],
    )


def ratios(grads):
    """α, r and their relatives of gradients [m, P]."""
    m, s, q = grads.shape[0], np.square(grads.sum(0)).sum(), np.square(grads).sum()
    r = s / q
    alpha = r / m
    unbiased = (r - 1) / (m - 1)
    return {
        "alpha": alpha,
        "m_coherence": r,
        "alpha_unbiased": unbiased,
        "noise_scale": (1 - alpha) / alpha,
        "noise_scale_unbiased": (1 - unbiased) / unbiased,
        "diversity": q / s,
        "mean_grad_norm": np.sqrt(s) / m,
    }


def mlp_backprop(params, images, labels):
    """Gradients [B, *param] of w1, b1, w2, b2 under softmax cross-entropy, by hand; no JAX."""
    w1, b1, w2, b2 = params
    grads = [np.zeros((len(labels), *p.shape)) for p in params]
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        z = x @ w1 + b1
        h = np.maximum(z, 0)
        logits = h @ w2 + b2
        p = np.exp(logits - logits.max())
        p /= p.sum()
        d = p - np.eye(len(b2))[y]
        dz = (w2 @ d) * (z > 0)
        for place, g in zip(grads, (np.outer(x, dz), dz, np.outer(h, d), d), strict=True):
            place[i] = g
    return grads
