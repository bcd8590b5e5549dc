"""Schedulers whose schedule is a row of noise levels: sigma from one model call to the next."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_floating, check_tensor
from vqkernels.ops.diffuse import diffuse
from vqkernels.schedulers._noise import STEP_STREAM, Generators
from vqkernels.schedulers._scheduler import Scheduler
from vqkernels.schedulers._sigmas import Levels

_MAX_GAMMA = 2**0.5 - 1


class SigmaScheduler(Scheduler):
    """Levels and churn; a subclass says how data and noise mix at a level.

    `sigmas` is float32 and longer than the schedule: it ends with the level after the last step.
    """

    sigmas: Tensor
    _sigmas: Tensor  # the same in float64, on the CPU
    _moved: Tensor  # and on the device of the samples last noised
    _host: list[float]  # and as numbers: a step reads no tensor
    _defaults: ClassVar[dict[str, Any]] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf}

    def _set_sigmas(self, sigmas: Levels) -> None:
        self._sigmas = torch.from_numpy(sigmas.astype(np.float64))
        self.sigmas = self._sigmas.float()
        self._moved = self._sigmas
        self._host = self._sigmas.tolist()

    def _sigmas_on(self, device: torch.device | str) -> Tensor:
        self._moved = self._moved.to(device)
        return self._moved

    @property
    def _precision(self) -> Any:
        return np.float32 if self.numerics == "diffusers" else np.float64

    def _check_timestep(self, timestep: Any) -> None:
        integer = isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)
        if integer or isinstance(timestep, int):
            raise ValueError(
                "timestep must be one of scheduler.timesteps, which are floating point, "
                f"got the integer {timestep}: the number of a step is not its timestep"
            )

    # Churn, noise added before a step: Karras et al. 2022, arXiv:2206.00364, algorithm 2.

    def _level_row(self, row: int) -> int:
        """Where in `sigmas` the level is that a row's churn raises."""
        return row

    def _gamma(self, row: int, s_churn: float, s_tmin: float, s_tmax: float) -> float:
        """By what share a row's level is raised."""
        sigma = float(np.float32(self._host[self._level_row(row)]))
        if not s_tmin <= sigma <= s_tmax:
            return 0.0
        return min(s_churn / (len(self._host) - 1), _MAX_GAMMA)

    def _levels_of_rows(self, **churn: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row: its level, the same churned, the level that the step arrives at."""
        steps = len(self._values)
        gammas = [self._gamma(row, **churn) for row in range(steps)]
        sigma = self._sigmas[:steps]
        raised = sigma * (1 + torch.tensor(gammas, dtype=torch.float64))
        return sigma, raised, self._sigmas[1 : steps + 1]

    def _churned(
        self,
        sample: Tensor,
        model_output: Tensor,
        row: int,
        s_noise: float,
        generator: Generators,
        seed: int | Tensor | None,
        sample_ids: Tensor | None,
        **churn: float,
    ) -> tuple[Tensor, float]:
        """`(sample + s_noise sqrt(sigma_hat^2 - sigma^2) noise, gamma)`; the table follows."""
        if not churn["s_churn"] >= 0:
            raise ValueError(f"s_churn must be at least 0, got {churn['s_churn']}")
        if churn["s_churn"] == 0:
            churn = self._defaults
        if self.numerics == "exact":
            self._tabulate(**churn)
        gamma = self._gamma(row, **churn)
        if gamma == 0:
            return sample, gamma
        noise = self._noise(
            model_output,
            row,
            generator=generator,
            seed=seed,
            sample_ids=sample_ids,
            dtype=model_output.dtype,
        )
        if self.numerics == "diffusers":
            sigma = self.sigmas[self._level_row(row)]
            raised = sigma * (gamma + 1)
            return sample + noise["noise"] * s_noise * (raised**2 - sigma**2) ** 0.5, gamma
        added = s_noise * self._host[self._level_row(row)] * ((1 + gamma) ** 2 - 1) ** 0.5
        weight = torch.ones(len(sample), device=sample.device)
        self._move(sample.device)
        if seed is not None:
            noise |= {"step": self._rows[row], "stream": STEP_STREAM}
        return diffuse(sample, weight, weight * added, **noise)[0], gamma

    # Noising at the schedule's timesteps.

    def _data_weight(self, sigma: Tensor) -> Tensor:
        """The weight of the data where noise has the weight sigma."""
        raise NotImplementedError

    def _mix_as_diffusers(self, data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _noised(
        self,
        data: Tensor,
        noise: Tensor | None,
        timesteps: Tensor | float,
        name: str = "original_samples",
    ) -> Tensor:
        """`data` mixed with noise at the levels of these timesteps."""
        check_floating(name, data)
        rows = self._rows_at(timesteps, data)
        if noise is None:
            raise ValueError("noise must be given, got None")
        if self._rounds_as_diffusers(data):
            sigma = self.sigmas.to(device=data.device, dtype=data.dtype)[rows]
            sigma = sigma.reshape(sigma.shape + (1,) * (data.dim() - sigma.dim()))
            return self._mix_as_diffusers(data, noise, sigma)
        sigma = self._sigmas_on(data.device)[rows]
        return diffuse(data, self._data_weight(sigma), sigma, noise=noise)[0]

    def _rounds_as_diffusers(self, sample: Tensor) -> bool:
        if sample.dtype in (torch.float16, torch.bfloat16):
            return "bf16_noise" in self.compat
        return self.numerics == "diffusers"

    def _rows_at(self, timesteps: Tensor | float, data: Tensor) -> Tensor:
        """Where in the schedule each timestep is, `[B]` or a larger prefix of data's shape."""
        times = per_sample(timesteps, data)
        if self._begin_index is None:
            return self._search(times)
        row = self._begin_index if self._step_index is None else self._step_index
        return torch.full(times.shape, row, dtype=torch.int64, device=data.device)

    def _search(self, timesteps: Tensor) -> Tensor:
        """Rows of timesteps, all at once; of repetitions the second as in `index_for_timestep`."""
        ascending, order = self.timesteps.to(timesteps.device).sort(stable=True)
        wanted = timesteps.to(ascending.dtype).contiguous()
        last = len(ascending) - 1
        place = torch.searchsorted(ascending, wanted).clamp(max=last)
        following = (place + 1).clamp(max=last)
        place = torch.where(ascending[following] == wanted, following, place)
        missing = ascending[place] != wanted
        if bool(missing.any()):
            raise ValueError(
                f"timesteps must be of the schedule's {last + 1} ({float(ascending[-1]):g} to "
                f"{float(ascending[0]):g}), got {float(wanted[missing].flatten()[0]):g}"
            )
        return order[place]


class AdditiveScheduler(SigmaScheduler):
    """Levels of x0 + sigma z: the data keeps its weight."""

    def _data_weight(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def _mix_as_diffusers(self, data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return data + noise * sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original_samples + sigma(t) noise.

        Args:
            original_samples: `[B, ...]`.
            noise: the same shape.
            timesteps: of the schedule, `[]`, `[B]`, or more of the samples' leading dimensions (a
                timestep a token: `[B, N]` for samples `[B, N, D]`). Once a loop has begun
                (`set_begin_index`, `step`), noise is that of its present step whatever they are.

        Raises:
            ValueError: a shape or device that does not fit; a timestep outside of the schedule.
        """
        return self._noised(original_samples, noise, timesteps)


def per_sample(timesteps: Tensor | float, data: Tensor) -> Tensor:
    """Beside the data; one value once a sample."""
    if isinstance(timesteps, (int, float)):
        timesteps = torch.tensor(float(timesteps), dtype=torch.float64)
    check_tensor("timesteps", timesteps)
    timesteps = timesteps.to(data.device)
    return timesteps.expand(len(data)) if timesteps.dim() == 0 else timesteps
