"""Packages that only some commands need, imported when they do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def require(module: str) -> Any:
    """Import a module of the `demo` extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(package, package)
        raise ImportError(
            f"{package} is needed here and could not be imported ({error}); "
            f"install it with `pip install {package}`, or all of `pip install 'vqkernels[demo]'`"
        ) from error


def progress_bar(iterable: Iterable[T], description: str, *, show: bool = True) -> Any:
    """A tqdm bar with speed and estimated time, or the bare iterable."""
    if not show:
        return iterable
    return require("tqdm").tqdm(iterable, desc=description, dynamic_ncols=True)
