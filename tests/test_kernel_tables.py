"""The CPU kernels of every instruction set that this processor has."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.data import KINDS, generator, make
from _helpers.exact import assert_nearest, first_of_equals
from _helpers.processes import TESTS, run_python, runnable_capabilities
from _helpers.tables import METRICS, SCREENS, as_array, kernels_module, open_table
from torch import Tensor

from vqkernels import native

CAPABILITIES = runnable_capabilities()
needs_module = pytest.mark.skipif(
    kernels_module() is None, reason="the development module of kernels was not built"
)

# Files whose tests marked `every_capability` are repeated under each instruction set.
REPEATED = (
    "test_nearest_code.py",
    "test_nearest_code_inputs.py",
    "test_gather_codes.py",
    "test_code_statistics.py",
    "test_quantize.py",
    "test_quantize_gradients.py",
    "test_ema_update.py",
    "test_timestep_embedding.py",
    "test_ada_layer_norm.py",
    "test_bias_gelu.py",
    "test_qk_norm_rope.py",
    "test_attention_varlen.py",
    "test_attention_dropout.py",
    "test_normal_noise.py",
    "test_diffuse.py",
    "test_diffusion_loss.py",
    "test_denoise_step.py",
)


# ---- through the ops -----------------------------------------------------------------------


@pytest.mark.every_capability
@pytest.mark.skipif(native.problem is not None, reason=str(native.problem))
def test_the_best_instruction_set_runs() -> None:
    order = ("portable", "neon", "avx2", "avx512", "avx512_vnni_bf16")
    asked = os.environ.get("VQKERNELS_CPU_CAPABILITY")
    assert native.capability() == (asked or max(CAPABILITIES, key=order.index))


@pytest.mark.skipif(native.problem is not None, reason=str(native.problem))
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != native.capability()])
def test_every_op_under_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """The marked tests again, in a process with this instruction set."""
    files = [str(TESTS / name) for name in REPEATED]
    files.append(str(TESTS / "test_kernel_tables.py::test_the_best_instruction_set_runs"))
    selected = ["-m", "every_capability", "-k", "not reference", "-q", "-x", "--no-header"]
    cache = ["-p", "no:cacheprovider", f"--basetemp={tmp_path / 'repeated'}"]
    done = run_python(
        "-m", "pytest", *selected, *cache, *files, VQKERNELS_CPU_CAPABILITY=capability
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, summary
    assert int(summary.split(" passed")[0].split()[-1]) > 500, summary


# ---- the raw kernels -----------------------------------------------------------------------


@pytest.fixture(params=CAPABILITIES)
def table(request: pytest.FixtureRequest) -> Any:
    if kernels_module() is None:
        pytest.skip("the development module of kernels was not built")
    table = open_table(request.param)
    assert table.name == request.param
    return table


def screens_of(table: Any, dim: int) -> list[str]:
    return ["fp32", "int8"] if table.int8_screen and dim >= 32 else ["fp32"]


def search(
    table: Any, x: Tensor, codebook: Tensor, metric: str, packed: bool, screen: str = "fp32"
) -> Tensor:
    book = as_array(codebook)
    prepared = None
    if packed:
        prepared = table.pack_codebook(*book, METRICS[metric], SCREENS[screen])
    found = table.nearest_code(*as_array(x), *book, METRICS[metric], prepared, SCREENS[screen])
    return torch.from_numpy(found)


@needs_module
def test_the_module_opens_only_kernel_tables(tmp_path: Path) -> None:
    module = kernels_module()
    assert module is not None
    with pytest.raises(RuntimeError, match="no_such_object"):
        module.Table(str(tmp_path / "no_such_object.so"))
    with pytest.raises(RuntimeError, match="exports no kernel table"):
        module.Table(str(native.OPS_OBJECT))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 9, 13, 32, 33, 100])
def test_raw_search(table: Any, dim: int, metric: str) -> None:
    for kind in KINDS:
        for rows, codes in ((1, 1), (3, 17), (15, 64), (40, 100)):
            x, codebook = make(kind, rows, codes, dim, seed=5)
            plain = search(table, x, codebook, metric, packed=False)
            assert_nearest(x, codebook, plain, metric)
            for screen in screens_of(table, dim):
                found = search(table, x, codebook, metric, packed=True, screen=screen)
                assert torch.equal(found, plain), f"{screen} on {kind}, {rows} x {codes}"


@pytest.mark.parametrize("dim", [33, 64, 130, 256])
def test_int8_screen_on_adversaries(table: Any, dim: int) -> None:
    """Data chosen against an eight-bit screen; it must decide as fp32 does, only slower."""
    if not table.int8_screen:
        pytest.skip(f"{table.name} screens in fp32 alone")
    g = generator(dim)
    base = torch.randn(120, dim, generator=g)
    spike = base.clone()
    spike[:, 0] = 3000.0
    near = base[:1] + 1e-4 * base
    signs = torch.sign(base)
    clamped = torch.full((120, dim), 127.0) * torch.sign(base)
    lonely = torch.zeros(120, dim)
    lonely[torch.arange(120), torch.arange(120) % dim] = 1.0
    growing = base * torch.logspace(-6, 6, 120)[:, None]
    for name, codebook in {
        "one wide dimension": spike,
        "all but equal": near,
        "corners": signs,
        "extreme bytes": clamped,
        "unit vectors": lonely,
        "norms from 1e-6 to 1e6": growing,
        "half zero": base * (torch.arange(120) % 2)[:, None],
        "tiny differences on a large offset": 100 + 1e-3 * base,
    }.items():
        for rows in (codebook[:60] + 0.0, codebook[:60] * 1.01, base[60:], -codebook[30:90]):
            for metric in METRICS:
                plain = search(table, rows, codebook, metric, packed=False)
                found = search(table, rows, codebook, metric, packed=True, screen="int8")
                assert torch.equal(found, plain), f"{name}, {metric}"
                assert_nearest(rows, codebook, found, metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_search_in_half_precision(table: Any, dtype: torch.dtype) -> None:
    for dim in (4, 16, 65):
        x, codebook = make("gaussian", 30, 70, dim)
        half, half_book = x.to(dtype), codebook.to(dtype)
        for book in (codebook, half_book):
            for metric in METRICS:
                for packed in (False, True):
                    found = search(table, half, book, metric, packed)
                    assert_nearest(half, book, found, metric)


@pytest.mark.parametrize("dim", [2, 8, 11, 40])
def test_raw_search_reads_any_stride(table: Any, dim: int) -> None:
    x, codebook = make("gaussian", 30, 70, dim)
    expected = search(table, x, codebook, "l2", packed=False)
    apart, book_apart = torch.full((60, 3 * dim), math.nan), torch.full((dim, 140), math.nan)
    apart[1::2, 2::3], book_apart[:, 1::2] = x, codebook.T
    found = search(table, apart[1::2, 2::3], book_apart[:, 1::2].T, "l2", packed=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [3, 40])
def test_raw_search_without_numbers(table: Any, dim: int) -> None:
    x, codebook = make("gaussian", 40, 100, dim)
    x[7], x[8, 0], x[9, dim - 1] = math.nan, math.inf, -math.inf
    codebook[::2, dim // 2] = math.nan
    for packed in (False, True):
        for screen in screens_of(table, dim) if packed else ["fp32"]:
            found = search(table, x, codebook, "l2", packed, screen)
            assert (found[7:10] == -1).all()
            rest = torch.cat([found[:7], found[10:]])
            assert (rest % 2 == 1).all()
            assert_nearest(torch.cat([x[:7], x[10:]]), codebook, rest)
            hopeless = torch.full_like(codebook, math.inf)
            assert (search(table, x, hopeless, "l2", packed, screen) == -1).all()


def test_raw_duplicates(table: Any) -> None:
    for dim in (5, 32):
        x, codebook = make("duplicated", 60, 500, dim)
        for screen in screens_of(table, dim):
            found = search(table, x, codebook, "l2", packed=True, screen=screen)
            assert torch.equal(first_of_equals(codebook)[found], found)


def test_raw_code_sums(table: Any) -> None:
    for rows, codes, dim in ((0, 3, 2), (50, 7, 3), (300, 5, 64), (200, 9, 150)):
        x = torch.randn(rows, dim)
        indices = torch.randint(-1, codes, (rows,), generator=generator(rows))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = x.to(dtype)
            sums = table.code_sums(*as_array(values), indices.numpy(), codes)
            used = indices >= 0
            exact = torch.zeros(codes, dim, dtype=torch.float64)
            exact.index_add_(0, indices[used], values[used].double())
            np.testing.assert_allclose(sums, exact.numpy(), rtol=1e-6, atol=1e-6)


def test_raw_quantize_rows(table: Any) -> None:
    for rows, codes, dim in ((0, 3, 2), (50, 7, 3), (130, 5, 64), (65, 9, 33)):
        x, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
        indices = torch.randint(-1, codes, (rows,), generator=generator(rows))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values, book = x.to(dtype), codebook.to(dtype)
            out, total = table.quantize_rows(*as_array(values), *as_array(book), indices.numpy())
            used = indices >= 0
            bits = torch.from_numpy(
                np.asarray(out).view(np.int32 if dtype.itemsize == 4 else np.int16)
            )
            quantized = bits.view(dtype)
            assert torch.equal(quantized[used], book[indices[used]])
            assert quantized[~used].isnan().all()
            difference = values[used].double() - book[indices[used]].double()
            assert total == pytest.approx(float(difference.square().sum()), rel=1e-6)
