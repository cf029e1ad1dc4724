"""Weights of examples in float64, the dumbest way: loops over materialised gradients."""

import math

import numpy as np


def flat(grads):
    """Gradients [B, *param] of each tensor as one array [B, P]."""
    return np.concatenate([g.reshape(g.shape[0], -1) for g in grads], axis=1)


def norm(g):
    return math.sqrt(float(np.sum(g * g)))


def quantile(values, q):
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def clip_norm(losses, g, max_norm):
    return np.array([1.0 if norm(x) <= max_norm else max_norm / norm(x) for x in g]) / len(g)


def clip_quantile(losses, g, q):
    return clip_norm(losses, g, quantile([norm(x) for x in g], q))


def normalize(losses, g):
    c = quantile([norm(x) for x in g], 0.5)
    return np.array([1.0 if norm(x) == 0 else c / norm(x) for x in g]) / len(g)


def _first(keys, share):
    n = math.ceil(round(share * len(keys), 9))
    chosen = sorted(range(len(keys)), key=lambda i: (keys[i], i))[:n]
    return np.array([1 / n if i in chosen else 0.0 for i in range(len(keys))])


def agreement_scores(g):
    scores = []
    for i, x in enumerate(g):
        others = sum((y for j, y in enumerate(g) if j != i), np.zeros_like(x))
        scores.append(0.0 if norm(x) == 0 else float(x @ others) / norm(x))
    return scores


def agreement(losses, g, share):
    return _first([-score for score in agreement_scores(g)], share)


def trim_loss(losses, g, share):
    return _first(list(losses), share)


def geometric_median(losses, g, iterations):
    z, w = np.zeros(g.shape[1]), np.zeros(len(g))
    for _ in range(iterations + 1):
        distances = [norm(x - z) for x in g]
        epsilon = quantile(distances, 0.5) / 10
        if epsilon == 0:
            w = np.array([1.0 if d == 0 else 0.0 for d in distances])
        else:
            w = np.array([1 / (epsilon + d) for d in distances])
        w = w / w.sum()
        z = sum(wi * x for wi, x in zip(w, g, strict=True))
    return w


def compose(losses, g, *weightings):
    total = np.ones(len(g))
    for weighting in weightings:
        own = weighting(losses, total[:, None] * g)
        total = total * own / own.max()
    return total / total.sum()
