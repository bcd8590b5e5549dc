"""Weights of data and noise in bf16: `python -m benchmarks.coefficient_error [picture.png]`.

`add_noise(1, 0, t)` and `add_noise(0, 1, t)` in bf16 are the weights sqrt(alphas_cumprod[t]) and
sqrt(1 - alphas_cumprod[t]) as a training loop gets them. Ours rounds them once, at the end;
diffusers rounds alphas_cumprod first, and 1 - alphas_cumprod loses what is left. Prints tables of
relative errors against float64, or draws all timesteps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels.schedulers import DDPMScheduler

TIMESTEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 999)
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
WEIGHTS = {"signal": (1.0, 0.0), "noise": (0.0, 1.0)}


def weights(scheduler: Any, weight: str, dtype: torch.dtype) -> Tensor:
    """What `add_noise` multiplies data ("signal") or noise by, float64 `[T]`."""
    data, noise = (torch.full((1000, 1), value, dtype=dtype) for value in WEIGHTS[weight])
    found: Tensor = scheduler.add_noise(data, noise, torch.arange(1000))
    return found.double().flatten()


def errors(schedule: str, weight: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in float64, and relative errors of ours and of diffusers' in bf16: `[T]` each."""
    import diffusers

    arguments = SCHEDULES[schedule]
    ours, theirs = DDPMScheduler(**arguments), diffusers.DDPMScheduler(**arguments)
    exact = weights(ours, weight, torch.float64)
    found = (weights(scheduler, weight, torch.bfloat16) for scheduler in (ours, theirs))
    mine, others = ((w - exact).abs() / exact for w in found)
    return exact, mine, others


def print_tables() -> None:
    for schedule in SCHEDULES:
        signal, noise = (errors(schedule, weight) for weight in WEIGHTS)
        print(f"\n| t, {schedule} | signal | ours | diffusers | noise | ours | diffusers |")
        print("|---|---|---|---|---|---|---|")
        for t in TIMESTEPS:
            print(f"| {t} | {_cells(signal, t)} | {_cells(noise, t)} |")
        largest = (
            f"| {ours.max():.2%} | {others.max():.2%} " for _, ours, others in (signal, noise)
        )
        print("| largest | " + "| ".join(largest) + "|")
        print(f"without any noise: ours {_lost(noise[1])}, diffusers {_lost(noise[2])} timesteps")


def _cells(row: tuple[Tensor, Tensor, Tensor], t: int) -> str:
    exact, ours, theirs = (float(column[t]) for column in row)
    return f"{exact:.4f} | {ours:.2%} | {theirs:.2%}"


def _lost(relative: Tensor) -> int:
    return int((relative >= 1).sum())


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(WEIGHTS), len(SCHEDULES), figsize=(11, 5.6), sharey=True, layout="constrained"
    )
    for row, weight in zip(panels, WEIGHTS, strict=True):
        row[0].set_ylabel(f"error of the {weight}'s weight, %")
        for axes, schedule in zip(row, SCHEDULES, strict=True):
            _, ours, theirs = errors(schedule, weight)
            t = torch.arange(1, len(ours) + 1)
            for values, colour, label in (
                (theirs, "#D55E00", "diffusers"),
                (ours, "#0072B2", "vqkernels"),
            ):
                shown = 100 * values.clamp(min=1e-5)
                axes.plot(t, shown, ".", markersize=3, color=colour, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
    for axes, schedule in zip(panels[0], SCHEDULES, strict=True):
        axes.set_title(schedule)
    for axes in panels[-1]:
        axes.set_xlabel("timestep + 1")
    panels[0][0].legend(loc="upper right", markerscale=3)
    figure.suptitle("Weights of data and noise that bf16 samples get, against float64")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, help="draw instead of printing")
    picture = parser.parse_args(arguments).picture
    if picture is None:
        print_tables()
    else:
        draw(picture)


if __name__ == "__main__":
    main()
