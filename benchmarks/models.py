"""The models of the benchmark: each a loss of one example, parameters and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


class ScannedViT(nn.Module):
    """The same transformer with its blocks' parameters stacked, in a scan of checkpoints."""

    dim: int = 192
    depth: int = 6
    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, 10]."""

        class Layer(nn.Module):
            heads: int

            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return Block(self.heads, causal=False)(x), None

        x = nn.Conv(self.dim, (4, 4), (4, 4), padding="VALID")(x).reshape(x.shape[0], -1, self.dim)
        layers = nn.scan(nn.remat(Layer), {"params": 0}, split_rngs={"params": True}, length=self.depth)
        return nn.Dense(10)(nn.LayerNorm()(layers(self.heads)(x, None)[0]).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer over the rows of an image; its cell concatenates its kernels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, 10]."""
        rows = x.reshape(*x.shape[:2], -1)
        states = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(128))(rows))
        return nn.Dense(10)(states[:, -1])


# Parameters and a function that makes the weights of them, of a model's own parameters.
View = Callable[[Any], tuple[Any, Callable[[Any], Any]]]


def _of_kernels(change: Callable[[jax.Array], jax.Array]) -> View:
    def view(params: Any) -> tuple[Any, Callable[[Any], Any]]:
        return params, lambda params: jax.tree.map(lambda p: change(p) if p.ndim > 1 else p, params)

    return view


def _masked(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    rng = np.random.default_rng(0)
    masks = jax.tree.map(lambda p: jnp.asarray(rng.integers(0, 2, p.shape), p.dtype), params)
    return params, lambda params: jax.tree.map(jnp.multiply, params, masks)


def _low_rank(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """LoRA of rank 8 (Hu et al. 2021): the weights are frozen, and each is given an update A B."""
    rng = np.random.default_rng(0)

    def factors(p: jax.Array) -> Any:
        a, b = (jnp.asarray(0.1 * rng.normal(size=s), p.dtype) for s in ((p.shape[0], 8), (8, p.shape[-1])))
        return {"a": a, "b": b}

    frozen, structure = jax.tree.flatten(params)
    trained = [factors(p) if p.ndim > 1 else {"b": p} for p in frozen]

    def weights(trained: list[Any]) -> Any:
        pairs = zip(frozen, trained, strict=True)
        return jax.tree.unflatten(structure, [p + t["a"] @ t["b"] if "a" in t else t["b"] for p, t in pairs])

    return trained, weights


def _constrained(p: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    return jax.lax.with_sharding_constraint(p, NamedSharding(mesh, PartitionSpec()))


class Model(NamedTuple):
    """A model of the benchmark."""

    module: nn.Module
    example: tuple[int, ...]  # shape of one image, or (tokens,)
    batch_sizes: tuple[int, ...]
    view: View = _of_kernels(lambda p: p)


_MLP, _IMAGE = MLP(), (28, 28, 1)
MODELS = {
    "MLP 784-512-512-10": Model(MLP(), (28, 28, 1), (8, 32, 128, 512)),
    "CNN 5x5 (16, 32)": Model(CNN(), (28, 28, 1), (8, 32, 128, 512)),
    "ResNet-8 GroupNorm": Model(ResNet(), (32, 32, 3), (8, 32, 128)),
    "ResNet-18 GroupNorm": Model(ResNet(width=64, depth=18), (32, 32, 3), (8, 32, 128)),
    "ViT patch 4, dim 192, 6 blocks": Model(ViT(), (32, 32, 3), (8, 32, 128)),
    "GPT dim 256, 4 blocks, tied": Model(GPT(), (256,), (8, 32)),
    "MLP, kernels scaled": Model(_MLP, _IMAGE, (128,), _of_kernels(lambda p: 0.5 * p)),
    "MLP, kernels masked": Model(_MLP, _IMAGE, (128,), _masked),
    "MLP, sharding constraint": Model(_MLP, _IMAGE, (128,), _of_kernels(_constrained)),
    "MLP, LoRA of rank 8": Model(_MLP, _IMAGE, (128,), _low_rank),
    "LSTM over 28 rows": Model(Recurrent(), _IMAGE, (128,)),
    "ViT in a scan of checkpoints": Model(ScannedViT(), (32, 32, 3), (32,)),
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
    params, weights = model.view(jax.jit(model.module.init)(jax.random.key(0), inputs[:1]))

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, label = example
        logits = jnp.asarray(model.module.apply(weights(params), x[None]))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    return loss_fn, params, (inputs, labels)
