"""The ops layer of the CUDA object on tensors of the CPU: compiled as for a GPU, over emulated
kernels. It shows that layouts, groups, masks and empty inputs reach the launchers as they should;
the kernels themselves are tested in tests/emulated.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _helpers.modulation import eager_fused, eager_gate, eager_norm
from _helpers.precision import judge
from torch import Tensor

from vqkernels.reference import attention as attention_reference
from vqkernels.reference import nearest_code as search_reference
from vqkernels.reference import quantize as quantize_reference


def features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 2, 3, 5, 8).to(dtype), torch.randn(40, 8).to(dtype)


def channel_first(x: Tensor) -> Tensor:
    """The same values, columns far apart."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def scattered(x: Tensor) -> Tensor:
    """The same values where no two dimensions lie evenly: too many levels for a row grid."""
    wide = torch.zeros(*(2 * size + 1 for size in x.shape), dtype=x.dtype)
    view = wide[tuple(slice(0, 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channel-first": channel_first,
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "scattered": scattered,
    "broadcast": lambda x: x[:1, :, :1].expand_as(x),
    "reversed": lambda x: x.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0),
}


def assert_like_the_reference(
    ops: torch._ops._OpNamespace, x: Tensor, codebook: Tensor, mask: Tensor | None = None
) -> None:
    metric = "l2"
    expected = search_reference.nearest_code(x, codebook, metric=metric)
    found = ops.nearest_code(x, codebook, metric, "exact", None)
    assert torch.equal(found, expected)
    assert found.is_contiguous()

    wanted = quantize_reference.quantize(x, codebook, metric=metric, mask=mask)
    output = ops.quantize(x, codebook, metric, mask, "straight_through", None)
    assert torch.equal(output[0], wanted[0])
    assert output[0].stride() == torch.empty_like(x).stride()
    for mine, other in zip(output[1:], wanted[1:], strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)
    indices = output[1]

    one = torch.tensor(0.7)
    grad = torch.randn(x.shape).to(x.dtype)
    for passed, way in ((grad, "straight_through"), (grad[..., :1].expand_as(x), "none")):
        mine = ops.quantize_backward_x(passed, one, x, codebook, indices, way)
        other = quantize_reference.quantize_backward_x(
            passed, one, x, codebook, indices, gradient=way
        )
        assert mine.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(mine, other)
    mine = ops.quantize_backward_codebook(one, x, codebook, indices)
    other = quantize_reference.quantize_backward_codebook(one, x, codebook, indices)
    assert mine.is_contiguous()
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ops: torch._ops._OpNamespace, layout: str, dtype: torch.dtype) -> None:
    x, codebook = features(dtype)
    assert_like_the_reference(ops, LAYOUTS[layout](x), codebook)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_books(ops: torch._ops._OpNamespace, layout: str) -> None:
    """The group's dimension stands within those of the rows."""
    x, _ = features(torch.float32)
    codebook = torch.randn(8, 20, 3).permute(2, 1, 0)
    mask = (torch.rand(5, 2, 2, 2, 3) < 0.7).permute(1, 2, 3, 4, 0)
    assert_like_the_reference(ops, LAYOUTS[layout](x), codebook, mask)


def test_a_half_with_a_float32_book(ops: torch._ops._OpNamespace) -> None:
    x, codebook = features(torch.float32)
    assert_like_the_reference(ops, x.half(), codebook.t().contiguous().t())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 10, 8), (0, 3, 10, 8), (1, 8), (1, 1, 1, 8)])
def test_few_or_no_rows(ops: torch._ops._OpNamespace, shape: tuple[int, ...]) -> None:
    codebook = torch.randn(40, 8)
    assert_like_the_reference(ops, torch.randn(shape), codebook)


def test_indices_of_other_strides(ops: torch._ops._OpNamespace) -> None:
    x, codebook = features(torch.float32)
    indices = search_reference.nearest_code(x, codebook, metric="l2")
    turned = indices.transpose(0, -1).contiguous().transpose(0, -1)
    one = torch.tensor(1.0)
    assert torch.equal(
        ops.quantize_backward_codebook(one, x, codebook, turned),
        ops.quantize_backward_codebook(one, x, codebook, indices),
    )
    assert torch.equal(
        ops.quantize_backward_x(None, one, x, codebook, turned, "none"),
        ops.quantize_backward_x(None, one, x, codebook, indices, "none"),
    )


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_metrics_and_ways_of_gradients(ops: torch._ops._OpNamespace, metric: str) -> None:
    x, codebook = features(torch.float32)
    expected = search_reference.nearest_code(x, codebook, metric=metric)
    assert torch.equal(ops.nearest_code(x, codebook, metric, "exact", None), expected)
    for way in ("straight_through", "rotation", "none"):
        grad = torch.randn_like(x)
        mine = ops.quantize_backward_x(grad, None, x, codebook, expected, way)
        other = quantize_reference.quantize_backward_x(
            grad, None, x, codebook, expected, gradient=way
        )
        torch.testing.assert_close(mine, other)


def test_too_many_rows_are_refused(ops: torch._ops._OpNamespace) -> None:
    """Before anything of their size is allocated."""
    x, codebook = torch.zeros(1, 1, dtype=torch.float16).expand(1 << 31, 1), torch.zeros(2, 1)
    one, indices = torch.tensor(1.0), torch.zeros(1, dtype=torch.int64).expand(1 << 31)
    calls = (
        lambda: ops.nearest_code(x, codebook, "l2", "exact", None),
        lambda: ops.quantize(x, codebook, "l2", None, "none", None),
        lambda: ops.quantize_backward_x(None, one, x, codebook, indices, "none"),
        lambda: ops.quantize_backward_codebook(one, x, codebook, indices),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"fewer than 2\^31 rows, got shape \[2147483648, 1\]"):
            call()


def heads(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k and v: four heads of 20 queries, two of 30 keys."""
    return [torch.randn(2, *shape, dim).to(dtype) for shape in ((4, 20), (2, 30), (2, 30))]


def neighbours(x: Tensor) -> Tensor:
    """The same values with heads beside each other, as views of a packed qkv have them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def misplaced(x: Tensor) -> Tensor:
    """The same values, rows beginning at odd elements."""
    wide = torch.zeros(*x.shape[:3], x.shape[3] + 9, dtype=x.dtype)
    return wide[..., 1 : x.shape[3] + 1].copy_(x)


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous from an odd element on."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


HEAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "neighbours": neighbours,
    "misplaced": misplaced,
    "shifted": shifted,
    "columns-apart": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :1].expand_as(x),
}


def assert_attention(ops: torch._ops._OpNamespace, *arguments: object) -> None:
    """Strides of the results, and their values up to the weights' rounding."""
    out, lse = ops.attention(*arguments, 0.0, None)
    expected, logarithms = attention_reference.attention_with_lse(*arguments)
    assert out.stride() == expected.stride()
    assert out.dtype == expected.dtype
    assert lse.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, logarithms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_layouts_of_heads(ops: torch._ops._OpNamespace, layout: str) -> None:
    """Each of q, k and v in turn, then all."""
    of = HEAD_LAYOUTS[layout]
    for turned in ((0,), (1,), (2,), (0, 1, 2)):
        q, k, v = (of(x) if i in turned else x for i, x in enumerate(heads()))
        for causal in (False, True):
            assert_attention(ops, q, k, v, None, causal, 0.125)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_masks_of_heads(ops: torch._ops._OpNamespace, dim: int, dtype: torch.dtype) -> None:
    q, k, v = heads(dim, dtype)
    shape = (2, 4, 20, 30)
    kept = torch.rand(2, 1, 1, 30) < 0.6
    bias = torch.randn(4, 30, 20).to(dtype).mT[None]
    for mask in (kept, kept.expand(2, 4, 20, 30).contiguous(), bias):
        assert_attention(ops, q, k, v, mask.expand(shape), False, -0.1)


@pytest.mark.parametrize(
    ("shape", "keys"), [((0, 2, 5), 9), ((2, 0, 5), 9), ((2, 2, 0), 9), ((2, 2, 5), 0)]
)
def test_no_queries_or_no_keys(
    ops: torch._ops._OpNamespace, shape: tuple[int, ...], keys: int
) -> None:
    q = torch.randn(*shape, 64).half()
    k = torch.randn(shape[0], max(1, shape[1]), keys, 64).half()
    assert_attention(ops, q, k, k, None, False, 0.125)


def test_attention_refuses_what_it_has_no_kernel_for(ops: torch._ops._OpNamespace) -> None:
    half, wide = torch.ones(1, 1, 4, 64).half(), torch.ones(1, 1, 4, 88).half()
    message = "64, 72, 80, 96 or 128 columns of q, k and v, got"
    for q, k, v in ((wide, wide, wide), (half, half, wide), (half.float(),) * 3):
        with pytest.raises(ValueError, match=message):
            ops.attention(q, k, v, None, False, 0.125, 0.0, None)
    with pytest.raises(ValueError, match="no dropout"):
        ops.attention(half, half, half, None, False, 0.125, 0.5, torch.tensor(1))


def test_heads_of_too_many_rows_are_refused(ops: torch._ops._OpNamespace) -> None:
    few = torch.ones(1, 1, 1, 64).half()
    many = few.expand(1, 1, (1 << 30) + 1, 64)
    for q, k in ((many, few), (few, many)):
        with pytest.raises(ValueError, match=r"at most 2\^30 rows a head, got 1073741825"):
            ops.attention(q, k, k, None, False, 0.125, 0.0, None)


def test_gradients_follow_a_forward_by_cuda(ops: torch._ops._OpNamespace) -> None:
    leaves = [x.requires_grad_() for x in heads()]
    grad = torch.randn(2, 4, 20, 64).bfloat16()
    results = []
    for backend in ("cuda", "reference"):
        out, _ = torch.ops.vqkernels.attention(*leaves, None, True, 0.125, 0.0, None, backend)
        results.append(torch.autograd.grad(out, leaves, grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-2)


def modulated(op: str, backend: str = "cuda") -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """One of the modulation ops on its tensors, with gradients."""
    of = getattr(torch.ops.vqkernels, op)
    if op == "gated_residual":
        return lambda *tensors: of(*tensors, backend)
    if op == "ada_layer_norm":
        return lambda *tensors: of(*tensors, None, None, 1e-6, "layer", backend)[0]
    return lambda *tensors: of(*tensors, 1e-6, "layer", backend)[:2]


MODULATED = {
    "ada_layer_norm": eager_norm("layer"),
    "gated_residual": eager_gate,
    "gated_residual_ada_layer_norm": eager_fused("layer"),
}


def tokens_and_vectors(
    op: str, shape: tuple[int, int, int], frames: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], list[Tensor]]:
    """An op's tokens and its vectors: views of one projection."""
    batch, _, dim = shape
    projected = torch.randn(*((batch, frames) if frames else (batch,)), 6 * dim).to(dtype)
    gate, shift, scale = projected.chunk(6, dim=-1)[1:4]
    tokens = [torch.randn(shape).to(dtype) for _ in range(1 if op == "ada_layer_norm" else 2)]
    vectors = {"ada_layer_norm": [shift, scale], "gated_residual": [gate]}
    return tokens, vectors.get(op, [gate, shift, scale])


TOKEN_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "misplaced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "shifted": shifted,
    "columns-apart": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("op", MODULATED)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
def test_layouts_of_tokens(ops: torch._ops._OpNamespace, layout: str, op: str) -> None:
    of = TOKEN_LAYOUTS[layout]
    for frames in (0, 5, 10):
        tokens, vectors = tokens_and_vectors(op, (3, 10, 24), frames)
        grads = [of(torch.randn(3, 10, 24).bfloat16()) for _ in range(2)]
        judge(modulated(op), MODULATED[op], [*map(of, tokens), *vectors], grads)


@pytest.mark.parametrize("op", MODULATED)
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 4, 1), (4, 1, 5), (1, 1, 1)])
def test_one_row_or_one_column(
    ops: torch._ops._OpNamespace, shape: tuple[int, int, int], op: str
) -> None:
    tokens, vectors = tokens_and_vectors(op, shape, dtype=torch.float32)
    grads = [torch.randn(shape) for _ in range(2)]
    judge(modulated(op), MODULATED[op], [*tokens, *vectors], grads)


@pytest.mark.parametrize("weight", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_weight_and_bias(
    ops: torch._ops._OpNamespace, weight: torch.dtype | None, bias: torch.dtype | None
) -> None:
    """What is not given has a gradient without elements; strides are read or copied."""
    x, shift, scale = (torch.randn(*shape) for shape in ((2, 9, 20), (2, 20), (2, 20)))
    grad = torch.randn(2, 9, 20)
    rows = [None if of is None else torch.randn(20, 3).to(of)[:, 1] for of in (weight, bias)]
    reference = torch.ops.vqkernels
    arguments = (x, shift, scale, *rows, 1e-6, "layer")
    out, statistics = ops.ada_layer_norm(*arguments)
    expected = reference.ada_layer_norm(*arguments, "reference")
    torch.testing.assert_close((out, statistics), expected)
    arguments = (grad, x, shift, scale, *rows, statistics, "layer")
    found = ops.ada_layer_norm_backward(*arguments)
    expected = reference.ada_layer_norm_backward(*arguments, "reference")
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("op", MODULATED)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_no_tokens(ops: torch._ops._OpNamespace, shape: tuple[int, int, int], op: str) -> None:
    tokens, vectors = tokens_and_vectors(op, shape)
    leaves = [t.requires_grad_() for t in (*tokens, *(v.detach() for v in vectors))]
    results = []
    for backend in ("cuda", "reference"):
        outputs = modulated(op, backend)(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.ones_like(of) for of in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
