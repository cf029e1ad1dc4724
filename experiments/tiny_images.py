"""A small classification set of real images, prepared through TensorFlow Datasets, to try the ImageNet experiments on.

`python -m experiments.tiny_images FOLDER`: crops of two photographs that scikit-learn carries, each a class.
"""

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_SIZES = {"train": 96, "validation": 48}


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """JPEG crops of 40 to 79 by 50 to 89 pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["temple", "flower"]),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in _SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        rng = np.random.default_rng(list(_SIZES).index(split))
        for number in range(_SIZES[split]):
            label, height, width = number % 2, rng.integers(40, 80), rng.integers(50, 90)
            photo = photos[label]
            top, left = (rng.integers(0, side - part) for side, part in zip(photo.shape, (height, width), strict=False))
            encoded = io.BytesIO()
            Image.fromarray(photo[top : top + height, left : left + width]).save(encoded, "JPEG", quality=95)
            encoded.seek(0)
            yield number, {"image": encoded, "label": label}


if __name__ == "__main__":
    TinyImages(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
