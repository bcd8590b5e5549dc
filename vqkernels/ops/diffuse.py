"""Forward noising and the training target that goes with it, in one step.

    x_t = alpha * x0 + sigma * noise

| target    | value                      | what the model learns to predict              |
|-----------|----------------------------|-----------------------------------------------|
| "epsilon" | noise                      | the noise, arXiv:2006.11239                   |
| "sample"  | x0                         | the data                                      |
| "v"       | alpha * noise - sigma * x0 | v-prediction, arXiv:2202.00512                |
| "flow"    | noise - x0                 | rectified flow's velocity, d x_t / d t where  |
|           |                            | alpha = 1 - t and sigma = t, arXiv:2209.03003 |
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_floating, check_same_device
from vqkernels.ops.normal_noise import normal_noise
from vqkernels.reference import diffuse as reference

TARGETS = ("epsilon", "sample", "v", "flow")


def diffuse(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    target: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """`(x_t, target)` for a batch of samples, each at its own noise level.

    Args:
        x0: data `[B, ...]`, floating point.
        alpha, sigma: `[B]`, the weights of data and noise.
        noise: x0's shape; give this or `seed`.
        seed: draws the noise as `normal_noise(x0.shape, seed=seed, sample_ids=sample_ids)`.
        sample_ids: int64 `[B]`, goes with `seed`.
        target: "epsilon", "sample", "v" or "flow".

    Returns:
        Two tensors of x0's shape and dtype, computed in fp32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `target` that does not fit; neither or both of `noise` and
            `seed`.
    """
    check_floating("x0", x0)
    if x0.dim() == 0:
        raise ValueError("x0 must be [B, ...], got a scalar")
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        check_floating(name, level)
        check_same_device(name, level, "x0", x0)
        if level.shape != x0.shape[:1]:
            raise ValueError(f"{name} must be [{x0.shape[0]}], got shape {list(level.shape)}")
    check_choice("target", target, TARGETS)
    if (noise is None) == (seed is None):
        raise ValueError(f"give noise or seed, got {'neither' if noise is None else 'both'}")
    if noise is None:
        assert seed is not None
        noise = normal_noise(x0.shape, seed=seed, sample_ids=sample_ids, device=x0.device)
    elif sample_ids is not None:
        raise ValueError("sample_ids goes with seed, got noise")
    check_floating("noise", noise)
    check_same_device("noise", noise, "x0", x0)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have x0's shape {list(x0.shape)}, got {list(noise.shape)}")
    select("diffuse", x0, noise)
    return reference.diffuse(x0, alpha, sigma, noise=noise, target=target)
