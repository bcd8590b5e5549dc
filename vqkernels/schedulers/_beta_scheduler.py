"""Schedulers of models trained on a discrete noise schedule beta_0 .. beta_{T-1}."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_tensor
from vqkernels.ops._noise import at_levels, check_like, check_samples
from vqkernels.ops.diffuse import diffuse
from vqkernels.schedulers._betas import make_betas
from vqkernels.schedulers._prediction import DISCRETE_PREDICTIONS
from vqkernels.schedulers._scheduler import Scheduler
from vqkernels.schedulers._spacing import check_steps, spaced_timesteps

TrainedBetas = np.ndarray | Sequence[float] | None


class BetaScheduler(Scheduler):
    """Betas, levels of noise, noising; a subclass samples.

    `betas`, `alphas` and `alphas_cumprod` are float32; they round the float64 schedule that the
    coefficients come from, or under numerics="diffusers" were computed in float32.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    _alphas_cumprod: Tensor  # float64
    _levels: Tensor  # [2, T] float64: alpha and sigma of x_t = alpha x_0 + sigma z
    _predictions: tuple[str, ...] = DISCRETE_PREDICTIONS
    _bounds_predictions = False  # whether the class called _set_threshold

    def _set_betas(self) -> None:
        """From the config's beta_start, beta_end, beta_schedule, trained_betas, ..."""
        config = self.config
        check_choice("prediction_type", config.prediction_type, self._predictions)

        def betas(dtype: torch.dtype) -> Tensor:
            return make_betas(
                config.beta_schedule,
                config.num_train_timesteps,
                config.beta_start,
                config.beta_end,
                trained=config.trained_betas,
                zero_snr=config.get("rescale_betas_zero_snr", False),
                dtype=dtype,
            )

        exact = betas(torch.float64)
        self._alphas_cumprod = torch.cumprod(1 - exact, dim=0)
        self._levels = torch.stack([self._alphas_cumprod, 1 - self._alphas_cumprod]).sqrt()
        if self.numerics == "diffusers":
            self.betas = betas(torch.float32)
            self.alphas = 1.0 - self.betas
            self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        else:
            self.betas, self.alphas = exact.float(), (1 - exact).float()
            self.alphas_cumprod = self._alphas_cumprod.float()

    def _set_threshold(self) -> None:
        """From the config's clip_sample, thresholding, ...: clipping is a column of the table."""
        config = self.config
        self._bounds_predictions = True
        self._threshold = "clip" if config.clip_sample else "none"
        if config.get("thresholding"):
            self._threshold, self._ratio = "dynamic", config.dynamic_thresholding_ratio

    def _lay_out(self, timesteps: Tensor, device: torch.device | str | None = None) -> None:
        if self._bounds_predictions:  # pipelines may have replaced the config
            self._set_threshold()
        super()._lay_out(timesteps, device)

    def _clip(self) -> float:
        config = self.config
        if self._threshold == "dynamic":
            return float(config.sample_max_value)
        return float(config.clip_sample_range) if self._threshold == "clip" else math.inf

    def _spaced(self, num_inference_steps: int) -> np.ndarray:
        """Descending int64 timesteps of the config's spacing."""
        config = self.config
        steps = check_steps(num_inference_steps, config.num_train_timesteps)
        timesteps = spaced_timesteps(
            config.timestep_spacing,
            steps,
            config.num_train_timesteps,
            config.steps_offset,
            extra_timestep="trailing_extra_timestep" in self.compat,
        )
        outside = timesteps[0] >= config.num_train_timesteps or timesteps[-1] < 0
        if outside and config.timestep_spacing == "leading":
            raise ValueError(
                f"steps_offset must leave timesteps in [0, num_train_timesteps = "
                f"{config.num_train_timesteps}), got {config.steps_offset}, which gives "
                f"{timesteps[0]:g} to {timesteps[-1]:g}"
            )
        return timesteps.round().astype(np.int64)

    def _levels_before(self, timesteps: Sequence[float], end: float) -> Tensor:
        """alphas_cumprod in float64, `end` for timesteps below 0."""
        t = torch.tensor(timesteps, dtype=torch.int64)
        return torch.where(t >= 0, self._alphas_cumprod[t.clamp(min=0)], end)

    def _data_as_diffusers(self, output: Tensor, sample: Tensor, level: Tensor) -> Tensor:
        """x_0 where alphas_cumprod is `level`, before clipping."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - (1 - level) ** 0.5 * output) / level**0.5
        if kind == "sample":
            return output
        return level**0.5 * sample - (1 - level) ** 0.5 * output

    def _noise_as_diffusers(self, output: Tensor, sample: Tensor, level: Tensor) -> Tensor:
        kind = self.config.prediction_type
        if kind == "epsilon":
            return output
        if kind == "sample":
            return (sample - level**0.5 * output) / (1 - level) ** 0.5
        return level**0.5 * output + (1 - level) ** 0.5 * sample

    def _clipped_as_diffusers(self, data: Tensor) -> Tensor:
        if self._threshold == "clip":
            return data.clamp(-self._clip(), self._clip())
        if self._threshold == "none":
            return data
        wide = data if data.dtype in (torch.float32, torch.float64) else data.float()
        flat = wide.reshape(len(data), -1)
        limit = torch.quantile(flat.abs(), self._ratio, dim=1)
        limit = limit.clamp(min=1, max=self._clip()).unsqueeze(1)
        flat = torch.clamp(flat, -limit, limit) / limit
        return flat.reshape(data.shape).to(data.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alphas_cumprod[t]) original_samples + sqrt(1 - alphas_cumprod[t]) noise.

        Args:
            original_samples: `[B, ...]`.
            noise: the same shape.
            timesteps: int64, `[]`, `[B]`, or the first of the samples' dimensions (a timestep a
                token: `[B, N]` for samples `[B, N, D]`), ones where they do not vary; on any
                device.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape that does not fit; on the CPU, a timestep outside of
                [0, num_train_timesteps).
        """
        check_like("noise", noise, "original_samples", original_samples)
        if self._rounds_as_diffusers(original_samples):
            alpha, sigma = self._levels_as_diffusers(original_samples, timesteps)
            return alpha * original_samples + sigma * noise
        alpha, sigma = self._levels_at(original_samples, timesteps)
        return diffuse(original_samples, alpha, sigma, noise=noise)[0]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alphas_cumprod[t]) noise - sqrt(1 - alphas_cumprod[t]) sample; as `add_noise`."""
        check_like("noise", noise, "sample", sample)
        if self._rounds_as_diffusers(sample):
            alpha, sigma = self._levels_as_diffusers(sample, timesteps)
            return alpha * noise - sigma * sample
        alpha, sigma = self._levels_at(sample, timesteps)
        return diffuse(sample, alpha, sigma, noise=noise, target="v")[1]

    def _rounds_as_diffusers(self, sample: Tensor) -> bool:
        if sample.dtype in (torch.float16, torch.bfloat16):
            return "bf16_noise" in self.compat
        return self.numerics == "diffusers"

    def _levels_at(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of each timestep, for `diffuse`."""
        self._check_timesteps(sample, timesteps)
        t = at_levels("timesteps", timesteps.to(sample.device), "the sample", sample)
        self._levels = self._levels.to(sample.device)  # stays there for the next call
        alpha, sigma = self._levels[:, t]
        return alpha, sigma

    def _levels_as_diffusers(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Their levels, rounded to the sample's dtype before the root; one dimension a sample."""
        self._check_timesteps(sample, timesteps)
        self.alphas_cumprod = self.alphas_cumprod.to(sample.device)
        level = self.alphas_cumprod.to(sample.dtype)[timesteps.to(sample.device)].flatten()
        level = level.reshape(-1, *(1,) * (sample.dim() - 1))
        return level**0.5, (1 - level) ** 0.5

    def _check_timesteps(self, sample: Tensor, timesteps: Tensor) -> None:
        check_samples("sample", sample)
        check_tensor("timesteps", timesteps)
        if timesteps.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"timesteps must be int64 or int32, got {timesteps.dtype}")
        if timesteps.device.type == "cpu" and timesteps.numel():
            low, high = int(timesteps.min()), int(timesteps.max())
            if low < 0 or high >= self.config.num_train_timesteps:
                raise ValueError(
                    f"timesteps must lie in [0, num_train_timesteps = "
                    f"{self.config.num_train_timesteps}), got values from {low} to {high}"
                )
