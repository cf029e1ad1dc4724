"""Small classifiers in Flax linen, MODELS by name, and their losses. A new model is one entry."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from .line import Line
from .networks import ResNet50, ViT

# Of the red, green and blue of ImageNet's training images, in [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


class MLP(nn.Module):
    """Dense layers with ReLU between them, or with nothing between them."""

    width: int = 512
    depth: int = 2
    num_classes: int = 10
    linear: bool = False  # no ReLU: a deep linear network
    squared: bool = False  # trained by the squared error against the one-hot label, not by the cross-entropy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = nn.Dense(self.width)(x)
            x = x if self.linear else nn.relu(x)
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Two convolutions of 5×5 with max-pooling, one hidden dense layer; BatchNorm after each convolution or none."""

    width: int = 16
    num_classes: int = 10
    norm: str = ""  # "batch", or none

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]; train: BatchNorm by this batch."""
        for features in (self.width, 2 * self.width):
            x = nn.Conv(features, (5, 5))(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x) if self.norm == "batch" else x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with tanh and average pooling; its 6, 16, 120 and 84 units grow with the width."""

    width: int = 6
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [B, height, width, channels] → logits [B, num_classes]."""
        for features, padding in ((self.width, "SAME"), (8 * self.width // 3, "VALID")):
            x = nn.avg_pool(nn.tanh(nn.Conv(features, (5, 5), padding=padding)(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for units in (20 * self.width, 14 * self.width):
            x = nn.tanh(nn.Dense(units)(x))
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


class Network(NamedTuple):
    """A kind of network."""

    line: Line
    build: Callable[..., nn.Module]  # of num_classes, and of width and depth where they are given
    depths: tuple[int, ...] | None = None  # that it can have; () where it has no such option, None where any will do
    batch_norm: bool = False
    # Whether trainings of several seeds are one program, vmapped over seeds. Convolutions are slower so on CPUs.
    vmapped: bool = False


def _resnet50(norm: str, depth: int | None = None, **options: Any) -> nn.Module:
    if depth is not None:
        options["blocks"] = (depth,) * 4
    return ResNet50(norm=norm, **options)


MODELS: dict[str, Network] = {
    "mlp": Network(Line("MLP", "tab:blue"), MLP, vmapped=True),
    "deep_linear": Network(Line("deep linear", "tab:olive", "--"), functools.partial(MLP, linear=True), vmapped=True),
    "logistic": Network(
        Line("logistic regression", "tab:pink", ":"), functools.partial(MLP, depth=0), depths=(), vmapped=True
    ),
    "linear": Network(
        Line("linear regression", "tab:gray", "-."),
        functools.partial(MLP, depth=0, squared=True),
        depths=(),
        vmapped=True,
    ),
    "cnn": Network(Line("CNN", "tab:orange", "--"), CNN, depths=()),
    "lenet": Network(Line("LeNet-5", "tab:pink", ":"), LeNet, depths=()),
    "cnn_bn": Network(
        Line("CNN, BatchNorm", "tab:cyan", ":"), functools.partial(CNN, norm="batch"), depths=(), batch_norm=True
    ),
    "resnet": Network(Line("ResNet, GroupNorm", "tab:green", "-."), ResNet, depths=(8, 18)),
    "resnet50": Network(Line("ResNet-50", "tab:red"), functools.partial(_resnet50, "batch"), batch_norm=True),
    "resnet50_gn": Network(Line("ResNet-50, GroupNorm", "tab:purple", "--"), functools.partial(_resnet50, "group")),
    "vit_s16": Network(Line("ViT-S/16", "tab:brown", ":"), ViT),
}


def build(name: str, width: int | None, depth: int | None, num_classes: int) -> nn.Module:
    """The model called `name`; None stands for its default."""
    sizes = {key: value for key, value in (("width", width), ("depth", depth)) if value is not None}
    return MODELS[name].build(num_classes=num_classes, **sizes)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model normalises by batch; its parameters then hold running averages too, "batch_stats"."""
    return getattr(model, "norm", None) == "batch"


def as_input(images: jax.Array) -> jax.Array:
    """Bytes normalised by mean and deviation of ImageNet's colours; what is no bytes, as it is."""
    if images.dtype != jnp.uint8:
        return images
    mean, deviation = (jnp.broadcast_to(jnp.array(each), images.shape) for each in (_MEAN, _DEVIATION))
    return (images / 255 - mean) / deviation


def _cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels)


def _squared_error(outputs: Any, labels: jax.Array) -> jax.Array:
    """½ ‖output − one-hot label‖² of each example."""
    return optax.l2_loss(outputs, jax.nn.one_hot(labels, outputs.shape[-1])).sum(-1)


@functools.cache
def loss_of(model: nn.Module) -> Callable[..., jax.Array]:
    """loss_fn(params, (image, label), state) → loss; the same function object for equal models.

    The loss is cross-entropy in nats, or ½ ‖output − one-hot label‖² where the model is `squared`.

    BatchNorm normalises by its running averages, which are held fixed: they are the state, or among the parameters.
    """
    loss = _squared_error if getattr(model, "squared", False) else _cross_entropy

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array], state: Any = None) -> jax.Array:
        image, label = example
        return loss(model.apply(_fixed(params | (state or {})), as_input(image[None])), label[None])[0]

    return loss_fn


def with_state(params: Any) -> tuple[Any, Any]:
    """(what is trained, the running averages or None) of a model's variables."""
    return {"params": params["params"]}, {name: part for name, part in params.items() if name != "params"} or None


def _fixed(params: Any) -> Any:
    """The same with running averages that nothing is differentiated by."""
    return {name: part if name == "params" else jax.lax.stop_gradient(part) for name, part in params.items()}


@functools.cache
def training_loss_of(model: nn.Module) -> Callable[[Any, Any], tuple[jax.Array, dict[str, Any]]]:
    """(params, batch) → (mean loss, {"batch_stats": …}) of a model that normalises by the batch."""

    def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        images, labels = batch
        logits, averages = model.apply(_fixed(params), as_input(images), train=True, mutable=["batch_stats"])
        return _cross_entropy(logits, labels).mean(), dict(averages)

    return loss_fn


@functools.cache
def mean_loss_of(model: nn.Module) -> Callable[..., jax.Array]:
    """(params, batch, state) → mean loss; a model with BatchNorm normalises by the batch."""
    if has_batch_norm(model):
        return lambda params, batch, state=None: training_loss_of(model)(params | (state or {}), batch)[0]
    return lambda params, batch: jax.vmap(loss_of(model), in_axes=(None, 0))(params, batch).mean()


@functools.cache
def predictor(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """The jitted function (params, images) → predicted classes [B]."""
    return jax.jit(lambda params, images: jnp.asarray(model.apply(params, as_input(images))).argmax(-1))
