"""VectorQuantize: what it promises, whatever other packages are installed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from _helpers.layers import CODES, DIM, input_for
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.nn.vector_quantize import LossBreakdown, VectorQuantize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_a_float32_book(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, rotation_trick=False)
    x = torch.randn(2, 30, DIM).to(dtype).requires_grad_()
    before = layer.codebook.clone()
    quantized, indices, loss = layer(x)
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    assert torch.equal(quantized, before[indices].to(dtype))
    assert torch.equal(indices, torch.cdist(x.double(), before.double()).argmin(-1))
    (quantized.sum() + loss).backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_converted_module() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer = VectorQuantize(DIM, CODES).to(dtype)
        quantized, _, loss = layer(torch.randn(2, 30, DIM, dtype=dtype, requires_grad=True))
        loss.backward()
        assert quantized.dtype == dtype
        assert layer.codebook.dtype == dtype


@pytest.mark.parametrize("heads", [1, 2])
def test_indices_give_the_output_back(heads: int) -> None:
    for configuration in (
        {"accept_image_fmap": True},
        {"channel_last": False, "separate_codebook_per_head": True},
        {"codebook_dim": 3},
    ):
        torch.manual_seed(0)
        layer = VectorQuantize(DIM, CODES, heads=heads, **{"codebook_dim": 6, **configuration})
        layer.eval()
        x = input_for(configuration, 0)
        quantized, indices, _ = layer(x)
        torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    missing = layer.get_codes_from_indices(torch.full_like(indices, -1))
    assert (missing == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "cropped"])
def test_images_are_read_as_views(layout: str) -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, accept_image_fmap=True, rotation_trick=False).eval()
    x = torch.randn(2, DIM, 9, 7)
    x = x.to(memory_format=torch.channels_last) if layout == "channels last" else x
    x = x[:, :, 1:8, 2:6] if layout == "cropped" else x
    seen: list[Tensor] = []
    layer._codebook.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    quantized, indices, _ = layer(x)
    assert seen[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert indices.shape == (2, *x.shape[2:])
    assert torch.equal(quantized, layer.codebook[indices].permute(0, 3, 1, 2))


def test_single_vectors() -> None:
    layer = VectorQuantize(DIM, CODES, heads=2, codebook_dim=6)
    quantized, indices, _ = layer(torch.randn(5, DIM), mask=torch.tensor([1, 1, 0, 1, 1]).bool())
    assert quantized.shape == (5, DIM)
    assert indices.shape == (5, 2)
    assert (indices[2] == -1).all()
    assert (quantized[2] == 0).all()


ROTATION_AND_OTHERS: dict[str, dict[str, Any]] = {
    "rotation": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "own books": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
}


@pytest.mark.parametrize("name", list(ROTATION_AND_OTHERS))
def test_rows_that_are_not_numbers_leave_no_trace(name: str) -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=2, **ROTATION_AND_OTHERS[name])
    x = torch.randn(2, 20, DIM)
    x[0, 3, 0] = torch.nan
    x[1, 5] = torch.inf
    quantized, indices, loss = layer(x)
    assert indices[0, 3].flatten()[0] == -1
    assert (indices[1, 5] == -1).all()
    assert quantized[0, 3].isnan().any()
    assert loss.isfinite()
    assert all(b.isfinite().all() for b in layer.state_dict().values())


def test_everything_masked() -> None:
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=2)
    before = layer.codebook.clone()
    mask = torch.zeros(2, 20, dtype=torch.bool)
    quantized, indices, loss = layer(torch.randn(2, 20, DIM), mask=mask)
    assert (indices == -1).all()
    assert (quantized == 0).all()
    assert loss == 0
    assert layer.codebook.isfinite().all()
    assert not torch.equal(layer.codebook, before)  # averages decay, ratios move by smoothing


def test_empty_batch() -> None:
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=2)
    quantized, indices, loss = layer(torch.randn(0, 20, DIM))
    assert quantized.shape == (0, 20, DIM)
    assert indices.shape == (0, 20)
    assert loss == 0


def test_dead_codes_move_onto_distinct_rows_of_the_batch() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=1e9, accept_image_fmap=True)
    x = torch.randn(2, DIM, 6, 5)
    layer(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, DIM)
    places = (layer.codebook[:, None] == rows).all(-1)
    assert (places.sum(1) == 1).all()
    assert places.any(0).sum() == CODES
    codebook = layer._codebook
    assert (codebook.cluster_size == 1e9).all()
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * 1e9)


def test_more_dead_codes_than_rows() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=1e9)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 2:9] = True
    x = torch.randn(1, 10, DIM)
    layer(x, mask=mask)
    places = (layer.codebook[:, None] == x[0]).all(-1)
    assert places.any(0).tolist() == mask[0].tolist()
    assert places.any(1).sum() == 7


def test_codes_in_use_stay() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=2.0, decay=0.5)
    x = layer.codebook[:4].repeat_interleave(5, dim=0)[None]
    before = layer.codebook.clone()
    layer(x)
    torch.testing.assert_close(layer.codebook[:4], before[:4], rtol=1e-3, atol=1e-4)
    places = (layer.codebook[4:, None] == x[0]).all(-1).any(1)
    assert places.all()


def test_revival_with_own_books_stays_within_the_head() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(
        4, 3, heads=2, codebook_dim=2, separate_codebook_per_head=True, threshold_ema_dead_code=1e9
    )
    x = torch.randn(2, 9, 4)
    layer(x)
    for head in range(2):
        rows = x[..., 2 * head : 2 * head + 2].reshape(-1, 2)
        assert (layer.codebook[head][:, None] == rows).all(-1).any(1).all()


def test_kmeans_start_is_deterministic_and_happens_once() -> None:
    books = []
    for _ in range(2):
        torch.manual_seed(3)
        layer = VectorQuantize(DIM, CODES, kmeans_init=True, freeze_codebook=True)
        assert (layer.codebook == 0).all()
        layer(torch.randn(2, 50, DIM))
        books.append(layer.codebook.clone())
        assert layer._codebook.initted
        layer(torch.randn(2, 50, DIM))
        assert torch.equal(layer.codebook, books[-1])
    assert torch.equal(*books)


def test_kmeans_start_finds_clusters_and_ignores_masked_rows() -> None:
    torch.manual_seed(0)
    centers = 10 * torch.randn(3, DIM)
    x = centers.repeat(40, 1)[None] + 0.01 * torch.randn(1, 120, DIM)
    mask = torch.ones(1, 120, dtype=torch.bool)
    x[0, :60] = 1e6
    mask[0, :60] = False
    x[0, 60] = torch.nan
    layer = VectorQuantize(DIM, 8, kmeans_init=True)
    with torch.no_grad():
        layer(x, mask=mask)
    used = layer._codebook.cluster_size[0] > 1
    nearest = torch.cdist(layer.codebook[used], centers).amin(1)
    assert (nearest < 0.1).all()
    with pytest.raises(ValueError, match="at least one finite"):
        VectorQuantize(DIM, 8, kmeans_init=True)(x, mask=torch.zeros_like(mask))


def test_kmeans_start_is_not_repeated_after_loading() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, kmeans_init=True)
    layer(torch.randn(2, 50, DIM))
    loaded = VectorQuantize(DIM, CODES, kmeans_init=True, freeze_codebook=True)
    loaded.load_state_dict(layer.state_dict())
    loaded(torch.randn(2, 50, DIM))
    assert torch.equal(loaded.codebook, layer.codebook)


def test_a_frozen_book_is_packed_in_eval_and_unpacked_by_every_change() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, CODES, freeze_codebook=True)
    other = VectorQuantize(DIM, CODES)
    x = torch.randn(2, 30, DIM)

    def packed() -> bool:
        return layer._codebook._packed is not None

    assert not packed()
    assert not (other.eval()._codebook._packed is not None)
    expected = layer(x)[1]
    layer.eval()
    assert packed()
    assert torch.equal(layer(x)[1], expected)
    assert not copy.deepcopy(layer)._codebook._packed
    assert pickle.loads(pickle.dumps(layer))._codebook._packed is None

    changes = [
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: setattr(layer, "codebook", torch.randn(CODES, DIM)),
        lambda: layer.float(),
        lambda: layer.train(),
    ]
    for change in changes:
        layer.eval()
        assert packed()
        change()
        assert not packed()
        assert torch.equal(layer(x)[1], torch.cdist(x, layer.codebook).argmin(-1))


def test_usage_and_perplexity() -> None:
    layer = VectorQuantize(DIM, 4, freeze_codebook=False)
    layer.codebook = 10 * torch.eye(4, DIM)
    assert layer.usage == 0
    x = layer.codebook[torch.tensor([[0, 0, 1, 1]])].clone()
    layer(x)
    assert layer.usage == 0.5
    torch.testing.assert_close(layer.perplexity, torch.tensor(2.0))
    layer.eval()(x)
    layer.reset_usage()
    assert layer.usage == 0
    per_head = VectorQuantize(4, 8, heads=2, codebook_dim=2, separate_codebook_per_head=True)
    per_head(torch.randn(3, 20, 4))
    assert per_head.usage.shape == per_head.perplexity.shape == (2,)
    assert "code_counts" not in str(list(per_head.state_dict()))


def test_loss_breakdown() -> None:
    layer = VectorQuantize(DIM, CODES, commitment_weight=0.25)
    x = torch.randn(2, 30, DIM)
    quantized, _, loss, parts = layer(x, return_loss_breakdown=True)
    assert isinstance(parts, LossBreakdown)
    torch.testing.assert_close(parts.commitment, F.mse_loss(quantized, x))
    torch.testing.assert_close(loss, 0.25 * parts.commitment)
    assert parts.codebook_diversity == parts.orthogonal_reg == parts.inplace_optimize == 0


UNSUPPORTED = {
    "commitment_use_cross_entropy_loss": True,
    "orthogonal_reg_weight": 0.1,
    "codebook_diversity_loss_weight": 0.1,
    "stochastic_sample_codes": True,
    "straight_through": True,
    "directional_reparam": True,
    "sync_codebook": True,
    "vq_bridge": nn.Identity(),
    "manual_ema_update": True,
    "in_place_codebook_optimizer": torch.optim.SGD,
    "affine_param": True,
    "sync_update_v": 0.5,
}


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_unsupported_constructor_arguments_raise(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        VectorQuantize(DIM, CODES, **{name: UNSUPPORTED[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("indices", torch.zeros(2, 30, dtype=torch.int64)),
        ("topk", 2),
        ("sample_codebook_temp", 0.5),
        ("codebook_transform_fn", lambda codes: codes),
        ("ema_update_weight", torch.ones(1, CODES)),
        ("accum_ema_update", True),
    ],
)
def test_unsupported_forward_arguments_raise(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        VectorQuantize(DIM, CODES)(torch.randn(2, 30, DIM), **{name: value})


def test_bad_input_is_named() -> None:
    layer, x = VectorQuantize(DIM, CODES), torch.randn(2, 30, DIM)
    cases = [
        (lambda: layer(torch.randn(2, 30, DIM + 1)), "D"),
        (lambda: layer(x, mask=torch.ones(2, 29).bool()), "mask must be bool"),
        (lambda: layer(x, mask=torch.ones(2, 30)), "mask must be bool"),
        (lambda: layer(x, mask=torch.ones(2, 30).bool(), lens=torch.tensor([1, 2])), "exclude"),
        (lambda: VectorQuantize(0, CODES), "dim must be"),
        (lambda: VectorQuantize(DIM, 0), "codebook_size must be"),
        (lambda: VectorQuantize(DIM, CODES, heads=0), "heads must be"),
        (lambda: VectorQuantize(DIM, CODES, learnable_codebook=True), "ema_update=False"),
        (
            lambda: VectorQuantize(
                DIM, CODES, learnable_codebook=True, ema_update=False, use_cosine_sim=True
            ),
            "learnable_codebook=False",
        ),
        (
            lambda: VectorQuantize(DIM, CODES, accept_image_fmap=True, accept_3d_fmap=True),
            "exclude each other",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_compiled_kmeans_start() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = VectorQuantize(DIM, 8, kmeans_init=True, freeze_codebook=True)
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = input_for({}, step)
        torch.manual_seed(step)
        expected = eager(x)
        torch.manual_seed(step)
        for a, b in zip(fast(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(compiled.codebook, eager.codebook)


COMPILED = {
    "EMA": {"threshold_ema_dead_code": 1},
    "cosine, masked": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "image, own books": {
        "accept_image_fmap": True, "heads": 2, "codebook_dim": 6,
        "separate_codebook_per_head": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMPILED))
def test_compiled_training_equals_eager_with_a_changing_decay(name: str) -> None:
    configuration = COMPILED[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.ModuleDict(
        {"in": nn.Linear(DIM, DIM), "vq": VectorQuantize(DIM, 8, **configuration)}
    )
    compiled = copy.deepcopy(eager)
    frames = torch._dynamo.utils.counters

    def forward(model: nn.ModuleDict, x: Tensor, mask: Tensor | None) -> Tensor:
        h = model["in"](x)
        h = h.mT.reshape(2, DIM, 6, 5) if configuration.get("accept_image_fmap") else h
        quantized, _, loss = model["vq"](h, mask=mask)
        return quantized.square().mean() + loss

    fast = torch.compile(forward, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, compiled)]
    frames.clear()
    for step in range(10):
        x = torch.randn(2, 30, DIM, generator=torch.Generator().manual_seed(step))
        mask = torch.rand(2, 30) > 0.3 if "masked" in name else None
        for model, function, optimizer in zip(
            (eager, compiled), (forward, fast), optimizers, strict=True
        ):
            model["vq"]._codebook.decay = 0.5 + 0.04 * step
            torch.manual_seed(step)
            optimizer.zero_grad()
            function(model, x, mask).backward()
            optimizer.step()
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(compiled.state_dict()[key], value, msg=f"{key}, step {step}")
    assert frames["stats"]["unique_graphs"] == 1
