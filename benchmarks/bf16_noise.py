"""Noise that bf16 samples get at each timestep: `python -m benchmarks.bf16_noise [picture.png]`.

`add_noise(0, 1, t)` in bf16 is the noise level sqrt(1 - alphas_cumprod[t]) as a training loop gets
it. Ours rounds it once, at the end; diffusers rounds alphas_cumprod first, and 1 - alphas_cumprod
loses what is left. Prints a table of relative errors against float64, or draws all timesteps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels.schedulers import DDPMScheduler

TIMESTEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 999)
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}


def errors(schedule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noise levels in float64, and the relative errors of ours and of diffusers' in bf16: `[T]`."""
    import diffusers

    arguments = SCHEDULES[schedule]
    t = torch.arange(1000)
    ours = DDPMScheduler(**arguments)
    exact = ours.add_noise(
        torch.zeros(1000, 1, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64), t
    )
    found = [
        scheduler.add_noise(torch.zeros(1000, 1).bfloat16(), torch.ones(1000, 1).bfloat16(), t)
        for scheduler in (ours, diffusers.DDPMScheduler(**arguments))
    ]
    mine, theirs = (((level.double() - exact).abs() / exact).flatten() for level in found)
    return exact.flatten(), mine, theirs


def print_table() -> None:
    for schedule in SCHEDULES:
        exact, ours, theirs = errors(schedule)
        print(f"\n| t, {schedule} | noise level | error, ours | error, diffusers |")
        print("|---|---|---|---|")
        for t in TIMESTEPS:
            print(f"| {t} | {exact[t]:.4f} | {ours[t]:.2%} | {theirs[t]:.2%} |")
        for name, values in (("ours", ours), ("diffusers", theirs)):
            lost = int((values >= 1).sum())
            print(f"{name}: at most {values.max():.2%}; {lost} timesteps without any noise")


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(SCHEDULES), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    for axes, schedule in zip(panels, SCHEDULES, strict=True):
        _, ours, theirs = errors(schedule)
        t = torch.arange(1, len(ours) + 1)
        for values, colour, label in (
            (theirs, "#D55E00", "diffusers"),
            (ours, "#0072B2", "vqkernels"),
        ):
            axes.plot(t, 100 * values.clamp(min=1e-5), ".", markersize=3, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(schedule)
        axes.set_xlabel("timestep + 1")
    panels[0].set_ylabel("error of the noise level, %")
    panels[0].legend(loc="lower left")
    figure.suptitle("Noise that bf16 samples get, against float64")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, help="draw instead of printing")
    picture = parser.parse_args().picture
    if picture is None:
        print_table()
    else:
        draw(picture)


if __name__ == "__main__":
    main()
