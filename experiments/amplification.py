"""How far a linear network, of any depth, has learnt what examples have in common."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pandas as pd

from .equal_loss import measured
from .examples import Examples
from .section import Row


def directions(images: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(U [classes − 1, classes], V [classes − 1, pixels]): what examples have in common, the strongest direction first.

    Singular vectors of (1/m) Σ (onehot(y) − 1/classes) xᵀ, the step of a linear classifier from zero weights.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64)
    left, _, right = np.linalg.svd((np.eye(num_classes)[labels] - 1 / num_classes).T @ pixels, full_matrices=False)
    return left.T[: num_classes - 1], right[: num_classes - 1]


def along(
    strengths: tuple[np.ndarray, np.ndarray], image_shape: Sequence[int], model: nn.Module, params: Any
) -> np.ndarray:
    """u_k · W v_k for every direction, where the network's outputs are W x + b."""
    left, right = strengths
    pixels = right.shape[1]
    images = np.concatenate([np.eye(pixels, dtype=np.float32), np.zeros((1, pixels), np.float32)])
    outputs = np.asarray(jax.device_get(model.apply(params, images.reshape(-1, *image_shape))), np.float64)
    return np.einsum("kc,pc,kp->k", left, outputs[:-1] - outputs[-1], right)


def measured_linear(
    strengths: tuple[np.ndarray, np.ndarray],
    image_shape: Sequence[int],
    examples: Examples,
    model: nn.Module,
    params: Any,
) -> Row:
    """What is measured of every network, and the strength of every direction."""
    parts = [float(f"{part:.6g}") for part in along(strengths, image_shape, model, params)]
    return measured(examples, model, params) | {"along": parts}


def with_share(table: pd.DataFrame) -> pd.DataFrame:
    """The same with the share of the strongest direction in what was learnt: g₁² / Σ g_k², NaN where nothing was.

    g_k = u_k · (W − W₀) v_k, with W₀ the start.
    """
    table = table.assign(share=np.nan)
    for _, run in table[table["model"] == "deep_linear"].groupby(["depth", "seed"]):
        parts = np.stack(run["along"].to_list())
        squares = (parts - parts[0]) ** 2
        with np.errstate(all="ignore"):
            table.loc[run.index, "share"] = squares[:, 0] / squares.sum(1)
    return table
