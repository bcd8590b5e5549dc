"""diffusers' schedulers in float64: what their own equations give without rounding."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

_CLASSES: dict[type, type] = {}


def in_float64(scheduler: type) -> Any:
    """The class, from its module's source with float64 wherever it says float32."""
    if scheduler not in _CLASSES:
        module = sys.modules[scheduler.__module__]
        twin = types.ModuleType(module.__name__)
        twin.__package__ = module.__package__
        source = inspect.getsource(module).replace("float32", "float64")
        exec(compile(source, f"{module.__file__} in float64", "exec"), twin.__dict__)
        _CLASSES[scheduler] = getattr(twin, scheduler.__name__)
    return _CLASSES[scheduler]
