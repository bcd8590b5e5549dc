"""What a benchmark case is: one row of one table, its providers, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OURS = "vqkernels"


@dataclass(frozen=True)
class Variant:
    """One way to run a provider. `bind(inputs)` does what happens once, and returns the call."""

    name: str
    bind: Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Provider:
    """A library in every configuration its users would try; the fastest one is timed."""

    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Check:
    """Outcome of comparing one provider with float64.

    `mismatches` of `checked` rows differ from the float64 choice; `refusal` says why the result
    is wrong beyond what rounding explains, and is empty for a provider that may be timed.
    """

    checked: int
    mismatches: int
    refusal: str = ""


class Case(Protocol):
    """One row: `operations` and `bytes_moved` are what any implementation has to spend."""

    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def default(self) -> bool: ...
    @property
    def quick(self) -> bool: ...
    @property
    def operations(self) -> float: ...
    @property
    def bytes_moved(self) -> float: ...

    def inputs(self, data: str) -> Any: ...

    def providers(self) -> tuple[Provider, ...]: ...

    def keep(self, output: Any) -> Any:
        """What `check` needs of a first call's output, safe from the calls that follow."""
        ...

    def check(self, inputs: Any, outputs: Mapping[str, Any]) -> dict[str, Check]: ...

    def packed_bytes(self, inputs: Any) -> int | None: ...


def key(case: Case) -> str:
    """The name that picks a case on a command line and in a worker process."""
    return f"{case.op}/{case.name}/{case.shape}/{case.mode}"
