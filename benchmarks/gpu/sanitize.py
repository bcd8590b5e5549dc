"""Few and small calls of every kernel of ours, to run under compute-sanitizer: shapes with tails in
every direction, strides, a split of K, a row and a code that are not numbers.

`python -m benchmarks.gpu.sanitize [PART [BACKEND]] [--dry-run]`; results are those of the reference
on the CPU, so that the tool watches our kernels alone.
"""

from __future__ import annotations

import argparse
import sys

import torch

import vqkernels

from .device import our_backends

# (rows, dimensions, codes): tensor-core tiles whole and with tails, few dimensions, a large book.
SHAPES = ((130, 64, 200), (33, 40, 65), (70, 256, 130), (100, 8, 300), (5, 3, 1000), (3, 32, 2100))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dim, codes = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(dim, rows, generator=generator).to(kind, dtype).T  # columns lie apart
    codebook = torch.randn(codes, dim, generator=generator).to(kind, dtype)
    x[1, 0], codebook[2, 0] = torch.nan, torch.inf
    return x, codebook


def search(backend: str, kind: str) -> None:
    """Raises AssertionError where a result is not the reference's; no two codes of this data are
    so close that rounding decides."""
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            metric = ("l2", "cosine")[(i + j) % 2]
            x, codebook = problem(shape, dtype, kind)
            with vqkernels.use_backend(backend):
                found = vqkernels.nearest_code(x, codebook, metric=metric).cpu()
            with vqkernels.use_backend("reference"):
                expected = vqkernels.nearest_code(x.cpu(), codebook.cpu(), metric=metric)
            differing = int((found != expected).sum())
            assert found[1] == -1
            assert differing == 0, f"{backend} {shape} {dtype} {metric}: {differing} differ"
        print(f"{backend} {shape}: as the reference", flush=True)


def quantize(backend: str, kind: str) -> None:
    """Forward and backward: masked rows have no gradient."""
    for i, shape in enumerate(SHAPES):
        x, codebook = (t.requires_grad_() for t in problem(shape, DTYPES[i % len(DTYPES)], kind))
        mask = torch.arange(x.shape[0], device=kind) % 3 > 0
        with vqkernels.use_backend(backend):
            out = vqkernels.quantize(x, codebook, mask=mask)
            total = out.quantized[out.indices >= 0].float().sum()
            (total + out.commitment_loss + out.codebook_loss).backward()
        assert x.grad is not None
        assert (x.grad.cpu()[~mask.cpu()] == 0).all()
        print(f"{backend} {shape}: quantized", flush=True)


# Tokens, columns and vectors a sample: tails of rows and columns, rows that are read in blocks.
MODULATED = ((9, 70, 1), (5, 1152, 5), (7, 64, 1), (3, 8200, 1))


def modulate(backend: str, kind: str) -> None:
    """The modulation ops and their gradients: close to the reference's."""
    for tokens, dim, frames in MODULATED:
        generator = torch.Generator().manual_seed(tokens)
        x, residual = torch.randn(2, 2, tokens, dim, generator=generator)
        gate, shift, scale = torch.randn(2, frames, 3 * dim, generator=generator).chunk(3, -1)
        weight = torch.randn(dim, generator=generator)
        found = []
        for name, where in ((backend, kind), ("reference", "cpu")):
            given = (x, residual, gate, shift, scale, weight)
            leaves = [t.to(where).requires_grad_() for t in given]
            with vqkernels.use_backend(name):
                normed, stream = vqkernels.gated_residual_ada_layer_norm(
                    leaves[1], leaves[0], gate=leaves[2], shift=leaves[3], scale=leaves[4]
                )
                out = vqkernels.ada_layer_norm(
                    normed, shift=leaves[3], scale=leaves[4], weight=leaves[5], norm="rms"
                )
                out = vqkernels.gated_residual(stream, out, gate=leaves[2])
                if backend != "cuda":
                    out = vqkernels.bias_gelu(out, leaves[3][0, 0])
                grads = torch.autograd.grad(out.sum(), leaves)
            found.append([t.detach().cpu() for t in (out, *grads)])
        for mine, expected in zip(*found, strict=True):
            limit = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(mine, expected, rtol=0, atol=limit)
        print(f"{backend} modulation {tokens} x {dim}: as the reference", flush=True)


# Queries, keys and columns: tiles of 64 and of 32 keys, eight columns behind the last step, tails.
ATTENDED = ((130, 70, 64), (33, 129, 72), (5, 40, 128))


def attend(backend: str, kind: str) -> None:
    """Attention of views, causal and with masks: close to the reference's."""
    for queries, keys, dim in ATTENDED:
        generator = torch.Generator().manual_seed(queries)
        q = torch.randn(2, queries, 2, dim, generator=generator, dtype=torch.bfloat16)
        packed = torch.randn(2, keys, 2, 2, dim, generator=generator, dtype=torch.bfloat16)
        kept = torch.rand(2, 1, 1, keys, generator=generator) < 0.7
        bias = torch.randn(queries, keys, generator=generator, dtype=torch.bfloat16)
        for causal, mask in ((True, None), (False, kept), (False, bias)):
            found = []
            for name, where in ((backend, kind), ("reference", "cpu")):
                heads = (q.to(where).transpose(1, 2), *packed.to(where).permute(2, 0, 3, 1, 4))
                given = None if mask is None else mask.to(where)
                with vqkernels.use_backend(name):
                    out = vqkernels.attention(*heads, attn_mask=given, is_causal=causal)
                found.append(out.cpu())
            torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
        print(f"{backend} attention {queries} x {keys} x {dim}: as the reference", flush=True)


PARTS = {"search": search, "quantize": quantize, "attention": attend, "modulation": modulate}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("backend", nargs="?")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    served = our_backends(given.dry_run)
    backends = [name for name in served if given.backend in (None, name)]
    for backend in backends:
        for part in [given.part] if given.part else PARTS:
            PARTS[part](backend, "cpu" if given.dry_run else "cuda")
    return 0 if backends else 1


if __name__ == "__main__":
    sys.exit(main())
