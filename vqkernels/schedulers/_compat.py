"""Faults of diffusers 0.42 that are fixed here unless a scheduler is asked to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence

NUMERICS = ("exact", "diffusers")

# docs/schedulers.md tells each of them in full.
FAULTS = {
    "ancestral_nan": "EulerAncestral takes the root of a difference that rounding made negative",
    "bf16_noise": "add_noise and get_velocity round alphas to half precision and lose the noise",
    "discarded_edits": "UniPC corrects the last sample, and loses what was done to this one since",
    "double_shift": "flow sigmas are shifted again from limits that were shifted already",
    "edm_sigmas": "EDMEuler takes custom sigmas for places in [0, 1] between its own",
    "final_step_noise": "noise is added to the finished sample when the last timestep isn't 0",
    "fixed_large_log": "variance_type fixed_large_log takes the root of a negative logarithm",
    "linspace_previous_timestep": "the previous timestep is t - T // N, not the schedule's next",
    "log_linear_levels": "interpolation_type log_linear gives levels that are not the timesteps'",
    "repeated_timesteps": "a schedule whose first timestep repeats starts at its second row",
    "shift_terminal_nan": "shift_terminal makes the only level of a schedule of one step NaN",
    "third_order_sde": "the third order of sde-dpmsolver++ adds 1/2 of D2 with the wrong sign",
    "three_channels": "a learned variance is cut off after three channels, not after the sample's",
    "trailing_extra_timestep": "trailing spacing may end with a timestep -1 that nobody asked for",
    "training_sigma_order": "add_noise before set_timesteps takes the level of T - 1 - t, not of t",
    "velocity_index": "Euler's get_velocity reads alphas_cumprod at the place in the schedule",
}


def check_numerics(numerics: str) -> str:
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be 'exact' or 'diffusers', got {numerics!r}")
    return numerics


def faults_reproduced(numerics: str, compat: Sequence[str] | None) -> frozenset[str]:
    """The faults in force: those named, or by default none ("exact") or all ("diffusers")."""
    if compat is None:
        return frozenset(FAULTS if numerics == "diffusers" else ())
    if isinstance(compat, str):
        raise ValueError(f"compat must be a tuple of names, got the string {compat!r}")
    unknown = [name for name in compat if name not in FAULTS]
    if unknown:
        raise ValueError(f"compat must name faults among {', '.join(FAULTS)}, got {unknown[0]!r}")
    return frozenset(compat)
