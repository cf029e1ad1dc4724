"""What a run is given: where it is wrong or missing, one line says so, and nothing is written."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from idx import write_fashion_mnist
from processes import free_port, running

from benchmarks.kills import ENVIRONMENT
from experiments import data
from experiments.__main__ import main

DIGITS = ["--data", "digits", "--width", "8", "--batch-size", "20", "--epochs", "1"]


def _line(capsys):
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["coherence", "--seeds", "0"], "Expected seeds >= 1, got seeds=0."),
        (["demo", "--seeds", "0"], "Expected seeds >= 1, got seeds=0."),
        (["coherence", "--seed", "-1"], "Expected seed >= 0 and finite, got seed=-1."),
        (["coherence", "--seed", "4294967296"], "Expected seed + seeds <= 2**32, got seed=4294967296 and seeds=1."),
        (["coherence", "--seed", "99999999999999999999"], "Expected seed + seeds <= 2**32"),
        (["coherence", "--epochs", "0"], "Expected epochs >= 1, got epochs=0."),
        (["coherence", "--learning-rate", "nan"], "Expected learning_rate > 0 and finite, got learning_rate=nan."),
        (["coherence", "--learning-rate", "inf"], "Expected learning_rate > 0 and finite, got learning_rate=inf."),
        (["coherence", "--weight-decay", "inf"], "Expected weight_decay >= 0 and finite, got weight_decay=inf."),
        (["coherence", "--decay-at", "3", "3"], "Expected decay_at to be different epochs >= 1, got decay_at=(3, 3)."),
        *((["noise", "--noise", x], f"0 <= noise < 1, got noise={x}.") for x in ("1.0", "nan", "inf", "-1.0")),
        *((["noise", "--rare", x], f"Expected 0 < rare <= 1, got rare={x}.") for x in ("0.0", "1.5", "nan")),
        *((["noise", "--validation", x], f"Expected 0 <= validation < 1, got validation={x}.") for x in ("1.0", "nan")),
        (["noise", "--validation", "1e-9"], "Expected validation to be an example or more of 1400, got 1e-09."),
        (["noise", "--validation", "0.9"], "Expected validation to leave 150 training examples, 3 mini-batches, got"),
        (
            ["noise", "--learning-rates", "0.1", "0.3"],
            "Expected validation > 0 to choose from learning_rates=(0.1,",
        ),
        (["noise", "--learning-rates", "0.1", "0.1"], "Expected learning_rates to be different, > 0 and finite, got"),
        (["noise", "--learning-rates", "nan"], "Expected learning_rates to be different, > 0 and finite, got"),
        (["robust", "--rare", "1.0"], "Expected 0 < rare < 1, got rare=1.0."),
        (["robust", "--cells"], "Expected cells to be one or more, got cells=()."),
        (["robust", "--cells", "rare", "rare"], "Expected cells to be different ones of ('clean', 'uniform20',"),
        (
            ["robust", "--validation", "0"],
            "Expected validation > 0 and a data set that fits the memory, got",
        ),
        (["noise", "--model", "resnet50", "--methods", "clip"], "Expected a model without BatchNorm for clip, which"),
        (["robust", "--model", "cnn"], "Expected model in ('mlp',) for winsorized, got model=cnn."),
        (["noise", "--noise", "1e-9"], "Expected noise to be a label or more of 1400, got noise=1e-09."),
        (["noise", "--methods"], "Expected methods to be different ones, at least one, got methods=()."),
        (["coherence", "--data-dir", "."], "Expected no data_dir for data=digits, which does not use it, got data"),
        (["noise", "--image-size", "8"], "Expected no image_size for data=digits, which does not use it"),
        (["coherence", "--num-measured", "8"], "Expected no num_measured for data=digits"),
        (["coherence", "--num-train", "1401"], "Expected num_train <= 1400, the size of digits, got num_train=1401."),
        (["coherence", "--num-test", "999"], "Expected num_test <= 397, the size of digits, got num_test=999."),
        (["coherence", "--batch-size", "500"], "Expected at least 1500 training examples, 3 mini-batches of"),
        (["coherence", "--estimator", "batch"], "Expected at least 2 batches of measure_batch_size=500 to measure on"),
        (["noise", "--estimator", "batch", "--measure-batch-size", "701"], "got 1400 examples in a sample."),
        (["coherence", "--model", "cnn", "--depth", "3"], "Expected no depth for cnn, got depth=3."),
        (["coherence", "--model", "vit_s16"], "Expected images of 16 × 16 pixels or more, got 8 × 8"),
        (["coherence", "--model", "resnet", "--width", "12"], "Expected sizes that resnet can have, got width=12"),
        (["noise", "--model", "resnet50_gn", "--width", "40"], "Expected sizes that resnet50_gn can have"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, capsys):
    data = [] if options[0] == "demo" else ["--data", "digits"]
    assert main([options[0], *data, *options[1:], "--out", str(tmp_path / "run")]) == 1
    assert message in _line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["fashion_mnist", "tfds:tiny_images"])
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/nonexistent", "got /nonexistent, which does not exist."),
        ("file", "got file, which is no folder."),
        ("file/under", "got file/under, which does not exist."),
    ],
)
def test_a_missing_data_folder_is_one_line(data, folder, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["coherence", "--data", data, "--data-dir", folder, "--out", "run"]) == 1
    assert _line(capsys) == f"NotADirectoryError: Expected data_dir to be the folder of {data}, {message}"
    assert not Path("run").exists()


def _statuses(prepare, cases, folder):
    """(what a fresh process prints at its end, the lines on standard error) of runs one after another, all refused."""
    script = (
        "import json, os, sys; from experiments.__main__ import main\n"
        f"{prepare}\nstatuses = [main(options) for options in json.loads(sys.argv[1])]\n"
        "print(statuses, [name for name in sys.modules if name.startswith('tensorflow')])"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, json.dumps(cases)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{[1] * len(cases)} []", done.stderr
    return done.stderr.splitlines()


def test_fashion_mnist_is_missed_without_an_import_of_tensorflow(tmp_path):
    options = ["noise", "--data", "fashion_mnist", "--out", "run", "--data-dir"]
    lines = _statuses("", [[*options, folder] for folder in ("/nonexistent", ".")], tmp_path)
    assert "got /nonexistent, which does not exist." in lines[0]
    assert "Expected the four IDX files of Fashion-MNIST in ., got none called train-images" in lines[1]
    assert len(lines) == 2
    assert not [*tmp_path.iterdir()]


def test_what_may_not_be_read_or_written_is_one_line(tmp_path):
    """As a user who is not root, who may do all; what a run imports is loaded before, by one that is refused too."""
    tmp_path.chmod(0o755)
    write_fashion_mnist(tmp_path, 60, 20)
    files = [path.name for path in tmp_path.iterdir()]
    for name, mode in (("closed", 0), ("read_only", 0o555)):
        (tmp_path / name).mkdir(mode=mode)
    start = ["noise", "--data", "fashion_mnist", "--batch-size", "20", "--width", "8"]
    data_at, out_at = [*start, "--out", "run", "--data-dir"], [*start, "--data-dir", ".", "--out"]
    cases = {
        (*data_at, "closed"): "Permission denied: 'closed/",
        (*data_at, "closed/under"): "Permission denied: 'closed/under'",
        (*out_at, "closed"): "Permission denied: 'closed",
        (*out_at, "closed/run"): "Permission denied: 'closed/run",
        (*out_at, "read_only"): "can be created and written to, got read_only: Permission denied",
        (*out_at, "read_only/run"): "can be created and written to, got read_only/run: Permission denied",
    }
    prepare = f"main({[*out_at, '.']})\nos.geteuid() or os.seteuid(65534)"
    lines = _statuses(prepare, [*cases], tmp_path)
    for line, message in zip(lines, ["which holds something else", *cases.values()], strict=True):
        assert message in line
    (tmp_path / "closed").chmod(0o700)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["closed", "read_only", *files])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "got out=file, which is a file."),
        ("file/run", "can be created and written to, got file/run: Not a directory"),
        ("/proc/nowhere", "can be created and written to, got /proc/nowhere: "),
        ("", "got out=., which holds something else."),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_a_folder_is_one_line(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    assert main(["coherence", *DIGITS, "--out", out]) == 1
    assert message in _line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert Path("file").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "its config.json is not that of a run."),
        (b"null", "its config.json is not that of a run."),
        (b'{"model_type": "bert"}', "its config.json is not that of a run."),
        (b'{"experiment": ', "whose config.json is damaged"),
        (b"\xff\xfe", "whose config.json is damaged"),
        (b"", "whose config.json is damaged"),
    ],
)
def test_a_config_of_something_else_is_left_alone(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content)
    assert main(["coherence", *DIGITS, "--out", str(tmp_path)]) == 1
    assert message in _line(capsys)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"config.json": content}


def test_what_one_of_two_processes_cannot_read_ends_both_and_writes_nothing(tmp_path):
    """Each machine names a folder of its own; that of the second is missing."""
    out, port = tmp_path / "run", free_port()
    write_fashion_mnist(tmp_path, 60, 20)
    options = ["noise", "--data", "fashion_mnist", "--batch-size", "20", "--out", out]
    start = [sys.executable, "-m", "experiments", *options]
    cluster = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id"]
    commands = [[*start, *cluster, p, "--data-dir", folder] for p, folder in enumerate((tmp_path, "/nonexistent"))]
    with running(commands, [ENVIRONMENT] * 2) as started:
        errors = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [1, 1]
    assert "ValueError: Process 1 could not go on, and says why." in errors[0]
    assert "got /nonexistent, which does not exist." in errors[1]
    assert not any("Traceback" in error for error in errors)
    assert not out.exists()


def test_ctrl_c_before_anything_is_measured_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "_digits", lambda: signal.raise_signal(signal.SIGINT))
    assert main(["coherence", *DIGITS, "--out", str(tmp_path / "run")]) == 130
    assert _line(capsys) == "Interrupted."
    assert not (tmp_path / "run").exists()
