"""Small classifiers in Flax linen, and the loss of one example."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    width: int = 512
    depth: int = 2
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Two convolutions of 5×5 with max-pooling, one hidden dense layer."""

    width: int = 16
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        for features in (self.width, 2 * self.width):
            x = nn.relu(nn.Conv(features, (5, 5))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class ResidualBlock(nn.Module):
    """norm-ReLU-conv twice, beside the input (He et al. 2016, pre-activation)."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, height, width, channels] → [B, height/stride, width/stride, features]."""
        groups = min(8, self.features)
        y = nn.relu(nn.GroupNorm(min(8, x.shape[-1]))(x))
        if x.shape[-1] != self.features or self.stride > 1:
            x = nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(y)
        y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(y)
        y = nn.relu(nn.GroupNorm(groups)(y))
        return x + nn.Conv(self.features, (3, 3), use_bias=False)(y)


class ResNet(nn.Module):
    """Residual network with GroupNorm, so that an example's gradient is its own; 8 layers or 18."""

    width: int = 16
    depth: int = 8
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        stages, blocks = {8: (3, 1), 18: (4, 2)}[self.depth]
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        for stage in range(stages):
            for block in range(blocks):
                x = ResidualBlock(self.width * 2**stage, 2 if stage and not block else 1)(x)
        x = nn.relu(nn.GroupNorm(min(8, x.shape[-1]))(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def build(name: str, width: int | None, depth: int | None, num_classes: int) -> nn.Module:
    """The model called `name`; None stands for its default."""
    kind = {"mlp": MLP, "cnn": CNN, "resnet": ResNet}[name]
    options = {"width": width} | ({} if name == "cnn" else {"depth": depth})
    return kind(num_classes=num_classes, **{key: value for key, value in options.items() if value is not None})


@functools.cache
def loss_of(model: nn.Module) -> Callable[[Any, Any], jax.Array]:
    """loss_fn(params, (image, label)) → cross-entropy in nats; the same function object for equal models."""

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, label = example
        logits = model.apply(params, image[None])
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits)[0], label)

    return loss_fn


@functools.cache
def predictor(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """The jitted function (params, images) → predicted classes [B]."""
    return jax.jit(lambda params, images: jnp.asarray(model.apply(params, images)).argmax(-1))
