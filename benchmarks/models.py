"""The models of the benchmark: each a loss of one example, parameters and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models import CNN, MLP, ResNet


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP four times as wide."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, dim] → [B, T, dim]."""
        dim = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(dim)(nn.gelu(nn.Dense(4 * dim)(nn.LayerNorm()(x))))


class ViT(nn.Module):
    """Vision transformer with mean pooling (Dosovitskiy et al. 2021)."""

    patch: int = 4
    dim: int = 192
    depth: int = 6
    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, 10]."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.dim, size, size, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(self.depth):
            x = Block(self.heads, causal=False)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class GPT(nn.Module):
    """Decoder-only transformer whose embedding is its softmax's matrix too (Radford et al. 2019)."""

    vocabulary: int = 8192
    dim: int = 256
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] → logits [B, T, vocabulary]."""
        embed = nn.Embed(self.vocabulary, self.dim)
        x = embed(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(self.depth):
            x = Block(self.heads, causal=True)(x)
        return embed.attend(nn.LayerNorm()(x))


class Model(NamedTuple):
    """A model of the benchmark."""

    module: nn.Module
    example: tuple[int, ...]  # shape of one image, or (tokens,)
    batch_sizes: tuple[int, ...]


MODELS = {
    "MLP 784-512-512-10": Model(MLP(), (28, 28, 1), (8, 32, 128, 512)),
    "CNN 5x5 (16, 32)": Model(CNN(), (28, 28, 1), (8, 32, 128, 512)),
    "ResNet-8 GroupNorm": Model(ResNet(), (32, 32, 3), (8, 32, 128)),
    "ResNet-18 GroupNorm": Model(ResNet(width=64, depth=18), (32, 32, 3), (8, 32, 128)),
    "ViT patch 4, dim 192, 6 blocks": Model(ViT(), (32, 32, 3), (8, 32, 128)),
    "GPT dim 256, 4 blocks, tied": Model(GPT(), (256,), (8, 32)),
}


def make(model: Model, batch_size: int) -> tuple[Callable[[Any, Any], jax.Array], Any, Any]:
    """(loss_fn of one example, parameters, batch)."""
    rng = np.random.default_rng(0)
    if len(model.example) == 1:
        inputs = jnp.asarray(rng.integers(0, 8192, (batch_size, *model.example)), jnp.int32)
        labels = jnp.roll(inputs, -1, axis=1)
    else:
        inputs = jnp.asarray(rng.normal(size=(batch_size, *model.example)), jnp.float32)
        labels = jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32)
    params = jax.jit(model.module.init)(jax.random.key(0), inputs[:1])

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, label = example
        logits = jnp.asarray(model.module.apply(params, x[None]))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    return loss_fn, params, (inputs, labels)
