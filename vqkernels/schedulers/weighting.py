"""What a training loss weighs at each noise level, and which levels training visits.

A loss w |x0 - x0'|^2 in the data can be written in whatever a model predicts. With x_t = alpha x0 +
sigma z known, an error d of the data is one of

| target    | error                          | so the same loss weighs it by             |
|-----------|--------------------------------|-------------------------------------------|
| "sample"  | d                              | w                                         |
| "epsilon" | -(alpha / sigma) d             | w / SNR, SNR = alpha^2 / sigma^2          |
| "v"       | -(alpha^2 + sigma^2) / sigma d | w sigma^2 / (alpha^2 + sigma^2)^2         |
| "flow"    | -(alpha + sigma) / sigma d     | w sigma^2 / (alpha + sigma)^2             |

Every function takes levels of any one shape (per sample `[B]`, per token `[B, N]`, ...), computes
in float64 and returns float32 weights of that shape: `weight` of `vqkernels.diffusion_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_floating
from vqkernels.ops.diffuse import TARGETS
from vqkernels.ops.normal_noise import normal_noise

SD3_SCHEMES = ("none", "sigma_sqrt", "cosmap")
DENSITIES = ("uniform", "logit_normal", "mode")
TIME_STREAM = 2  # of keyed noise; 0 is training noise, 1 the noise of samplers


def min_snr_weight(
    alpha: Tensor, sigma: Tensor, *, target: str = "epsilon", gamma: float = 5.0
) -> Tensor:
    """Min-SNR-gamma: min(SNR, gamma) on the data's error.

    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4.

    Args:
        alpha, sigma: weights of data and noise in x_t, one shape, floating point.
        target: what the model predicts, as in `vqkernels.diffuse`.
        gamma: the largest weight of a data error.

    Returns:
        float32 weights of alpha's shape; finite at a zero SNR and without noise as well.

    Raises:
        TypeError: levels that are not floating-point tensors.
        ValueError: levels of two shapes, an unknown `target`, a `gamma` that is not positive.
    """
    _check_positive("gamma", gamma)
    snr = _snr(alpha, sigma)
    return _in_target(snr.clamp(max=gamma), (gamma / snr).clamp(max=1), alpha, sigma, target)


def soft_min_snr_weight(
    alpha: Tensor, sigma: Tensor, *, target: str = "epsilon", gamma: float = 4.0
) -> Tensor:
    """Soft min-SNR: 1 / (1 / SNR + 1 / gamma) on the data's error, a smooth min(SNR, gamma).

    Source: Crowson et al. 2024, arXiv:2401.11605, section 4.4. Arguments, result and errors as in
    `min_snr_weight`; the default is the paper's.
    """
    _check_positive("gamma", gamma)
    snr = _snr(alpha, sigma)
    return _in_target(gamma / (1 + gamma / snr), gamma / (gamma + snr), alpha, sigma, target)


def p2_weight(
    alpha: Tensor, sigma: Tensor, *, target: str = "epsilon", gamma: float = 1.0, k: float = 1.0
) -> Tensor:
    """P2: (k + SNR)^-gamma on the noise's error.

    Source: Choi et al. 2022, arXiv:2204.00227, equation 8. Arguments, result and errors as in
    `min_snr_weight`; `gamma` 0 is the plain loss on the noise.
    """
    _check_positive("k", k)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number of at least 0, got {gamma}")
    snr = _snr(alpha, sigma)
    shifted = k + snr
    # SNR (k + SNR)^-gamma without an inf * 0 where there is no noise.
    data = shifted ** (1 - gamma) / (1 + k / snr)
    return _in_target(data, shifted**-gamma, alpha, sigma, target)


def edm_weight(
    alpha: Tensor, sigma: Tensor, *, target: str = "sample", sigma_data: float = 0.5
) -> Tensor:
    """EDM: (s^2 + sigma_data^2) / (s sigma_data)^2 on the data's error, s = sigma / alpha.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1. Arguments, result and errors as in
    `min_snr_weight`. EDM's own levels are alpha = 1; the weight is infinite where a sample has no
    noise (every target but "epsilon") and at a zero SNR for "epsilon".
    """
    _check_positive("sigma_data", sigma_data)
    snr = _snr(alpha, sigma)
    floor = sigma_data**-2
    return _in_target(snr + floor, 1 + floor / snr, alpha, sigma, target)


def sd3_weight(sigma: Tensor, *, scheme: str = "cosmap") -> Tensor:
    """Weights of a rectified flow's loss on "flow", alpha = 1 - sigma.

    "sigma_sqrt" is sigma^-2, "cosmap" 2 / (pi (1 - 2 sigma + 2 sigma^2)), "none" 1.
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1; `compute_loss_weighting_for_sd3` of
    diffusers has the same names.

    Args:
        sigma: levels in [0, 1] of any shape, floating point.
        scheme: "none", "sigma_sqrt" or "cosmap".

    Returns:
        float32 weights of sigma's shape; "sigma_sqrt" is infinite at 0.

    Raises:
        TypeError: levels that are not a floating-point tensor.
        ValueError: an unknown `scheme`.
    """
    check_floating("sigma", sigma)
    check_choice("scheme", scheme, SD3_SCHEMES)
    s = sigma.double()
    if scheme == "sigma_sqrt":
        return (s**-2).float()
    if scheme == "cosmap":
        return (2 / (math.pi * (1 - 2 * s + 2 * s * s))).float()
    return torch.ones_like(s, dtype=torch.float32)


def sample_times(
    batch_size: int,
    *,
    density: str = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = TIME_STREAM,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times in [0, 1] for a batch of a rectified flow's training, 1 being noise.

    "logit_normal" is sigmoid(logit_mean + logit_std z) with z normal, "mode" is
    1 - u - mode_scale (cos^2(pi u / 2) - 1 + u) with u uniform, "uniform" is u.
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1, equations 19 and 20.

    Without `seed` this draws what `compute_density_for_timestep_sampling` of diffusers draws from
    the same generator. With it, a time depends on (seed, sample_id, step, stream) alone: z is
    `normal_noise([batch_size, 1], ...)`, and u its normal distribution function.

    Args:
        batch_size: B.
        density: "uniform", "logit_normal" or "mode".
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode", in [-1, 2 / (pi - 2)], where the map from u stays monotonic.
        generator: draws the numbers; or give `seed`.
        seed, sample_ids, step, stream: as in `normal_noise`.
        device: of the result, by default that of `sample_ids`, else the CPU.

    Returns:
        float32 `[batch_size]`.

    Raises:
        ValueError: an unknown `density`, parameters out of range, both generator and seed.
    """
    check_choice("density", density, DENSITIES)
    if batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size}")
    if not 0 < logit_std < math.inf:
        raise ValueError(f"logit_std must be positive and finite, got {logit_std}")
    if not -1 <= mode_scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode_scale must lie in [-1, 2 / (pi - 2)], got {mode_scale}")
    if seed is None:
        if sample_ids is not None:
            raise ValueError("sample_ids goes with seed, got no seed")
        size = (batch_size,)
        place = device or "cpu"
        if density == "logit_normal":
            return torch.normal(
                logit_mean, logit_std, size, generator=generator, device=place
            ).sigmoid()
        u = torch.rand(size, generator=generator, device=place)
        return _mode(u, mode_scale) if density == "mode" else u
    if generator is not None:
        raise ValueError("give generator or seed, got both")
    normals = normal_noise(
        (batch_size, 1), seed=seed, sample_ids=sample_ids, step=step, stream=stream, device=device
    )
    z = normals[:, 0].double()
    if density == "logit_normal":
        return (logit_mean + logit_std * z).sigmoid().float()
    u = torch.special.ndtr(z)
    return (_mode(u, mode_scale) if density == "mode" else u).float()


def _mode(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def _snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        check_floating(name, level)
    if alpha.shape != sigma.shape:
        raise ValueError(
            f"alpha and sigma must have one shape, got {list(alpha.shape)} and {list(sigma.shape)}"
        )
    return (alpha.double() / sigma.double()) ** 2


def _in_target(data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, target: str) -> Tensor:
    """The weight for `target` of the loss that weighs the data's error by `data`, the noise's by
    `noise` = data / SNR. One of the two may be 0 / 0 where the other is fine: callers form both.
    """
    check_choice("target", target, TARGETS)
    if target == "sample":
        return data.float()
    if target == "epsilon":
        return noise.float()
    a, s = alpha.double(), sigma.double()
    scaled = torch.where(s > a, data * s * s, noise * a * a)
    size = a * a + s * s if target == "v" else a + s
    return (scaled / size**2).float()


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
