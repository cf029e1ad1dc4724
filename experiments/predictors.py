"""Statistics of gradients that are said to predict generalisation, beside coherence, and their rank correlation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.stats

# Added to the excess kurtosis by Hölzl et al.; that of a uniform distribution is −1.2.
_KURTOSIS = 1.2


class Statistics(NamedTuple):
    """Of the gradients of a sample at one point of parameter space."""

    gsnr: float
    gwa: float


# Σ g and Σ g² of each tensor, and the alignment [n] of each example.
_Sums = tuple[list[jax.Array], list[jax.Array], jax.Array]


@jax.jit
def _sums(params: Any, images: jax.Array, labels: jax.Array) -> _Sums:
    """Of dense layers with ReLU, whose gradients are a δᵀ with a the input of a layer and δ the loss by its output."""
    layers = [params["params"][f"Dense_{i}"] for i in range(len(params["params"]))]
    inputs = [images.reshape(len(images), -1)]
    for layer in layers[:-1]:
        inputs.append(jax.nn.relu(inputs[-1] @ layer["kernel"] + layer["bias"][None]))
    head = layers[-1]
    scores = inputs[-1] @ head["kernel"]
    delta = jax.nn.softmax(scores + head["bias"][None]) - jax.nn.one_hot(labels, scores.shape[-1])
    norms = jnp.linalg.norm(inputs[-1], axis=1) * jnp.linalg.norm(delta, axis=1) * jnp.linalg.norm(head["kernel"])
    aligned = -(scores * delta).sum(1) / jnp.where(norms > 0, norms, 1)
    first, second = [], []
    for a, layer in zip(reversed(inputs), reversed(layers), strict=True):
        first += [a.T @ delta, delta.sum(0)]
        second += [(a * a).T @ (delta * delta), (delta * delta).sum(0)]
        delta = (delta @ layer["kernel"].T) * (a > 0)
    return first, second, aligned


def statistics(params: Any, images: jax.Array, labels: jax.Array) -> Statistics:
    """GSNR and GWA of an MLP on a sample of n examples, with gᵢ the gradient of one example's loss.

    GSNR, the gradient signal-to-noise ratio, is the mean of E[g]² / Var[g] over the parameters that have a variance
    (Liu et al. 2020, arXiv 2001.07384); without the bias 1/n that the square of a mean has, as α unbiased. GWA, the
    gradient–weight alignment, is mean γ / (excess kurtosis of γ + 1.2) with γᵢ the cosine between −gᵢ and the weights,
    both of the last layer without its bias (Hölzl et al. 2025, arXiv 2510.25480).
    """
    count = len(labels)
    first, second, aligned = jax.device_get(_sums(params, images, labels))
    mean, mean_sq = (np.concatenate([x.ravel() for x in part]).astype(np.float64) / count for part in (first, second))
    variance = (mean_sq - mean**2) * count / (count - 1)
    varies = variance > 0
    gsnr = (mean[varies] ** 2 / variance[varies]).mean() - 1 / count
    gwa = aligned.mean(dtype=np.float64) / (scipy.stats.kurtosis(aligned.astype(np.float64)) + _KURTOSIS)
    return Statistics(float(gsnr), float(gwa))


def tau(first: pd.Series, second: pd.Series) -> float:
    """Kendall's τ-b where both have numbers; NaN where one of them is constant, or fewer than two are left."""
    both = np.stack([first.to_numpy(float), second.to_numpy(float)], 1)
    both = both[np.isfinite(both).all(1)]
    if len(both) < 2 or (both == both[0]).all(0).any():
        return float("nan")
    result: Any = scipy.stats.kendalltau(both[:, 0], both[:, 1])
    return float(result.statistic)


def correlations(runs: pd.DataFrame, first: str, second: str, factors: tuple[str, ...], factor: str = "") -> pd.Series:
    """Kendall's τ of two columns for each seed, over all its cells; with `factor`, the mean over its lines.

    A line is the cells that differ in that factor alone. Those without a τ are left out; NaN where none is left.
    """
    others = ["seed", *(name for name in factors if factor and name != factor)]
    taus = [(key[0], tau(line[first], line[second])) for key, line in runs.groupby(others)]
    return pd.DataFrame(taus, columns=["seed", "tau"]).groupby("seed")["tau"].mean()


def signs(runs: pd.DataFrame, first: str, second: str, factors: tuple[str, ...], factor: str) -> tuple[int, int]:
    """How many lines have a negative τ of the two columns' means over seeds, and how many a positive one."""
    means = runs.groupby([*factors])[[first, second]].mean().reset_index()
    others = [name for name in factors if name != factor]
    values = np.array([tau(line[first], line[second]) for _, line in means.groupby(others)])
    return int((values < 0).sum()), int((values > 0).sum())
