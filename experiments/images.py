"""Classification sets of TensorFlow Datasets, read and decoded from prepared files while a network trains."""

import contextlib
import functools
import io
import shlex
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
from PIL import Image

import cg_jax as cg

from . import data, models
from .configs import TFDS, Config
from .devices import devices
from .errors import first_line
from .examples import Guesses, coherence_of
from .train import Keys, epoch_order, steps_per_epoch

# The shorter side before the crop, over that of the crop: 256 to 224.
_MARGIN = 8 / 7
# Which examples are measured on is drawn with it, whatever the seed of a run.
_SAMPLE_SEED = 0
# How many examples are decoded ahead of where they are needed.
_AHEAD = 512

Row = tuple[np.ndarray, np.int32, np.int32]  # image, label as trained on, true label


def decoded(encoded: bytes, size: int) -> np.ndarray:
    """The centre [size, size, 3], uint8, of an encoded image whose shorter side is made 8/7 of that."""
    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    scale = round(_MARGIN * size) / min(image.size)
    width, height = (max(size, round(scale * side)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _prepared(name: str, folder: Path | None) -> Any:
    """The builder of a data set that is prepared in a format of random access; reading that needs no TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # whatever an unknown name or a damaged description makes it say
        raise ValueError(
            f"Expected data to be tfds:NAME of TensorFlow Datasets, or of one prepared in data_dir={folder}, got "
            f"{TFDS}{name}: {first_line(error)}"
        ) from None
    kinds: Any = builder.info.features
    if not {"image", "label"} <= set(kinds) or not isinstance(kinds["label"], tfds.features.ClassLabel):
        raise ValueError(f"Expected a data set of images, each with a label, got {TFDS}{name} with {list(kinds)}.")
    if not builder.info.splits or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise FileNotFoundError(_to_prepare(builder, name, folder))
    return builder


def _to_prepare(builder: Any, name: str, folder: Path | None) -> str:
    """What is wrong where a data set is not prepared as array_record, and the command that prepares it."""
    root = builder.data_path.parents[len(builder.info.full_name.split("/")) - 1]
    state, where = "none there", "" if folder is None else f" --data_dir={shlex.quote(str(folder))}"
    if builder.info.splits:  # TensorFlow Datasets keeps to the format that a folder has
        state, where = f"it there as {builder.info.file_format.value}", " --data_dir=ANOTHER_FOLDER"
    manual = root / "downloads" / "manual" if not builder.info.splits else "ANOTHER_FOLDER/downloads/manual"
    archives = f"; put the archives that it wants into {manual} first" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
    return (
        f"Expected {name} to be prepared in {builder.data_path} as array_record, got {state}; run: "
        f"tfds build {name} --file_format=array_record{where}{archives}"
    )


class Split:
    """Examples by their number.

    Raises:
        OSError: A file is damaged, or missing.
    """

    def __init__(self, builder: Any, name: str, image_size: int, limit: int | None) -> None:
        import tensorflow_datasets as tfds

        self._what, self._image_size = f"{name} of {builder.data_path}", image_size
        with self._readable("to read"):
            self._records = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
            self.size = min(len(self._records), limit or len(self._records))

    @contextlib.contextmanager
    def _readable(self, what: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # whatever a damaged file makes a reader say
            said = f"{first_line(error)}; prepare the set again"
            raise OSError(f"Expected {what} {self._what}, got: {said}.") from None

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """Image [size, size, 3], uint8, and label."""
        with self._readable(f"an image as example {number} of"):
            record = self._records[number]
            return decoded(record["image"], self._image_size), int(record["label"])


class Order(Sequence[int]):
    """The numbers of the examples of a training, those of one process' part of every mini-batch, one after another.

    Any of them can be asked for at once, so that a training can go on anywhere; two epochs are kept at hand.
    """

    def __init__(
        self, key: jax.Array, size: int, rows_per_step: int, batch_size: int, part: tuple[int, int] = (0, 1)
    ) -> None:
        self._process, processes = part
        self._rows, self._batch_size, self._share = rows_per_step, batch_size, batch_size // processes
        self.share = rows_per_step // processes  # of a step
        self._steps = steps_per_epoch(size, rows_per_step, batch_size)
        self._of_epoch = functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(key, epoch, size))

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, position: int) -> int:  # type: ignore[override]
        step, row = divmod(position, self.share)
        epoch, step = divmod(step, self._steps)
        batch, row = divmod(row, self._share)
        before = step * self._rows + batch * self._batch_size + self._process * self._share
        return int(self._of_epoch(epoch)[before + row])


def _check_sizes(config: Config) -> None:
    """ValueError where batches cannot be divided over the devices of several processes."""
    if jax.process_count() == 1:
        return
    for name in ("batch_size", "measure_batch_size"):
        if getattr(config, name) % jax.device_count():
            divisor = f"{jax.device_count()} devices of {jax.process_count()} processes"
            raise ValueError(f"Expected {name} to be divisible by the {divisor}, got {name}={getattr(config, name)}.")


class Images:
    """A data set of images in files."""

    def __init__(self, config: Config) -> None:
        builder = _prepared(config.data.removeprefix(TFDS), config.data_dir)
        test = next((name for name in ("validation", "test") if name in builder.info.splits), None)
        if test is None or "train" not in builder.info.splits:
            raise ValueError(f"Expected splits train and validation or test, got {list(builder.info.splits)}.")
        _check_sizes(config)
        self._config = config
        self._splits = {
            "train": Split(builder, "train", config.image_size, config.num_train),
            "test": Split(builder, test, config.image_size, config.num_test),
        }
        self.num_train = self._splits["train"].size
        self.num_classes = builder.info.features["label"].num_classes
        self.image_shape = (config.image_size, config.image_size, 3)
        processes, most = jax.process_count(), config.num_measured
        self.measured = {name: min(split.size, most) // processes * processes for name, split in self._splits.items()}
        if 0 in self.measured.values():
            sizes = f"{[split.size for split in self._splits.values()]} and num_measured={most}"
            raise ValueError(f"Expected an example to measure on for each of {processes} processes, got {sizes}.")
        for split in self._splits.values():
            split[0]  # what cannot be decoded is known before anything is trained

    def noisy(self, keys: Keys, noise: data.Noise) -> "Streamed":
        """The same with labels redrawn by the number of the example: the same in every epoch and process.

        Raises:
            ValueError: The noise is more than redrawn labels.
        """
        if noise != data.Noise(noise.train, noise.test):
            raise ValueError(f"Expected uniform noise and nothing else for a set of {TFDS}, got {noise}.")
        redrawn = {
            "train": data.redrawn(keys.noise, self._splits["train"].size, noise.train, self.num_classes),
            "test": data.redrawn(keys.test_noise, self._splits["test"].size, noise.test, self.num_classes),
        }
        return Streamed(self._config, keys, self._splits, redrawn)


class Streamed:
    """Examples that are read when they are needed, by each process its own part."""

    def __init__(self, config: Config, keys: Keys, splits: dict[str, Split], noise: dict[str, np.ndarray]) -> None:
        self._config, self._keys, self._splits, self._noise = config, keys, splits, noise
        self.first = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
        self.num_train = splits["train"].size

    def _rows(self, sample: str, numbers: Any, start: int, batch_size: int) -> Iterator[tuple[Any, ...]]:
        """(images, labels, true labels) of the examples of these numbers from `start` on, in batches."""
        split, noise, threads = self._splits[sample], self._noise[sample], self._config.read_threads

        def row(number: int) -> Row:
            image, true = split[number]
            return image, np.int32(true if noise[number] < 0 else noise[number]), np.int32(true)

        read = grain.MapDataset.source(numbers).map(row)[start:]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD)
        return iter(read.to_iter_dataset(options).batch(batch_size))

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[jax.Array, jax.Array, None]]:
        """Images and labels [mini-batches, B, …] of each step from `step` on, each divided over the devices."""
        part = (jax.process_index(), jax.process_count())
        size, batch_size = self._splits["train"].size, self._config.batch_size
        order = Order(self._keys.order, size, rows_per_step, batch_size, part)
        for images, labels, _ in self._rows("train", order, step * order.share, order.share):
            groups = rows_per_step // batch_size
            images, labels = (part.reshape(groups, -1, *part.shape[1:]) for part in (images, labels))
            yield (*devices().assemble((images, labels), 1), None)

    def _sample(self, sample: str) -> tuple[np.ndarray, int]:
        """(the numbers of the examples that this process measures on, how many of them make a batch)."""
        size, processes = self._splits[sample].size, jax.process_count()
        share = min(size, self._config.num_measured) // processes
        numbers = np.random.default_rng(_SAMPLE_SEED).permutation(size)[jax.process_index() * share :][:share]
        # Of several processes every batch is divided over the devices, and whole; one process may take what is there.
        batch_size = self._config.measure_batch_size // processes
        return numbers, min(batch_size, share) if processes == 1 else batch_size

    def _seen(self, sample: str, model: nn.Module, params: Any, guesses: list[Guesses]) -> Iterator[tuple[Any, Any]]:
        """The batches of a sample; what the network says of each is added to `guesses`."""
        numbers, batch_size = self._sample(sample)
        predict = models.predictor(model)
        for images, labels, true in self._rows(sample, numbers, 0, batch_size):
            missing = batch_size - len(labels)
            whole = [np.concatenate([part, np.repeat(part[-1:], missing, 0)]) for part in (images, labels, true)]
            there, *both = devices().assemble(tuple(whole))
            parts = jax.device_get(devices().replicate((predict(params, there), *both)))
            guesses.append(Guesses(*(part.reshape(-1, batch_size)[:, : len(labels)].ravel() for part in parts)))
            yield images, labels

    def guess(self, sample: str, model: nn.Module, params: Any) -> Guesses:
        """Predictions on the sample."""
        guesses: list[Guesses] = []
        for _ in self._seen(sample, model, params, guesses):
            pass
        return Guesses(*map(np.concatenate, zip(*guesses, strict=True)))

    def measure(self, sample: str, model: nn.Module, params: Any) -> tuple[cg.Coherence, Guesses]:
        """Coherence of the sample, and predictions on it, in one reading."""
        guesses: list[Guesses] = []
        processes, (_, batch_size) = jax.process_count(), self._sample(sample)
        seen = self._seen(sample, model, params, guesses)
        coherence = coherence_of(self._config, model, params, seen, batch_size=processes * batch_size)
        return coherence, Guesses(*map(np.concatenate, zip(*guesses, strict=True)))
