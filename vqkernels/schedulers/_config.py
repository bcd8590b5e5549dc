"""A scheduler's config: its constructor's arguments, frozen, read and written as diffusers does."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import Tensor
from typing_extensions import Self

from vqkernels.schedulers._compat import check_numerics, faults_reproduced

CONFIG_NAME = "scheduler_config.json"

# What diffusers' from_pretrained takes for downloads; there are none here.
_HUB_OPTIONS = frozenset(
    (
        *("cache_dir", "force_download", "local_dir", "local_files_only", "mirror"),
        *("output_loading_info", "proxies", "revision", "token", "user_agent"),
    )
)


class Config(dict[str, Any]):
    """Read-only; `config.name` and `config["name"]` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no entry {name!r}") from None

    def _frozen(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a scheduler's config is read-only: use from_config(config, name=value)")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = _frozen
    update = pop = popitem = clear = setdefault = _frozen
    __ior__ = _frozen

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def configured(init: Callable[..., None]) -> Callable[..., None]:
    """Make `__init__` note its arguments as `self.config` before it runs.

    `numerics` and `compat` become attributes and enter the config only where they are not the
    defaults, so that diffusers reads the config without a warning.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remember(self: Configured, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "self"}
        numerics, compat = values.pop("numerics"), values.pop("compat")
        self.numerics = check_numerics(numerics)
        self.compat = faults_reproduced(numerics, compat)
        defaults = [name for name in values if name not in given]
        if numerics != "exact":
            values["numerics"] = numerics
        if compat is not None:
            values["compat"] = list(compat)
        values["_class_name"] = type(self).__name__
        values["_use_default_values"] = defaults
        # A subclass that hands arguments on to its parent keeps what it noted itself.
        self._internal_dict = Config({**values, **getattr(self, "_internal_dict", {})})
        init(self, *args, **kwargs)

    return remember


class Configured:
    """What every scheduler inherits of diffusers' `ConfigMixin` and `SchedulerMixin`."""

    config_name = CONFIG_NAME
    numerics: str
    compat: frozenset[str]
    _internal_dict: Config  # diffusers' pipelines set this name when they correct a config
    _compatibles: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return self._internal_dict

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | Any,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """A scheduler of this class from a config, of whatever class that is.

        Args:
            config: a mapping, or a scheduler (of this package or of diffusers). Entries that this
                class has no argument for stay in the new config and do nothing. Values that the
                other class filled in by default are left to this class's defaults.
            return_unused_kwargs: return `(scheduler, overrides that were not used)`.
            **overrides: arguments that replace entries of the config.

        Raises:
            TypeError: an override that is not an argument of this class.
            ValueError: not a config; an argument that does not fit.
        """
        source = getattr(config, "config", config)
        if not isinstance(source, Mapping):
            raise ValueError(
                f"config must be a mapping or a scheduler, got {type(config).__name__}; "
                f"a directory is read by {cls.__name__}.from_pretrained"
            )
        entries = dict(source)
        for name in entries.pop("_use_default_values", ()):
            entries.pop(name, None)
        accepted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        unused = {name: value for name, value in overrides.items() if name not in accepted}
        if unused and not return_unused_kwargs:
            raise TypeError(f"{cls.__name__} has no argument {next(iter(unused))!r}")
        entries.update(overrides)
        arguments = {name: entries[name] for name in accepted if name in entries}
        scheduler = cls(**arguments)
        others = {
            name: value
            for name, value in entries.items()
            if name not in arguments and name not in unused
        }
        scheduler._internal_dict = Config({**others, **scheduler._internal_dict})
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(cls, directory: str | os.PathLike[str], subfolder: str = "") -> dict[str, Any]:
        path = Path(directory, subfolder or "", cls.config_name)
        if not path.is_file():
            raise OSError(f"found no {cls.config_name} in {path.parent}: give a local directory")
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return entries

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """`from_config` of the `scheduler_config.json` in a local directory (or its subfolder)."""
        entries = cls.load_config(pretrained_model_name_or_path, subfolder or "")
        overrides = {name: v for name, v in overrides.items() if name not in _HUB_OPTIONS}
        return cls.from_config(entries, return_unused_kwargs, **overrides)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False
    ) -> None:
        """Write `scheduler_config.json`, which diffusers reads too."""
        if push_to_hub:
            raise ValueError("push_to_hub must be False: upload the directory that was saved")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        path = Path(save_directory, self.config_name)
        path.write_text(self.to_json_string(), encoding="utf-8")

    save_config = save_pretrained

    def to_json_string(self) -> str:
        entries = {**self.config, "_class_name": type(self).__name__}
        entries.pop("_use_default_values", None)
        return json.dumps(entries, indent=2, sort_keys=True, default=_as_json) + "\n"

    @property
    def compatibles(self) -> list[type[Self]]:
        """The schedulers of this package that take this one's config."""
        from vqkernels import schedulers

        names = {type(self).__name__, *self._compatibles}
        return [getattr(schedulers, name) for name in sorted(names) if hasattr(schedulers, name)]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _as_json(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    raise TypeError(f"a config entry of type {type(value).__name__} can't be written as JSON")
