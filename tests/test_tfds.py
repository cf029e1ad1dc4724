"""The commands that the ImageNet page and messages of the experiments recommend, as a user types them."""

import io
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.kills import ENVIRONMENT
from experiments.__main__ import main
from experiments.coherence import CoherenceConfig
from experiments.images import Images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TFDS = Path(sys.executable).parent / "tfds"


def _tfds(*options, **where):
    return subprocess.run([TFDS, *options], env=ENVIRONMENT, capture_output=True, text=True, check=False, **where)


def _add(archive, name, content):
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def _jpeg(rng):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def _write_archives(folder):
    """The two archives of the challenge, with 3 images of each of 2 classes, and 4 to validate by."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in ("n01440764", "n01443537"):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for number in range(3):
                    _add(inner, f"{synset}_{number}.JPEG", _jpeg(rng))
            _add(outer, f"{synset}.tar", content.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as outer:
        for number in range(1, 5):
            _add(outer, f"ILSVRC2012_val_{number:08d}.JPEG", _jpeg(rng))


def test_tfds_starts():
    done = _tfds("--help")
    assert done.returncode == 0, done.stderr
    assert "{build,new,convert_format,build_croissant}" in done.stdout


def _check_prepared(name, folder, train, test):
    source = Images(CoherenceConfig(data=f"tfds:{name}", data_dir=folder, image_size=16))
    assert source.measured == {"train": train, "test": test}


def test_imagenet_is_built_by_the_command_of_its_page(tmp_path):
    (command,) = re.findall(r"^tfds (build .*?) +#", (ROOT / "docs" / "imagenet.md").read_text(), re.MULTILINE)
    _write_archives(tmp_path / "downloads" / "manual")
    done = _tfds(*command.replace("FOLDER", str(tmp_path)).split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _check_prepared("imagenet2012", tmp_path, 6, 4)


def test_imagenet_is_built_by_the_command_of_the_message(tmp_path, capsys):
    """It names the folder for the archives, which are put there first; the folder's name wants quotes."""
    folder = tmp_path / "my images"
    folder.mkdir()
    options = ["imagenet-noise", "--data-dir", str(folder), "--out", str(tmp_path / "run")]
    assert main(options) == 1
    said = capsys.readouterr().err
    command, manual = re.findall(r"run: tfds (build .*); put the archives that it wants into (.*) first$", said)[0]
    _write_archives(Path(manual))
    done = _tfds(*shlex.split(command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _check_prepared("imagenet2012", folder, 6, 4)
    assert main(options) == 1
    assert "Expected at least 768 training examples" in capsys.readouterr().err


def test_imagenet_without_its_archives_is_not_built(tmp_path):
    done = _tfds("build", "imagenet2012", "--file_format=array_record", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode != 0
    assert f"{tmp_path}/downloads/manual" in done.stderr


def test_a_builder_in_a_file_is_built_in_another_folder_for_another_format(tmp_path, capsys):
    script = ROOT / "experiments" / "tiny_images.py"
    first, second = tmp_path / "first", tmp_path / "second"
    done = _tfds("build", script, f"--data_dir={first}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = ["coherence", "--data", "tfds:tiny_images", "--data-dir", str(first), "--out", str(tmp_path / "run")]
    assert main(options) == 1
    (command,) = re.findall(r"as tfrecord; run: tfds (build .*)$", capsys.readouterr().err.strip())
    command = command.replace(" tiny_images ", f" {script} ").replace("ANOTHER_FOLDER", str(second))
    done = _tfds(*command.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _check_prepared("tiny_images", second, 96, 48)
