"""`torch.library.opcheck` for every op, and fake against real results for every dtype mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels.backends import KERNELS

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]


def need(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in tensors)


def samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Op and arguments, without the trailing backend."""
    x, codebook = torch.randn(7, 6), torch.randn(5, 6)
    groups, books = torch.randn(2, 3, 7, 6), torch.randn(3, 5, 6)
    feature_map = torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1)
    indices = torch.tensor([0, 4, -1, 2, 2, 1, 0])
    by_group = torch.randint(-1, 5, (2, 3, 7))
    mask = torch.tensor([True, False, True, True, True, False, True])
    one = torch.ones(())
    tokens, branch = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    gate, shift, scale = torch.randn(2, 30).chunk(6, dim=1)[:3]
    by_frame, by_token = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    weight, bias = torch.randn(5), torch.randn(5)
    statistics = torch.rand(2, 6, 2) + 0.5
    q, k = torch.randn(2, 4, 3, 4, 6).permute(1, 0, 3, 2, 4)[:2]
    cos, sin, row = torch.randn(2, 3, 3), torch.randn(2, 3, 3), torch.randn(6)
    heads = (torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5))
    packed_heads = tuple(torch.randn(2, 6, 3, 3, 8).permute(2, 0, 3, 1, 4))
    packed, square = torch.randn(2, 6, 3, 3, 8), torch.rand(6, 6) > 0.3
    packed_grad = torch.randn(2, 6, 3, 8)
    allowed = torch.rand(3, 6) > 0.3
    rows, of_keys = torch.randn(7, 4, 8), torch.randn(6, 2, 8)
    starts = tuple(torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 3, 7], [0, 4, 6, 6]))
    undropped, dropped = (0.0, None), (0.25, torch.tensor(7))
    varying, row_lse = (*starts, 4, 4), torch.rand(4, 7) + 2
    data, level, tokens_level = torch.randn(2, 3, 5), torch.rand(2), torch.rand(2, 3)
    rows22 = torch.rand(3, 22)
    key, ids = torch.tensor([5, 1, 2]), torch.tensor([4, 9])
    lse, lse6 = torch.rand(2, 4, 3) + 2, torch.rand(2, 3, 6) + 2
    return {
        "nearest_code": ("nearest_code", (x, codebook, "l2", "exact", None)),
        "nearest_code, groups": ("nearest_code", (groups, books, "cosine", "exact", None)),
        "nearest_code, channel first": (
            "nearest_code",
            (feature_map, codebook, "dot", "fast", None),
        ),
        "nearest_code, gradients": (
            "nearest_code",
            (*need(x.clone(), codebook.clone()), "l2", "exact", None),
        ),
        "pack_codebook": ("pack_codebook", (codebook, "l2")),
        "pack_codebook, groups": ("pack_codebook", (books, "cosine")),
        "gather_codes": ("gather_codes", (codebook, indices)),
        "gather_codes, gradients": ("gather_codes", (*need(codebook.clone()), indices)),
        "gather_codes, groups": ("gather_codes", (*need(books.clone()), by_group)),
        "gather_codes, half": ("gather_codes", (*need(codebook.bfloat16()), indices)),
        "gather_codes, strided": ("gather_codes", (torch.randn(6, 5).T, by_group.mT)),
        "code_statistics": ("code_statistics", (x, indices, 5, None, 0)),
        "code_statistics, weights": ("code_statistics", (x, indices, 5, torch.rand(7), 0)),
        "code_statistics, groups": ("code_statistics", (groups, by_group, 5, None, 3)),
        "quantize": ("quantize", (x, codebook, "l2", None, "straight_through", None)),
        "quantize, gradients": (
            "quantize",
            (*need(x.clone(), codebook.clone()), "l2", None, "straight_through", None),
        ),
        "quantize, mask": (
            "quantize",
            (*need(x.clone(), codebook.clone()), "dot", mask, "none", None),
        ),
        "quantize, groups": (
            "quantize",
            (*need(groups.clone(), books.clone()), "l2", None, "straight_through", None),
        ),
        "quantize, channel first": (
            "quantize",
            (
                *need(feature_map.clone(memory_format=torch.preserve_format), codebook.clone()),
                "cosine",
                None,
                "straight_through",
                None,
            ),
        ),
        "quantize, rotation": (
            "quantize",
            (*need(x.clone(), codebook.clone()), "l2", mask, "rotation", None),
        ),
        "quantize, half": (
            "quantize",
            (*need(x.half(), codebook.clone()), "l2", None, "straight_through", None),
        ),
        "quantize_backward_x": (
            "quantize_backward_x",
            (x, one, x, codebook, indices, "straight_through"),
        ),
        "quantize_backward_x, rotation": (
            "quantize_backward_x",
            (x, one, x + 1, codebook, indices, "rotation"),
        ),
        "quantize_backward_x, commitment alone": (
            "quantize_backward_x",
            (None, one, x, codebook, indices, "none"),
        ),
        "quantize_backward_codebook": (
            "quantize_backward_codebook",
            (one, x, codebook, indices),
        ),
        "ema_update": (
            "ema_update",
            (codebook, torch.rand(5), codebook + 1, torch.rand(5), codebook, one * 0.9, 1e-5),
        ),
        "ema_update, groups": (
            "ema_update",
            (books, torch.rand(3, 5), books + 1, torch.rand(3, 5), books, one * 0.9, 1e-5),
        ),
        "qk_norm_rope": ("qk_norm_rope", (q, k, None, None, cos, sin, 1e-6, "rms", False)),
        "qk_norm_rope, gradients": (
            "qk_norm_rope",
            (*need(*(t.clone() for t in (q, k, row, row))), cos[0], sin[0], 1e-6, "layer", True),
        ),
        "qk_norm_rope, half": (
            "qk_norm_rope",
            (q.half(), k.bfloat16(), None, row, None, None, 1e-6, "none", False),
        ),
        "qk_norm_rope_backward": (
            "qk_norm_rope_backward",
            (q, k, q, k, row, None, cos, sin, 1e-6, "rms", True),
        ),
        "timestep_embedding": ("timestep_embedding", (torch.rand(5), 9, 10000.0)),
        "ada_layer_norm": ("ada_layer_norm", (tokens, shift, scale, None, None, 1e-6, "layer")),
        "ada_layer_norm, gradients": (
            "ada_layer_norm",
            (*need(*(t.clone() for t in (tokens, by_frame, scale, weight, bias))), 1e-6, "rms"),
        ),
        "ada_layer_norm, half": (
            "ada_layer_norm",
            (*need(tokens.bfloat16(), by_token.clone(), scale.half()), None, None, 1e-6, "layer"),
        ),
        "ada_layer_norm, strided": (
            "ada_layer_norm",
            (
                tokens.transpose(0, 1),
                torch.randn(6, 5, 2).mT,
                scale[:1].expand(6, 5),
                None,
                None,
                1e-6,
                "layer",
            ),
        ),
        "ada_layer_norm_backward": (
            "ada_layer_norm_backward",
            (branch, tokens, by_frame, scale, weight, bias, statistics, "layer"),
        ),
        "ada_layer_norm_backward, no weight": (
            "ada_layer_norm_backward",
            (branch, tokens, shift, by_token, None, None, statistics, "rms"),
        ),
        "gated_residual": ("gated_residual", (tokens, branch, gate)),
        "gated_residual, gradients": (
            "gated_residual",
            need(tokens.clone(), branch.bfloat16(), by_frame.clone()),
        ),
        "gated_residual_backward": ("gated_residual_backward", (tokens, branch.half(), by_token)),
        "gated_residual_ada_layer_norm": (
            "gated_residual_ada_layer_norm",
            (tokens, branch, gate, shift, scale, 1e-6, "rms"),
        ),
        "gated_residual_ada_layer_norm, gradients": (
            "gated_residual_ada_layer_norm",
            (
                *need(*(t.clone() for t in (tokens, branch, gate, by_frame, by_token))),
                1e-6,
                "layer",
            ),
        ),
        "gated_residual_ada_layer_norm_backward": (
            "gated_residual_ada_layer_norm_backward",
            (branch, tokens + 1, tokens, branch, gate, by_frame, by_token, statistics, "layer"),
        ),
        "gated_residual_ada_layer_norm_backward, one gradient": (
            "gated_residual_ada_layer_norm_backward",
            (branch, None, tokens, branch.half(), gate, shift, scale, statistics, "rms"),
        ),
        "attention": ("attention", (*heads, None, False, 0.5, *undropped)),
        "attention, causal, gradients": (
            "attention",
            (*need(*(t.clone() for t in heads)), None, True, 0.5, *undropped),
        ),
        "attention, masked, half": (
            "attention",
            (
                *need(*(t.bfloat16() for t in heads)),
                allowed.expand(2, 4, 3, 6),
                False,
                0.5,
                *undropped,
            ),
        ),
        "attention, packed": (
            "attention",
            (*packed_heads, torch.randn(6, 6).expand(2, 3, 6, 6), False, 0.5, *undropped),
        ),
        "attention, dropout, gradients": (
            "attention",
            (*need(*(t.clone() for t in heads)), None, True, 0.5, *dropped),
        ),
        "attention_qkvpacked, gradients": (
            "attention_qkvpacked",
            (*need(packed), None, True, 0.5, *undropped),
        ),
        "attention_qkvpacked, masked": (
            "attention_qkvpacked",
            (*need(packed.bfloat16()), square.expand(2, 3, 6, 6), False, 0.5, *undropped),
        ),
        "attention_qkvpacked_backward": (
            "attention_qkvpacked_backward",
            (
                packed_grad,
                packed_grad[:, :, None].repeat(1, 1, 3, 1, 1),
                packed_grad,
                lse6,
                None,
                False,
                0.5,
                *undropped,
            ),
        ),
        "attention_backward, dropout": (
            "attention_backward",
            (heads[0] + 1, *heads[:2], heads[1] - 1, heads[0], lse, None, True, 0.5, *dropped),
        ),
        "attention_backward": (
            "attention_backward",
            (heads[0] + 1, *heads[:2], heads[1] - 1, heads[0], lse, None, True, 0.5, *undropped),
        ),
        "attention_backward, packed": (
            "attention_backward",
            (
                packed_heads[0] + 1,
                *packed_heads,
                packed_heads[0],
                lse6,
                None,
                False,
                0.5,
                *undropped,
            ),
        ),
        "attention_varlen": (
            "attention_varlen",
            (
                *need(rows.clone(), of_keys.clone(), of_keys[..., :5].clone()),
                *varying,
                False,
                0.5,
                *undropped,
            ),
        ),
        "attention_varlen, dropout": (
            "attention_varlen",
            (*need(rows.clone(), of_keys.clone(), of_keys.clone()), *varying, False, 0.5, *dropped),
        ),
        "attention_varlen, packed, half": (
            "attention_varlen",
            (
                *torch.randn(7, 3, 4, 8).half().unbind(1),
                starts[0],
                starts[0],
                4,
                4,
                True,
                0.5,
                *undropped,
            ),
        ),
        "attention_varlen_backward": (
            "attention_varlen_backward",
            (rows + 1, rows, of_keys, of_keys - 1, rows, row_lse, *varying, True, 0.5, *undropped),
        ),
        "normal_noise": ("normal_noise", ((2, 3, 5), key, ids, torch.bfloat16)),
        "normal_noise, numbered": ("normal_noise", ((2, 3, 5), key, None, torch.float32)),
        "diffuse": ("diffuse", (data, level, level, None, key, ids, "v")),
        "diffuse, given noise": (
            "diffuse",
            (*need(data.clone(), level.clone(), level.clone(), data.clone()), None, None, "v"),
        ),
        "diffuse, gradients": (
            "diffuse",
            (*need(data.clone(), tokens_level.clone()), tokens_level, None, key, None, "flow"),
        ),
        "diffuse_backward": (
            "diffuse_backward",
            (data, data, data, level, level, None, key, ids, "v"),
        ),
        "diffusion_loss": (
            "diffusion_loss",
            (
                *need(data.clone(), data.clone()),
                level,
                level,
                None,
                key,
                ids,
                level,
                None,
                "v",
                "mse",
            ),
        ),
        "diffusion_loss, tokens": (
            "diffusion_loss",
            (
                *need(data.bfloat16()),
                data,
                tokens_level,
                tokens_level,
                data,
                None,
                None,
                None,
                tokens_level,
                "sample",
                "huber",
            ),
        ),
        "diffusion_loss_backward": (
            "diffusion_loss_backward",
            (
                level,
                data,
                data,
                level,
                level,
                None,
                key,
                ids,
                None,
                level,
                "v",
                "pseudo_huber",
                True,
            ),
        ),
        "denoise_step": (
            "denoise_step",
            (
                data,
                data,
                rows22,
                torch.tensor(1),
                None,
                [],
                None,
                None,
                None,
                None,
                "none",
                0.995,
                "learned_range",
                False,
                False,
            ),
        ),
        "denoise_step, everything": (
            "denoise_step",
            (
                data,
                data.bfloat16(),
                rows22,
                torch.tensor([0, 2]),
                data.bfloat16(),
                [data, data],
                data.bfloat16(),
                None,
                key,
                ids,
                "dynamic",
                0.9,
                "learned_range",
                True,
                True,
            ),
        ),
        "denoise_step, tokens": (
            "denoise_step",
            (
                data,
                data,
                rows22,
                torch.randint(0, 3, (2, 3)),
                None,
                [],
                None,
                data,
                None,
                None,
                "clip",
                0.9,
                "learned_range",
                True,
                False,
            ),
        ),
        "bias_gelu": ("bias_gelu", (tokens, None, "tanh")),
        "bias_gelu, gradients": ("bias_gelu", (*need(tokens.clone(), bias.clone()), "none")),
        "bias_gelu, half": ("bias_gelu", (*need(tokens.mT.half(), torch.randn(6)), "tanh")),
        "bias_gelu_backward": ("bias_gelu_backward", (branch, tokens, bias, "tanh")),
        "bias_gelu_backward, no bias": ("bias_gelu_backward", (branch, tokens, None, "none")),
    }


SAMPLES = samples()
WITHOUT_CPU = tuple(op for op, kernels in KERNELS.items() if "cpu" not in kernels)


def test_every_op_has_a_sample() -> None:
    """Ops are listed by what is registered, so that a new one cannot be forgotten here."""
    registered = {
        name.removeprefix("vqkernels::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vqkernels::")
    }
    public = tuple(vqkernels.ops.__all__)
    assert {op for op, _ in SAMPLES.values()} == {op for op in registered if op.startswith(public)}


@pytest.mark.parametrize("case", SAMPLES)
def test_opcheck(backend: str, case: str) -> None:
    op, arguments = SAMPLES[case]
    if backend == "cpu" and op.startswith(WITHOUT_CPU):
        pytest.skip("no kernel for the CPU")
    torch.library.opcheck(getattr(torch.ops.vqkernels, op).default, (*arguments, backend))


def test_opcheck_with_a_packed_book(backend: str) -> None:
    x, codebook = torch.randn(7, 6), torch.randn(5, 6)
    packed = vqkernels.pack_codebook(codebook)
    ops = torch.ops.vqkernels
    torch.library.opcheck(ops.nearest_code.default, (x, codebook, "l2", "exact", packed, backend))
    quantizing = (*need(x, codebook), "l2", None, "straight_through", packed, backend)
    torch.library.opcheck(ops.quantize.default, quantizing)


def assert_same_kind(fake: Any, real: Any) -> None:
    for mine, true in zip(fake, real, strict=True):
        assert mine.dtype == true.dtype
        assert mine.shape == true.shape
        assert true.numel() == 0 or mine.stride() == true.stride()
        assert mine.device == true.device


@pytest.mark.parametrize(("x_dtype", "book_dtype"), DTYPES)
@pytest.mark.parametrize("leading", [(9,), (0,), (2, 9), (2, 3, 9)])
def test_fake_results_are_like_real_ones(
    backend: str, leading: tuple[int, ...], x_dtype: torch.dtype, book_dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    dense = torch.randn(*leading, 8).to(x_dtype)
    for x in (dense, torch.randn(8, *leading).to(x_dtype).movedim(0, -1), dense[..., ::2]):
        codebook = torch.randn(5, x.shape[-1]).to(book_dtype)
        indices = vqkernels.nearest_code(x, codebook)

        def results(x: Tensor, codebook: Tensor, indices: Tensor) -> list[Tensor]:
            return [
                vqkernels.nearest_code(x, codebook),
                vqkernels.pack_codebook(codebook),
                vqkernels.gather_codes(codebook, indices),
                *vqkernels.code_statistics(x, indices, 5),
                *vqkernels.quantize(x, codebook),
            ]

        mode = FakeTensorMode()
        faked = [mode.from_tensor(t) for t in (x, codebook, indices)]
        with mode:
            pretended = results(*faked)
        assert_same_kind(pretended, results(x, codebook, indices))


@pytest.mark.parametrize(("stream", "other"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 8), (0, 6, 8), (2, 0, 8)])
def test_fake_modulation_is_like_real(
    backend: str, shape: tuple[int, int, int], stream: torch.dtype, other: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, _, dim = shape
    branch = torch.randn(shape).to(other)
    gate, shift, scale = torch.randn(batch, 6 * dim).to(other).chunk(6, dim=1)[:3]

    def results(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
        tensors = [x, branch, gate, shift, scale]
        leaves = [t.detach().requires_grad_() for t in tensors]
        x, branch, gate, shift, scale = leaves
        normed = vqkernels.ada_layer_norm(x, shift=shift, scale=scale, weight=gate.sum(0))
        fused = vqkernels.gated_residual_ada_layer_norm(
            x, branch, gate=gate, shift=shift, scale=scale
        )
        out = vqkernels.gated_residual(
            normed, vqkernels.bias_gelu(fused[0], scale.sum(0)), gate=gate
        )
        return [*fused, normed, out, *torch.autograd.grad((out, *fused), leaves, [out, *fused])]

    for x in (torch.randn(shape).to(stream), torch.randn(*shape[:2], 16).to(stream)[..., ::2]):
        mode = FakeTensorMode()
        tensors = (x, branch, gate, shift, scale)
        faked = [mode.from_tensor(t) for t in tensors]
        with mode:
            pretended = results(*faked)
        assert_same_kind(pretended, results(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_dtypes_alone(backend: str, dtype: torch.dtype) -> None:
    x, codebook = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    plain = vqkernels.quantize(x, codebook)
    plain_grads = torch.autograd.grad(
        plain.commitment_loss + plain.codebook_loss + plain.quantized.sum(), (x, codebook)
    )
    with torch.autocast("cpu", dtype=dtype):
        output = vqkernels.quantize(x, codebook)
        assert torch.equal(vqkernels.nearest_code(x, codebook), plain.indices)
        rows = vqkernels.gather_codes(codebook, plain.indices)
        counts, sums = vqkernels.code_statistics(x.detach(), plain.indices, 5)
        embedding = vqkernels.timestep_embedding(torch.rand(3), 8)
    for tensor in (output.quantized, output.commitment_loss, rows, counts, sums, embedding):
        assert tensor.dtype == torch.float32
    grads = torch.autograd.grad(
        output.commitment_loss + output.codebook_loss + output.quantized.sum(), (x, codebook)
    )
    for mine, expected in zip(grads, plain_grads, strict=True):
        assert torch.equal(mine, expected)
    half = x.detach().to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert vqkernels.quantize(half, codebook.detach()).quantized.dtype == dtype
