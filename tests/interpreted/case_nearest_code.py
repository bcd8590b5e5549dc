from __future__ import annotations

import dataclasses

import pytest
import torch
from books import judge

from vqkernels.triton import nearest_code
from vqkernels.triton.code_terms import PLANES, code_terms
from vqkernels.triton.configs import select_lanes, select_tiles
from vqkernels.triton.row_terms import row_terms
from vqkernels.triton.rows import row_grid

METRICS = ("l2", "dot", "cosine")
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


def make(rows: int, codes: int, dim: int, dtypes: str = "fp32", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    x_dtype, code_dtype = DTYPES[dtypes]
    return x.to(x_dtype), codebook.to(code_dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 17, 64])
def test_metrics_and_dtypes(metric, dtypes, dim):
    x, codebook = make(70, 130, dim, dtypes)
    judge(nearest_code(x, codebook, metric), x, codebook, metric)


@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (1, 300), (130, 1), (129, 257), (33, 64)])
@pytest.mark.parametrize("dim", [3, 40])
def test_tails(rows, codes, dim):
    for dtypes in ("fp32", "fp16"):
        x, codebook = make(rows, codes, dim, dtypes)
        judge(nearest_code(x, codebook, "l2"), x, codebook, "l2")


@pytest.mark.parametrize("dim", [300, 320])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_streamed_dimensions(dim, dtypes):
    x, codebook = make(40, 70, dim, dtypes)
    judge(nearest_code(x, codebook, "l2"), x, codebook, "l2")


@pytest.mark.parametrize("dim", [3, 64])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_equal_codes_give_the_lowest_index(dim, dtypes):
    x, codebook = make(64, 40, dim, dtypes)
    codebook = codebook[torch.arange(200) % 40].contiguous()
    indices = nearest_code(x, codebook, "l2")
    assert (indices < 40).all()
    judge(indices, x, codebook, "l2")
    collapsed = codebook[:1].expand(200, dim)
    assert (nearest_code(x, collapsed, "l2") == 0).all()


@pytest.mark.parametrize("dim", [3, 64])
def test_equal_codes_next_to_each_other(dim):
    x, codebook = make(64, 70, dim)
    codebook = codebook.repeat_interleave(3, 0)
    indices = nearest_code(x, codebook, "l2")
    assert (indices % 3 == 0).all()
    judge(indices, x, codebook, "l2")


@pytest.mark.parametrize("dim", [3, 64])
@pytest.mark.parametrize("splits", [2, 3])
def test_splits_change_nothing(dim, splits):
    x, codebook = make(20, 1500, dim)
    codebook[700:1400] = codebook[:700].clone()
    whole = nearest_code(x, codebook, "l2", splits=1)
    assert torch.equal(nearest_code(x, codebook, "l2", splits=splits), whole)
    judge(whole, x, codebook, "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtypes", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dim", [3, 64, 300])
def test_not_a_number(metric, dtypes, dim):
    x, codebook = make(40, 90, dim, dtypes)
    x[3, 1], x[5, 0], x[7, 2] = float("nan"), float("inf"), float("-inf")
    x[9] = 0
    codebook[0, 1], codebook[17, 0], codebook[89, 2] = float("nan"), float("inf"), float("-inf")
    codebook[40] = 0
    judge(nearest_code(x, codebook, metric), x, codebook, metric)


@pytest.mark.parametrize("dim", [3, 64])
def test_book_without_a_finite_code(dim):
    x, codebook = make(20, 30, dim)
    codebook[:, 0] = float("nan")
    assert (nearest_code(x, codebook, "l2", splits=1) == -1).all()
    x, codebook = make(20, 2000, dim)
    codebook[:, 0] = float("inf")
    assert (nearest_code(x, codebook, "l2", splits=2) == -1).all()


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [3, 64, 300])
def test_codes_whose_squared_norm_overflows(dim, dtypes):
    x, codebook = make(40, 90, dim, dtypes)
    far = (codebook.float().sign() * 3e30).to(codebook.dtype)
    assert (nearest_code(x, far[:1], "l2") == 0).all()
    assert (nearest_code(x, far, "l2", splits=2) >= 0).all()
    codebook[:30], codebook[77] = far[:30], far[77]
    judge(nearest_code(x, codebook, "l2"), x, codebook, "l2")
    codebook[80, 0] = float("inf")
    only = codebook[[80, 5, 80]]
    assert (nearest_code(x, only, "l2") == 1).all()


def test_squared_norms_up_to_the_limit_are_exact():
    x, codebook = make(40, 90, 24)
    x, codebook = x * 2.0**58, codebook * 2.0**58
    assert codebook.square().sum(-1).isfinite().all()
    judge(nearest_code(x, codebook, "l2"), x, codebook, "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 64])
def test_offset_and_tiny_data(metric, dim):
    x, codebook = make(64, 150, dim)
    judge(nearest_code(x + 10, codebook + 10, metric), x + 10, codebook + 10, metric)
    tiny = (torch.rand(150, dim, generator=torch.Generator().manual_seed(1)) * 2 - 1) / 150
    judge(nearest_code(x, tiny, metric), x, tiny, metric)
    judge(nearest_code(tiny[:64], tiny, metric), tiny[:64], tiny, metric)
    minute = codebook * 1e-25
    judge(nearest_code(x, minute, "cosine"), x, minute, "cosine")


def test_strides():
    x, codebook = make(2 * 5 * 7, 90, 24)
    expected = nearest_code(x, codebook, "l2").view(2, 5, 7)
    channel_first = x.view(2, 5, 7, 24).permute(0, 3, 1, 2).contiguous()
    seen = channel_first.permute(0, 2, 3, 1)
    assert not seen.is_contiguous()
    assert torch.equal(nearest_code(seen, codebook, "l2"), expected)
    wide = torch.zeros(2, 5, 14, 48)
    wide[:, :, ::2, ::2] = x.view(2, 5, 7, 24)
    assert torch.equal(nearest_code(wide[:, :, ::2, ::2], codebook, "l2"), expected)
    strided_book = torch.zeros(24, 180)
    strided_book[:, ::2] = codebook.T
    assert torch.equal(nearest_code(x, strided_book[:, ::2].T, "l2"), expected.flatten())
    halves, half_book = x.half(), codebook.half()
    assert torch.equal(
        nearest_code(halves.T.contiguous().T, half_book.T.contiguous().T, "l2"),
        nearest_code(halves, half_book, "l2"),
    )


def test_four_levels_of_strides_are_copied():
    x, codebook = make(2 * 3 * 2 * 3, 30, 8)
    wide = torch.zeros(4, 6, 4, 6, 8)
    wide[::2, ::2, ::2, ::2] = x.view(2, 3, 2, 3, 8)
    indices = nearest_code(wide[::2, ::2, ::2, ::2], codebook, "l2")
    assert torch.equal(indices.flatten(), nearest_code(x, codebook, "l2"))


@pytest.mark.parametrize("dim", [3, 40])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_books(dim, lead):
    groups, rows, codes = 3, 25, 70
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*lead, groups, rows, dim, generator=generator)
    codebook = torch.randn(groups, codes, dim, generator=generator)
    indices = nearest_code(x, codebook, "l2")
    assert indices.shape == x.shape[:-1]
    for g in range(groups):
        flat = x.select(-3, g).reshape(-1, dim)
        judge(indices.select(-2, g).reshape(-1), flat, codebook[g], "l2")
    if not lead:
        split = nearest_code(x, codebook.repeat(1, 16, 1), "l2", splits=2)
        assert torch.equal(split, indices)


def test_empty():
    _, codebook = make(1, 10, 8)
    assert nearest_code(torch.empty(0, 8), codebook, "l2").shape == (0,)
    assert nearest_code(torch.empty(3, 0, 8), codebook, "l2").shape == (3, 0)


@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_running_minima(lanes):
    x, codebook = make(48, 500, 64, "fp16")
    codebook[250:] = codebook[:250].clone()
    table = select_tiles(80, "native", 64, 48)
    config = dataclasses.replace(table, block_n=32, block_k=64, lanes=lanes)
    judge(nearest_code(x, codebook, "l2", config=config), x, codebook, "l2")


def test_ieee_products():
    x, codebook = make(48, 200, 64)
    table = select_tiles(80, "native", 64, 48)
    config = dataclasses.replace(table, block_n=32, block_k=64, lanes=8)
    judge(nearest_code(x, codebook, "l2", config=config), x, codebook, "l2")


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 260])
def test_every_product_of_terms_counts(x_dtype, dim):
    """Two codes, opposite to each other, and rows so nearly orthogonal to them that which one is
    nearer is decided 2^-20 below the products: losing a pair of terms would show."""
    problems = 12
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2, problems, generator=generator) + 1).to(x_dtype).double()
    u = (torch.rand(problems, generator=generator) + 1).double()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(problems // 2)
    v = (p * u.float().double() / q * (1 - sign * 2**-20)).float()
    x = torch.stack([p, q], 1).repeat_interleave(dim // 2, 1)[:, None].to(x_dtype)
    code = torch.stack([u.float(), -v], 1).repeat_interleave(dim // 2, 1)
    indices = nearest_code(x, torch.stack([-code, code], 1), "dot")
    expected = (x[:, 0].double() * code.double()).sum(1) > 0
    assert torch.equal(expected, sign > 0)
    assert torch.equal(indices[:, 0], expected.long())


def test_native_products_want_one_dtype():
    x, codebook = make(48, 200, 64, "fp16-fp32")
    native = select_tiles(80, "native", 64, 48)
    with pytest.raises(ValueError, match=r"one dtype.*float16 and torch\.float32"):
        nearest_code(x, codebook, "l2", config=native)
    judge(nearest_code(x, codebook, "l2"), x, codebook, "l2")


def test_terms_add_up():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-30, 38, 64)[:, None]
    x = torch.randn(64, 40, generator=generator).clamp(-3, 3) * sizes
    x[0, 0], x[0, 1], x[1, 0] = 3.4028234e38, -3.4028234e38, 0.0
    for rows in (x, x.clamp(-60000, 60000).half()):
        terms, _ = row_terms(row_grid([rows], False))
        assert terms.shape[0] == {torch.float32: 3, torch.float16: 2}[rows.dtype]
        assert torch.equal(terms.double().sum(0)[0], rows.double())
    planes = code_terms(x[None], "dot", PLANES).form
    assert torch.equal(planes.double().sum(0)[0], x.double())


def test_any_lane_config():
    x, codebook = make(100, 300, 8)
    expected = nearest_code(x, codebook, "l2")
    config = dataclasses.replace(select_lanes(8), block_n=32, block_k=16)
    assert torch.equal(nearest_code(x, codebook, "l2", config=config), expected)
