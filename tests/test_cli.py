"""The command line: what it accepts, what it writes, how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqkernels import _optional
from vqkernels.cli import main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for package in ("mlxtend", "sklearn", "matplotlib", "PIL", "safetensors", "tqdm"):
        pytest.importorskip(package)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 16, 16), dtype=np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, images=pixels, labels=np.arange(30) % 3)
    return file


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("info", "demo", "train", "sample"))


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["demo", "--dit-steps", "0"], ["sample", "--count", "many"]],
)
def test_usage_errors_end_with_status_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: vqkernels" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train"])
def test_bad_data_is_one_line_on_stderr(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([command, "--data", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vqkernels {command}: ")
    assert "does not exist" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_train_then_sample(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    run = tmp_path / "run"
    steps = ["--vqvae-steps", "2", "--dit-steps", "2"]
    assert main(["train", "--data", str(images), "--out", str(run), *steps]) == 0
    written = {path.name for path in run.iterdir()}
    assert written == {"vqvae.safetensors", "dit.safetensors", "curves.png"}

    common = ["sample", "--checkpoint", str(run), "--steps", "2", "--count", "4"]
    files = [tmp_path / "pictures" / f"{i}.png" for i in range(3)]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        arguments = [*common, "--classes", "2", "0", "--seed", seed, "--out", str(file)]
        assert main(arguments) == 0
    first, again, other = (np.asarray(Image.open(file)) for file in files)
    assert first.shape[1] > first.shape[0]  # two rows of four
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)

    capsys.readouterr()
    assert main([*common, "--classes", "7"]) == 2
    assert "'7' is not one of those trained on: 0, 1, 2" in capsys.readouterr().err
    assert main(["sample", "--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "vqvae.safetensors does not exist" in capsys.readouterr().err


def test_smoke_of_the_demo(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--smoke", "--data", str(images), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("held-out reconstruction", "classifier", "PyTorch reference", "metrics.json"):
        assert part in printed or (out / part).exists()


def test_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        _optional.require("sklearn.svm")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "vqkernels[demo]" in capsys.readouterr().err


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "vqkernels", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "vqkernels" in result.stdout


def test_importing_the_package_needs_no_optional_package() -> None:
    code = (
        "import sys\n"
        "for name in ('mlxtend', 'sklearn', 'matplotlib', 'PIL', 'safetensors', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "import vqkernels, vqkernels.nn, vqkernels.models, vqkernels.schedulers, vqkernels.cli\n"
        "import vqkernels.training.demo\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
