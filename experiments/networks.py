"""The networks of the ImageNet experiments, in Flax linen: ResNet-50 and ViT-S/16."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GROUPS = 32
_HEAD_WIDTH = 64


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside the input; the last has 4 · features channels, and starts at zero."""

    features: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, height, width, channels] → [B, height/stride, width/stride, 4 · features]."""
        conv, last = partial(nn.Conv, use_bias=False), 4 * self.features
        y = nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(conv(last, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(last, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, or of as many as there are channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, …, channels] → the same."""
        groups = min(_GROUPS, x.shape[-1])
        return nn.GroupNorm(num_groups=groups, epsilon=self.epsilon, scale_init=self.scale_init, name="norm")(x)


class ResNet50(nn.Module):
    """He et al. 2016, https://arxiv.org/abs/1512.03385, strides in the 3×3 convolutions; 25.6 million parameters.

    norm "batch" is the original; of it a collection "batch_stats" holds running averages. norm "group" (Wu & He 2018,
    https://arxiv.org/abs/1803.08494) makes an example's gradient its own.
    """

    norm: str = "batch"
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]; train: BatchNorm by this batch."""
        norm = partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5) if self.norm == "batch" else GroupNorm
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not block else 1, norm)(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Block(nn.Module):
    """Self-attention and an MLP, each on a LayerNorm of its input and beside it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, positions, width] → the same."""
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(max(1, width // _HEAD_WIDTH))(y, y)
        y = nn.Dense(4 * width)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(y))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929; by default ViT-S/16, 22.1 million parameters."""

    width: int = 384
    depth: int = 12
    patch: int = 16
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        height, width = x.shape[1:3]
        if min(height, width) < self.patch:
            raise ValueError(f"Expected images of {self.patch} × {self.patch} pixels or more, got {height} × {width}.")
        x = nn.Conv(self.width, (self.patch, self.patch), self.patch, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            x = Block()(x)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x)[:, 0])
