"""The wheel as a user installs it: the library, the experiments, and the command cg-jax."""

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.kills import ENVIRONMENT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("cg_jax", "experiments"):
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "checkout")
    # From Python 3.12 on an environment has no setuptools of its own: pip fetches it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [*PIP, "wheel", "--no-deps", *isolation, "--wheel-dir", folder, folder / "checkout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("cg_jax-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder beside everything that this environment has; the environment of a process that looks there first."""
    folder = tmp_path_factory.mktemp("installed")
    command = [*PIP, "install", "--no-deps", "--no-index", "--quiet", "--target", folder, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return folder, ENVIRONMENT | {"PYTHONPATH": str(folder)}


def test_the_wheel_holds_every_module_and_no_package_of_a_common_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"cg_jax", "cg_jax_experiments"}
    library = {f"cg_jax/{path.relative_to(ROOT / 'cg_jax')}" for path in (ROOT / "cg_jax").rglob("*.py")}
    experiments = {f"cg_jax_experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert set(names) >= library | experiments | {"cg_jax/py.typed"}
    assert not any("results" in name for name in names)


def test_the_demo_runs_in_an_empty_folder(installed, tmp_path):
    folder, environment = installed
    options = ["--seeds", "1", "--epochs", "1", "--width", "8"]
    command = [sys.executable, folder / "bin" / "cg-jax", "demo", *options, "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "Report: run/report.html" in done.stdout
    for part in ("coherence", "noise"):
        assert json.loads((tmp_path / "run" / part / "summary.json").read_text())["complete"] is True
        # The commit of a repository that happens to be around is not that of the package.
        assert json.loads((tmp_path / "run" / part / "env.json").read_text())["commit"] is None
    again = [*command[:2], "figures", "run"]
    before = (tmp_path / "run" / "summary.json").read_bytes()
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_a_smoke_test_from_the_wheel_prepares_its_images(installed, tmp_path):
    folder, environment = installed
    command = [sys.executable, folder / "bin" / "cg-jax", "imagenet-coherence", "--smoke", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny_images" / "tiny_images").is_dir()


def test_without_the_extra_the_command_says_what_to_install(installed, tmp_path):
    _, environment = installed
    script = "import sys; sys.modules['tyro'] = None; import cg_jax_experiments; cg_jax_experiments.command()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'cg_jax[experiments]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
