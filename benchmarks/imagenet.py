"""Images per second of a ResNet-50 in training and in measuring, and of reading; hours of the ImageNet experiments."""

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import cg_jax as cg
from benchmarks.timing import alternate, machine
from cg_jax.estimators import estimator_of
from experiments import imagenet, models
from experiments.images import decoded
from experiments.loop import measured_at
from experiments.train import Recipe, steps_per_epoch, trainer

_TRAIN, _TEST, _DEVICES = 1_281_167, 50_000, 8
# About what an image of ImageNet measures.
_PHOTO = (375, 500)


@dataclasses.dataclass(frozen=True)
class Options:
    """ResNet-50 on random images, all sides in turn. The defaults are for a GPU; on a CPU say --images 16 --batch 8."""

    images: int = 50_000
    """Examples in a pass over them."""
    batch: int = 256
    image_size: int = 224
    repeats: int = 3
    models: tuple[str, ...] = ("resnet50_gn", "resnet50")
    out: Path = Path("benchmarks/results/imagenet.json")


def sides(name: str, options: Options) -> dict[str, Callable[[], Any]]:
    """What is timed, each a pass over all images."""
    model, size = models.build(name, None, None, 1000), options.batch
    rng = np.random.default_rng(0)
    # As many different images as fit one batch; what they show costs nothing.
    batch = rng.integers(0, 256, (size, options.image_size, options.image_size, 3)).astype(np.uint8)
    batch = jax.device_put((batch, rng.integers(0, 1000, size).astype(np.int32)))
    batches = [batch] * (options.images // size)
    sgd = trainer(model, "sgd", Recipe(size, 0.1, 1e-4), 3 * size)
    state = jax.block_until_ready(sgd.init(jax.random.key(0), batch[0]))
    params = jax.tree.map(jnp.array, state.params)
    held = [state]
    mean_loss = models.mean_loss_of(model)
    gradient = jax.jit(jax.grad(mean_loss))

    def gradients() -> None:
        grads = None
        for each in batches:
            grads = gradient(params, each)
        jax.block_until_ready(grads)

    def training() -> None:
        for each in batches:
            held[0] = sgd.step(held[0], *(part[None] for part in each), None)
        jax.block_until_ready(held[0])

    def coherence(estimator: str) -> Callable[[], Any]:
        loss_fn = models.loss_of(model) if estimator_of(estimator).by_example else mean_loss
        return lambda: float(
            cg.measure_coherence(
                loss_fn, params, batches, batch_size=size, estimator=estimator, nonfinite="propagate"
            ).alpha
        )

    return {
        "gradients": gradients,
        "training": training,
        "exact": coherence("exact"),
        "batch": coherence("batch"),
    }


def reading(image_size: int, seconds: float = 2.0) -> float:
    """Images per second that one core decodes, resizes and crops."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo, out = load_sample_image("china.jpg")[: _PHOTO[0], : _PHOTO[1]], io.BytesIO()
    Image.fromarray(photo).save(out, "JPEG", quality=90)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        decoded(out.getvalue(), image_size)
        number += 1
    return number / (time.perf_counter() - start)


def hours(per_second: dict[str, float]) -> dict[str, float]:
    """Of the two experiments on 8 such devices, one seed, where reading keeps up and devices do not wait."""
    by_config = {}
    for config, runs, samples in ((imagenet.COHERENCE.config, 2, 2), (imagenet.NOISE.config, 3, 1)):
        images = steps_per_epoch(_TRAIN, config.batch_size, config.batch_size) * config.batch_size
        trained = runs * config.epochs * images / per_second["training"]
        times = len(measured_at(images // config.batch_size, config))
        measured = runs * times * samples * config.num_measured / per_second[config.estimator]
        by_config[config.name] = {
            "training": trained / _DEVICES / 3600,
            "measuring": measured / _DEVICES / 3600,
            "read per second": _DEVICES * per_second["training"],
        }
    return by_config


def main(options: Options) -> None:
    """Measure, print and write."""
    rows = []
    for name in options.models:
        times = alternate(sides(name, options), options.repeats)
        number = options.images // options.batch * options.batch
        per_second = {side: 1e3 * number / ms for side, ms in times.items()}
        stats = jax.devices()[0].memory_stats() or {}
        rows.append(
            {
                "model": name,
                "images_per_second": per_second,
                "over_gradients": {side: ms / times["gradients"] for side, ms in times.items()},
                "peak_bytes": stats.get("peak_bytes_in_use"),
                "hours_on_8": hours(per_second),
            }
        )
        print(json.dumps(rows[-1], indent=1))
    written = {
        "machine": machine(),
        "images": options.images,
        "batch": options.batch,
        "image_size": options.image_size,
        "read_per_second_and_core": reading(options.image_size),
        "models": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
