"""VectorQuantize against vector-quantize-pytorch, where that is installed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from _helpers.layers import CODES, DIM, input_for
from torch import Tensor, nn

from vqkernels.nn.vector_quantize import VectorQuantize

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "k-means": {"kmeans_init": True, "kmeans_iters": 4},
    "k-means cosine": {"kmeans_init": True, "use_cosine_sim": True},
    "projected": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "heads, one book": {"heads": 3, "codebook_dim": 4},
    "heads, own books": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "heads, own books, cosine": {
        "heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True, "use_cosine_sim": True,
    },
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, no routing": {
        "learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False,
    },
    "no routing": {"route_gradients_to_input": False},
    "slow, weighted": {"decay": 0.99, "commitment_weight": 0.25, "eps": 1e-3},
    "no commitment": {"commitment_weight": 0.0},
    "frozen": {"freeze_codebook": True},
    "channel first": {"channel_last": False},
    "image": {"accept_image_fmap": True},
    "image, heads": {
        "accept_image_fmap": True, "heads": 2, "codebook_dim": 6,
        "separate_codebook_per_head": True,
    },
    "video": {"accept_3d_fmap": True},
}  # fmt: skip


def pair(configuration: dict[str, Any]) -> tuple[VectorQuantize, nn.Module]:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(1)
    ours = VectorQuantize(DIM, CODES, **configuration)
    torch.manual_seed(1)
    return ours, package.VectorQuantize(DIM, CODES, **configuration)


def run(layer: nn.Module, x: Tensor, seed: int, **arguments: Any) -> list[Tensor]:
    """quantized, indices, loss, and the gradients of x and of every parameter."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    quantized, indices, loss = layer(x, **arguments)
    upstream = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(seed))
    ((quantized * upstream).sum() + 3 * loss).backward()
    zero = torch.zeros(())
    gradients = [zero if p.grad is None else p.grad for p in layer.parameters()]
    return [quantized, indices, loss, zero if x.grad is None else x.grad, *gradients]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_signatures_are_the_packages() -> None:
    package = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(VectorQuantize, method)).parameters
        theirs = inspect.signature(getattr(package, method)).parameters
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_training_equals_the_package_step_for_step(configuration: dict[str, Any]) -> None:
    ours, theirs = pair(configuration)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for step in range(5):
        x = input_for(configuration, step)
        assert_all_close(run(ours, x, step), run(theirs, x, step))
        state = theirs.state_dict()
        assert_all_close(list(ours.state_dict().values()), list(state.values()))
    ours.eval(), theirs.eval()
    x = input_for(configuration, 9)
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("by", ["mask", "lens"])
@pytest.mark.parametrize("name", ["straight through", "cosine", "heads, one book"])
def test_masked_training_equals_the_package(name: str, by: str, zeros: bool) -> None:
    configuration = CONFIGURATIONS[name] | {"return_zeros_for_masked_padding": zeros}
    if "heads" in configuration:  # the package's masked loss does not work with several heads
        configuration |= {"commitment_weight": 0.0}
    ours, theirs = pair(configuration)
    lens = torch.tensor([40, 13, 1])
    arguments = {"lens": lens} if by == "lens" else {"mask": torch.arange(40) < lens[:, None]}
    for step in range(3):
        x = input_for(configuration, step)
        assert_all_close(run(ours, x, step, **arguments), run(theirs, x, step, **arguments))
        state = theirs.state_dict()
        assert_all_close(list(ours.state_dict().values()), list(state.values()))


@pytest.mark.parametrize("name", ["defaults", "heads, own books", "learnable", "k-means"])
def test_checkpoints_load_both_ways(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    ours, theirs = pair(configuration)
    for step in range(2):
        run(ours, input_for(configuration, step), step)
        run(theirs, input_for(configuration, step + 5), step)
    new_ours, new_theirs = pair(configuration)
    new_ours.load_state_dict(theirs.state_dict())
    new_theirs.load_state_dict(ours.state_dict())
    x = input_for(configuration, 8)
    assert_all_close(run(new_ours, x, 1), run(theirs, x, 1))
    assert_all_close(run(new_theirs, x, 1), run(ours, x, 1))
