"""`attention` on a GPU: rows of `bench_attention`, at a device's batch.

Ours by each backend, of which CUDA's gradients are Triton's, against PyTorch's choice and against
its flash and cuDNN kernels by name. q, k and v are views of one packed projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vqkernels
from benchmarks.bench_attention import SDPA, Inputs, our_attention
from benchmarks.bench_attention import AttentionCase as Row
from benchmarks.bench_modulation import BOTH, FORWARD
from benchmarks.case import OURS, Check, Provider, Variant
from vqkernels.backends import select

from .device import Device
from .timing import COLD, WARM

ATTENTION = "bench-attention"
FLASH, CUDNN = "SDPA, flash", "SDPA, cuDNN"


@dataclass(frozen=True)
class AttentionCase:
    """One row of `bench_attention` on a device."""

    row: Row
    stage: str = ATTENTION
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
        return f"B{self.row.batch} H{self.row.heads} N{self.row.tokens} d{self.row.dim}"

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
        return self.row.operations

    @property
    def scores(self) -> float:
        return float(self.row.batch * self.row.heads * self.row.tokens**2)

    @property
    def bytes_moved(self) -> float:
        return self.row.bytes_moved

    def inputs(self, device: Device) -> Inputs:
        host = self.row.inputs(self.data)
        packed = torch.stack([t.transpose(1, 2) for t in host.heads], 2).to(device.kind)
        return Inputs(list(packed.permute(2, 0, 3, 1, 4)), host.grad.to(device.kind))

    def providers(self, device: Device) -> tuple[Provider, ...]:
        names = ("cpu", "reference") if device.dry else ("cuda", "triton")
        mine = tuple(self._ours(name) for name in names if self._serves(name, device))
        theirs = (self._sdpa(SDPA, None),)
        if not device.dry:
            theirs += (
                self._sdpa(FLASH, SDPBackend.FLASH_ATTENTION),
                self._sdpa(CUDNN, SDPBackend.CUDNN_ATTENTION),
            )
        return mine + theirs

    def _serves(self, backend: str, device: Device) -> bool:
        dtype = getattr(torch, self.row.dtype)
        head = torch.empty(1, 1, 1, self.row.dim, dtype=dtype, device=device.kind)
        try:
            with vqkernels.use_backend(backend):
                select("attention", head, head, head)
        except ValueError:
            return False
        return True

    def _ours(self, backend: str) -> Provider:
        def served(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with vqkernels.use_backend(backend):
                return our_attention(q, k, v)

        variant = Variant("", lambda inputs: self.row.bind(served, inputs))
        return Provider(f"{OURS}-{backend}", (variant,))

    def _sdpa(self, name: str, backend: SDPBackend | None) -> Provider:
        """From the views, and from copies in which heads come first; the faster one counts."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        def copies(inputs: Inputs) -> Callable[[], Any]:
            heads = [t.contiguous() for t in inputs.heads]
            return self.row.bind(attend, Inputs(heads, inputs.grad))

        views = Variant("", lambda inputs: self.row.bind(attend, inputs))
        return Provider(name, (views, Variant("heads first", copies)))

    def keep(self, output: Any) -> Any:
        return self.row.keep(output)

    def check(self, inputs: Inputs, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        """The first of the batch, whose scores fit in float64."""
        first = Inputs([t[:1] for t in inputs.heads], inputs.grad[:1])
        kept = {name: [t[:1] for t in output] for name, output in outputs.items()}
        return dataclasses.replace(self.row, batch=1).check(first, kept)

    def shrunk(self) -> AttentionCase:
        """Different rows stay different by their models' names."""
        row = dataclasses.replace(
            self.row, batch=2, heads=2, tokens=16 + self.row.tokens // 128, dim=self.row.dim // 8
        )
        return dataclasses.replace(self, row=row)


def _cases() -> tuple[AttentionCase, ...]:
    bf16, fp16 = "bfloat16", "float16"
    rows = [
        ("DiT-S/2", 256, 6, 256, 64, bf16),
        ("DiT-XL/2", 128, 16, 256, 72, bf16),
        ("DiT-XL/2 512 px", 32, 16, 1024, 72, bf16),
        ("PixArt-Sigma", 8, 16, 4096, 72, bf16),
        ("a head of 64", 8, 12, 4096, 64, bf16),
        ("a head of 64", 8, 12, 4096, 64, fp16),
        ("FLUX.1", 2, 24, 4096, 128, bf16),
    ]
    found = [AttentionCase(Row(*row, FORWARD)) for row in rows]
    return (*found, *(AttentionCase(Row(*row, BOTH)) for row in rows[1:3]))


CASES = _cases()
