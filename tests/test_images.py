"""Image sets that TensorFlow Datasets prepared on disk: reading, order, noise, measuring, whole runs."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from processes import free_port, outputs, running

import cg_jax as cg
from benchmarks.kills import ENVIRONMENT
from experiments import data, models
from experiments.__main__ import main
from experiments.coherence import CoherenceConfig
from experiments.images import Images, Order, decoded
from experiments.train import Keys, epoch_rows, predict

ROOT = Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """96 + 48 JPEG images of several sizes, prepared by TensorFlow Datasets itself."""
    found = tmp_path_factory.mktemp("prepared")
    command = [sys.executable, "-m", "experiments.tiny_images", str(found)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return found


@pytest.fixture
def config(folder):
    return CoherenceConfig(
        data="tfds:tiny_images", data_dir=folder, image_size=SIZE, batch_size=8, measure_batch_size=10, num_measured=37
    )


def _raw(folder, split):
    """(encoded bytes, label) of every example, straight from TensorFlow Datasets."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("tiny_images", data_dir=folder)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


def _flat(array):
    return np.asarray(array).reshape(-1, *array.shape[2:])


def _png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_the_centre_is_cut_out_of_an_image_of_the_right_size():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(_png(pixels), 224), pixels[16:240, 38:262])
    np.testing.assert_array_equal(decoded(_png(pixels.swapaxes(0, 1)), 224), pixels.swapaxes(0, 1)[38:262, 16:240])


def test_the_shorter_side_is_made_8_7_of_the_crop():
    """A ramp over a wide image: what is left are the 224 columns in the middle of 256 · 600/300 = 512."""
    ramp = np.linspace(0, 255, 600)[None, :, None].repeat(300, 0).repeat(3, 2).round().astype(np.uint8)
    found = decoded(_png(ramp), 224)
    assert found.shape == (224, 224, 3)
    assert found.dtype == np.uint8
    want = 255 * (144 + np.arange(224) + 0.5) / 512
    assert np.abs(found[..., 0] - want).max() < 1.5


@pytest.mark.parametrize("shape", [(30, 31), (31, 400), (5, 7)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_images_of_any_size_and_kind_become_the_same_shape(shape, mode):
    out = io.BytesIO()
    Image.new(mode, shape[::-1]).save(out, "PNG")
    assert decoded(out.getvalue(), 224).shape == (224, 224, 3)


def test_the_tiny_images_are_crops_of_the_photographs(folder):
    from sklearn.datasets import load_sample_images

    raw = _raw(folder, "train")
    assert len(raw) == 96
    assert sorted({label for _, label in raw}) == [0, 1]
    sizes = {Image.open(io.BytesIO(encoded)).size for encoded, _ in raw}
    assert len(sizes) > 50
    assert [photo.shape for photo in load_sample_images().images] == [(427, 640, 3)] * 2


def test_a_training_reads_every_example_once_an_epoch_in_the_order_of_arrays(folder, config):
    keys, raw = Keys.of(3), _raw(folder, "train")
    batches = Images(config).noisy(keys, data.Noise(0.0, 0.0)).batches(0, 24)
    for epoch in range(2):
        for rows in epoch_rows(keys.order, epoch, 96, 24, 8):
            images, labels, none = next(batches)
            assert none is None
            assert images.shape == (3, 8, SIZE, SIZE, 3)
            np.testing.assert_array_equal(_flat(images), [decoded(raw[row][0], SIZE) for row in rows])
            np.testing.assert_array_equal(_flat(labels), [raw[row][1] for row in rows])


def test_a_training_goes_on_from_any_step(config):
    examples = Images(config).noisy(Keys.of(0), data.Noise(0.5, 0.0))
    whole = examples.batches(0, 8)
    steps = [next(whole) for _ in range(20)]
    for start in (1, 11, 12, 19):
        images, labels, _ = next(examples.batches(start, 8))
        np.testing.assert_array_equal(images, steps[start][0])
        np.testing.assert_array_equal(labels, steps[start][1])


@pytest.mark.parametrize("noise", [{"validation": 0.5}, {"rare": 0.5}, {"train": 0.5, "kind": "class"}])
def test_of_images_in_files_labels_are_redrawn_and_nothing_else(config, noise):
    with pytest.raises(ValueError, match="Expected uniform noise and nothing else for a set of tfds:, got Noise"):
        Images(config).noisy(Keys.of(0), data.Noise(**noise))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_processes_make_the_steps_of_one(processes):
    key, steps = Keys.of(0).order, 9
    alone = Order(key, 100, 24, 8)
    parts = [Order(key, 100, 24, 8, (i, processes)) for i in range(processes)]
    share = 8 // processes
    for batch in range(3 * steps):
        together = [part[batch * share + row] for part in parts for row in range(share)]
        assert together == [alone[batch * 8 + row] for row in range(8)]


def test_labels_are_redrawn_by_the_number_of_the_example(folder, config):
    keys, true = Keys.of(1), np.array([label for _, label in _raw(folder, "train")])
    want = data.corrupt(keys.noise, true, 0.5, 2)
    assert 0 < (want != true).sum() < 48
    batches = Images(config).noisy(keys, data.Noise(0.5, 0.0)).batches(0, 8)
    for epoch in range(3):
        for rows in epoch_rows(keys.order, epoch, 96, 8, 8):
            np.testing.assert_array_equal(_flat(next(batches)[1]), want[rows])


def test_a_sample_is_measured_as_if_it_lay_in_memory(folder, config):
    source, keys = Images(config), Keys.of(0)
    assert (source.num_train, source.num_classes) == (96, 2)
    model = models.build("mlp", 8, 1, 2)
    params = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    coherence, seen = source.noisy(keys, data.Noise(0.5, 1.0)).measure("test", model, params)
    assert coherence.count == len(seen.guess) == 37
    raw = _raw(folder, "validation")
    numbers = np.random.default_rng(0).permutation(48)[:37]
    images = np.stack([decoded(raw[i][0], SIZE) for i in numbers])
    true = np.array([raw[i][1] for i in numbers])
    labels = data.corrupt(keys.test_noise, np.array([label for _, label in raw]), 1.0, 2)[numbers]
    np.testing.assert_array_equal(seen.true, true)
    np.testing.assert_array_equal(seen.labels, labels)
    np.testing.assert_array_equal(seen.guess, predict(model, params, jnp.asarray(images), 37))
    want = cg.measure_coherence(models.loss_of(model), params, (images, labels.astype(np.int32)), batch_size=37)
    np.testing.assert_allclose(coherence.alpha, want.alpha, rtol=1e-5)
    np.testing.assert_allclose(coherence.loss, want.loss, rtol=1e-5)
    # The sample is the same whatever the seed of a run.
    again = Images(config).noisy(Keys.of(5), data.Noise(0.5, 1.0)).guess("test", model, params)
    np.testing.assert_array_equal(again.guess, seen.guess)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tfds:mnist"], "tfds build mnist --file_format=array_record --data_dir="),
        (["tfds:no_such_set"], "Expected data to be tfds:NAME of TensorFlow Datasets, or of one prepared"),
        (["no_such_set"], "Expected data in ('mnist5k', 'digits', 'fashion_mnist') or tfds:NAME, got data=no_such_set"),
        (["tfds:mnist/no_such_config"], "Expected data to be tfds:NAME of TensorFlow Datasets, or of one prepared"),
        (["tfds:mnist:9.9.9"], "Expected data to be tfds:NAME of TensorFlow Datasets, or of one prepared"),
        (["tfds:a b"], "Expected data to be tfds:NAME of TensorFlow Datasets, or of one prepared"),
        (["tfds:"], "Expected data in ('mnist5k', 'digits', 'fashion_mnist') or tfds:NAME, got data=tfds:."),
        (["tfds:wiki_bio"], "Expected a data set of images, each with a label, got tfds:wiki_bio with"),
        (["tfds:tiny_images", "--num-train", "2", "--batch-size", "8"], "Expected at least 24 training examples"),
        (["tfds:tiny_images", "--estimator", "batch", "--batch-size", "8"], "2 batches of measure_batch_size=500 to"),
        (["tfds:tiny_images", "--batch-size", "8", "--model", "vit_s16", "--image-size", "15"], "16 × 16 pixels or"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(folder, tmp_path, options, message, capsys):
    arguments = ["--data-dir", str(folder), "--out", str(tmp_path / "run")]
    assert main(["coherence", "--dataset", *options, *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def _only(prepared, split):
    (found,) = prepared.glob(f"*{split}.array_record*")
    return found


def _flip_a_third(path):
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[len(content) // 3 : 2 * len(content) // 3] ^= 0x5A
    path.write_bytes(content.tobytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "dataset_info.json").write_text("{"), "Expected data to be tfds:NAME of .*JSON"),
        (lambda at: (at / "features.json").unlink(), "Expected data to be tfds:NAME of .*not found"),
        (lambda at: _only(at, "train").unlink(), "an image as example 0 of train of .*No such file"),
        (
            lambda at: _only(at, "validation").write_bytes(b""),
            "an image as example 0 of validation of .*; prepare",
        ),
        (lambda at: os.truncate(_only(at, "train"), 10**5), "an image as example 0 of train of .*Corrupted"),
        (lambda at: _flip_a_third(_only(at, "train")), r"an image as example \d+ of train of .*Corrupted"),
    ],
)
def test_a_damaged_set_is_one_clear_error(folder, tmp_path, damage, message, capfd):
    prepared = Path(shutil.copytree(folder, tmp_path / "set"))
    damage(prepared / "tiny_images" / "1.0.0")
    assert main(_small(prepared, tmp_path / "run")) == 1
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "Error: " in line or "Traceback" in line]
    assert re.search(message, said)


def test_a_set_in_another_format_is_to_be_prepared_in_another_folder(folder, tmp_path, capsys):
    """TensorFlow Datasets refuses to prepare a second format where there is one."""
    prepared = Path(shutil.copytree(folder, tmp_path / "set"))
    info = prepared / "tiny_images" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert main(_small(prepared, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "got it there as tfrecord; run: tfds build tiny_images --file_format=array_record --data_dir=ANOTHER" in said


def _rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _small(folder, out):
    size = ["--image-size", "16", "--width", "8", "--num-measured", "20", "--measure-batch-size", "8"]
    length = ["--batch-size", "8", "--epochs", "2", "--save-every", "5", "--seeds", "1"]
    return ["coherence", "--data", "tfds:tiny_images", "--data-dir", str(folder), *size, *length, "--out", str(out)]


def test_a_run_from_files_goes_on_where_it_was(folder, tmp_path):
    out = tmp_path / "run"
    assert main(_small(folder, out)) == 0
    want = (out / "metrics.jsonl").read_bytes()
    for newest in sorted((out / "checkpoints").iterdir(), key=lambda path: int(path.name))[-1:]:
        shutil.rmtree(newest)
    assert main(_small(folder, out)) == 0
    assert (out / "metrics.jsonl").read_bytes() == want


@pytest.mark.slow
def test_two_processes_read_their_parts_and_measure_what_one_does(folder, tmp_path):
    alone, together, port = tmp_path / "alone", tmp_path / "together", free_port()
    cluster = [["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(p)] for p in (0, 1)]
    start = [sys.executable, "-m", "experiments"]
    commands = [[*start, *_small(folder, together), *cluster[p]] for p in (0, 1)]
    with running([[*start, *_small(folder, alone)], *commands], [ENVIRONMENT] * 3) as started:
        outputs(started)
    for row, want in zip(_rows(together), _rows(alone), strict=True):
        assert row["step"] == want["step"]
        for sample in ("train", "test"):
            for name in ("loss", "r", "accuracy"):
                np.testing.assert_allclose(row[sample][name], want[sample][name], rtol=2e-3, err_msg=f"{sample} {name}")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where compiled programs are kept: the two experiments share some."""
    return tmp_path_factory.mktemp("programs")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures"), [("imagenet-coherence", 2), ("imagenet-noise", 1)])
def test_the_imagenet_experiments_run_on_tiny_images(name, pictures, tmp_path, programs):
    command = [sys.executable, "-m", "experiments", name, "--smoke", "--out", "run"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(programs)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = _rows(tmp_path / "run")
    assert max(row["epoch"] for row in rows) == 2
    if name == "imagenet-noise":
        assert {row["method"] for row in rows} == {"sgd", "m3", "mean3"}
    else:
        assert {row["train"]["count"] for row in rows} == {32}
        assert not any("batch_stats" in tensor for tensor in rows[0]["per_tensor"])
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,") == pictures
    assert "from the mean gradients of batches of 8 examples, each normalised by itself" in done.stdout
