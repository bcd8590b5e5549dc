"""Our schedulers in diffusers' pipelines, built offline with random weights: the same pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from _peers import generator
from torch import Tensor

from vqkernels import schedulers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def transformer_and_vae() -> tuple[Any, Any]:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return transformer.eval(), vae.eval()


def pictures(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # DiTPipeline hands no generator to its steps
    result = pipe(num_inference_steps=8, generator=generator(), output_type="np", **arguments)
    return torch.from_numpy(result.images)


def assert_same_pictures(pipe: Any, name: str, **arguments: Any) -> None:
    before = pictures(pipe, **arguments)
    ours = getattr(schedulers, name)
    pipe.scheduler = ours.from_config(pipe.scheduler.config)
    assert type(pipe.scheduler) is ours
    assert (pictures(pipe, **arguments) - before).abs().max() < 1e-4
    pipe.scheduler = ours.from_config(pipe.scheduler.config, numerics="diffusers")
    assert torch.equal(pictures(pipe, **arguments), before)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline(unet: Any, eta: float) -> None:
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    assert_same_pictures(pipe, "DDIMScheduler", batch_size=2, eta=eta)


def test_ddpm_pipeline(unet: Any) -> None:
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    assert_same_pictures(pipe, "DDPMScheduler", batch_size=2)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_dit_pipeline(transformer_and_vae: tuple[Any, Any], name: str) -> None:
    arguments = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    scheduler = getattr(diffusers, name)(**arguments)
    pipe = diffusers.DiTPipeline(*transformer_and_vae, scheduler)
    assert_same_pictures(pipe, name, class_labels=[207, 360])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_dit_pipeline_on_levels(
    transformer_and_vae: tuple[Any, Any], name: str, spacing: str
) -> None:
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing)
    pipe = diffusers.DiTPipeline(*transformer_and_vae, scheduler)
    assert_same_pictures(pipe, name, class_labels=[207, 360])


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("order", [2, 3])
def test_dit_pipeline_multistep(
    transformer_and_vae: tuple[Any, Any], name: str, order: int
) -> None:
    scheduler = getattr(diffusers, name)(solver_order=order)
    pipe = diffusers.DiTPipeline(*transformer_and_vae, scheduler)
    assert_same_pictures(pipe, name, class_labels=[207, 360])


def test_a_pipeline_built_with_ours(transformer_and_vae: tuple[Any, Any]) -> None:
    expected = pictures(
        diffusers.DiTPipeline(*transformer_and_vae, diffusers.DDIMScheduler()), class_labels=[1]
    )
    found = pictures(
        diffusers.DiTPipeline(*transformer_and_vae, schedulers.DDIMScheduler()), class_labels=[1]
    )
    assert (found - expected).abs().max() < 1e-4
