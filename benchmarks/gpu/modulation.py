"""The modulation ops and `bias_gelu` on a GPU: rows of `bench_modulation`, at a device's batch.

Their floor is bytes over the copy rate, so tensors are larger than any L2 (H100 and H200 50 MB).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import vqkernels
from benchmarks.bench_modulation import BOTH, FORWARD, OPS, Inputs
from benchmarks.bench_modulation import ModulationCase as Row
from benchmarks.case import OURS, Check, Provider, Variant
from vqkernels.backends import select

from .device import Device
from .timing import COLD, WARM

MODULATION = "bench-modulation"
_DRY_BATCH, _DRY_TOKENS = 2, 12


@dataclass(frozen=True)
class ModulationCase:
    """One row of `bench_modulation` on a device."""

    row: Row
    stage: str = MODULATION
    data: str = "gaussian"
    modes: tuple[str, ...] = (COLD, WARM)

    @property
    def op(self) -> str:
        return self.row.op if self.row.direction == FORWARD else f"{self.row.op}, {BOTH}"

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> str:
        return f"B{self.row.batch} N{self.row.tokens} D{self.row.dim}"

    @property
    def dtype(self) -> str:
        return self.row.dtype

    @property
    def dtypes(self) -> str:
        return self.row.dtype

    @property
    def key(self) -> str:
        return f"{self.op} {self.name} {self.shape} {self.dtype}"

    @property
    def operations(self) -> float:
        """Nothing of it can take the time of its bytes."""
        return 0.0

    @property
    def scores(self) -> float:
        return 0.0

    @property
    def bytes_moved(self) -> float:
        return self.row.bytes_moved

    def inputs(self, device: Device) -> Inputs:
        host = self.row.inputs(self.data)
        on_device = ([t.to(device.kind) for t in of] for of in (host.arguments, host.grads))
        return Inputs(*on_device)

    def providers(self, device: Device) -> tuple[Provider, ...]:
        names = ("cpu", "reference") if device.dry else ("cuda", "triton")
        mine = tuple(self._ours(name) for name in names if _serves(name, self.row.op, device))
        return mine + self.row.providers()[1:]

    def _ours(self, backend: str) -> Provider:
        function = OPS[self.row.op].ours

        def bind(inputs: Inputs) -> Callable[[], Any]:
            def served(*arguments: Any) -> Any:
                with vqkernels.use_backend(backend):
                    return function(*arguments)

            return self.row.bind(served, inputs)

        return Provider(f"{OURS}-{backend}", (Variant("", bind),))

    def keep(self, output: Any) -> Any:
        return self.row.keep(output)

    def check(self, inputs: Inputs, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        return self.row.check(inputs, outputs)

    def shrunk(self) -> ModulationCase:
        """Different rows stay different, since no two differ in batch or tokens alone."""
        width = self.row.dim // 8
        row = dataclasses.replace(self.row, batch=_DRY_BATCH, tokens=_DRY_TOKENS, dim=width)
        return dataclasses.replace(self, row=row)


def _serves(backend: str, op: str, device: Device) -> bool:
    try:
        with vqkernels.use_backend(backend):
            select(op, torch.empty(1, device=device.kind))
    except ValueError:
        return False
    return True


def _cases() -> tuple[ModulationCase, ...]:
    """DiT-XL/2 in full; its ends, and FLUX's width, for the form that a block runs most."""
    norm, gate, fused, gelu = OPS
    bf16, fp32 = "bfloat16", "float32"
    xl, small = ("DiT-XL/2", 128, 256, 1152), ("DiT-S/2", 256, 256, 384)
    flux = ("FLUX.1", 8, 4096, 3072)
    rows = [(op, xl, bf16) for op in (fused, norm, gelu, gate)]
    rows += [(op, xl, fp32) for op in (fused, norm, gelu)]
    rows += [(fused, small, bf16), (fused, flux, bf16)]
    found = []
    for op, (name, batch, tokens, dim), dtype in rows:
        width = 4 * dim if op == gelu else dim
        for direction in (FORWARD, BOTH):
            found.append(ModulationCase(Row(op, name, batch, tokens, width, dtype, direction)))
    return tuple(found)


CASES = _cases()
