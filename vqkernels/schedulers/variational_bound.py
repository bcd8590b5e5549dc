"""The variational bound of one timestep, which trains a model's variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_floating, check_same_device

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_HALF_BIN = 1 / 255  # of 8-bit data between -1 and 1


def variational_bound(
    model_output: Tensor,
    variance: Tensor,
    x0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    prediction_type: str = "epsilon",
) -> Tensor:
    """Bits per dimension of each sample's term of the bound, with a gradient to `variance` alone.

    For t > 0 the divergence of the true posterior from the model's step,

        KL(N(m, b') || N(m', S)) = (log S - log b' + b' / S + (m - m')^2 / S - 1) / 2,

    and at t = 0 the decoder's -log of the probability that N(m', S) gives to the bin of width
    2 / 255 around x0, the outermost bins being open. m and b' are the posterior's mean and variance
    given x0, m' the mean given the x0 that `model_output` means, and the model's variance is
    S = exp(f log b + (1 - f) log b') with f = (variance + 1) / 2: `variance_type="learned_range"`
    of samplers. Where b' = 0, at t = 0, the b' of t = 1 takes its place.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equations 4 to 6 and 15; the decoder is that
    of Ho et al. 2020, arXiv:2006.11239, equation 13.

    Args:
        model_output: `[B, ...]`, taken without its gradient.
        variance: `[B, ...]`, the model's other channels.
        x0: data in [-1, 1], of 256 equidistant values where t = 0, `[B, ...]`.
        x_t: `[B, ...]`.
        timesteps: int64 `[B]`, in [0, T - 1].
        alphas_cumprod: `[T]`, T >= 2; used in float64.
        prediction_type: "epsilon", "sample" or "v_prediction".

    Returns:
        float32 `[B]` (float64 for float64 data): mean over the elements of a sample.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, an unknown type.
    """
    _check(model_output, variance, x0, x_t, timesteps, alphas_cumprod)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    wide = torch.promote_types(x0.dtype, torch.float32)
    output, data, noisy = (tensor.detach().to(wide) for tensor in (model_output, x0, x_t))
    column = (-1, *(1,) * (x0.dim() - 1))  # [B, 1, ...]

    kept = alphas_cumprod.to(x0.device).double()
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    posterior = torch.cat([posterior[1:2], posterior[1:]])
    of_data = before.sqrt() * beta / (1 - kept)  # m = of_data x0 + (something) x_t
    # m - m' = of_data (x0 - x0'), and x0' = of_noisy x_t + of_output output.
    of_noisy, of_output = {
        "epsilon": (kept.rsqrt(), -((1 / kept - 1).sqrt())),
        "sample": (torch.zeros_like(kept), torch.ones_like(kept)),
        "v_prediction": (kept.sqrt(), -((1 - kept).sqrt())),
    }[prediction_type]

    def at(table: Tensor) -> Tensor:
        return table[timesteps].to(wide).reshape(column)

    gap = at(of_data) * (data - at(of_noisy) * noisy - at(of_output) * output)  # m - m'
    low, high = at(posterior.log()), at(beta.log())
    excess = (variance.to(wide) + 1) / 2 * (high - low)  # log S - log b'
    log_variance = low + excess
    divergence = (excess + torch.expm1(-excess) + gap * gap * torch.exp(-log_variance)) / 2

    later = timesteps.reshape(column) != 0
    # What is not used must be finite all the same: a NaN would reach the gradient through `where`.
    decoder = _decoder(*(a.masked_fill(later, 0) for a in (data, gap, log_variance)))
    nats = torch.where(later, divergence, decoder.to(wide))
    return nats.flatten(1).mean(1) / math.log(2)


def _decoder(data: Tensor, gap: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the probability of the bin around `data` under N(data - gap, exp(log_variance)).

    In float64: the bins of a wide distribution differ by less than fp32 resolves.
    """
    scale = torch.exp(-log_variance.double() / 2)
    lower = (gap.double() - _HALF_BIN) * scale
    upper = (gap.double() + _HALF_BIN) * scale
    # Mirrored where needed, so that both edges lie where the distribution function is precise.
    mirrored = lower + upper > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    below, above = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    inside = above + torch.log(-torch.expm1(below - above))
    below_all = torch.special.log_ndtr((gap.double() + _HALF_BIN) * scale)
    above_all = torch.special.log_ndtr((_HALF_BIN - gap.double()) * scale)
    lowest, highest = data < -1 + _HALF_BIN, data > 1 - _HALF_BIN
    return -torch.where(lowest, below_all, torch.where(highest, above_all, inside))


def _check(
    model_output: Tensor,
    variance: Tensor,
    x0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
) -> None:
    check_floating("x0", x0)
    if x0.dim() < 2:
        raise ValueError(f"x0 must be [B, ...], got shape {list(x0.shape)}")
    for name, tensor in (("model_output", model_output), ("variance", variance), ("x_t", x_t)):
        check_floating(name, tensor)
        check_same_device(name, tensor, "x0", x0)
        if tensor.shape != x0.shape:
            raise ValueError(
                f"{name} must have x0's shape {list(x0.shape)}, got {list(tensor.shape)}"
            )
    if timesteps.dtype != torch.int64 or timesteps.shape != x0.shape[:1]:
        raise ValueError(
            f"timesteps must be int64 [{len(x0)}], got {timesteps.dtype} {list(timesteps.shape)}"
        )
    check_floating("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1 or len(alphas_cumprod) < 2:
        raise ValueError(
            f"alphas_cumprod must be [T] with T >= 2, got shape {list(alphas_cumprod.shape)}"
        )
