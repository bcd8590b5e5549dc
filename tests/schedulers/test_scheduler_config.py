"""Configs: frozen, read from and written for diffusers, carried from class to class."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from vqkernels import schedulers

NAMES = [name for name in schedulers.__all__ if name.endswith("Scheduler")]
_CHANGES = {"num_train_timesteps": 500, "prediction_type": "v_prediction"}
CHANGED: dict[str, dict[str, Any]] = {  # arguments that differ from the defaults
    name: {
        argument: value
        for argument, value in _CHANGES.items()
        if argument in inspect.signature(getattr(schedulers, name).__init__).parameters
    }
    for name in NAMES
}
CHANGED["FlowMatchEulerDiscreteScheduler"] = {"num_train_timesteps": 500, "invert_sigmas": True}
CHANGED["FlowMatchHeunDiscreteScheduler"] = {"num_train_timesteps": 500, "shift": 3.0}
every_class = pytest.mark.parametrize("name", NAMES)


def pair(name: str) -> tuple[Any, Any]:
    return getattr(schedulers, name), getattr(diffusers, name)


def entries(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


@every_class
def test_arguments_are_those_of_diffusers(name: str) -> None:
    ours, theirs = pair(name)

    def arguments(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [
            (p.name, () if p.default == [] else p.default)  # no list that calls would share
            for p in parameters
            if p.kind is not p.VAR_KEYWORD
        ]

    for method in ("__init__", "set_timesteps", "step", "add_noise", "get_velocity"):
        if not hasattr(theirs, method):
            continue
        expected = arguments(getattr(theirs, method))
        found = arguments(getattr(ours, method))
        assert found[: len(expected)] == expected, method
        more = list(inspect.signature(getattr(ours, method)).parameters.values())[len(expected) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in more), method


@every_class
def test_config_is_read_only(name: str) -> None:
    scheduler = pair(name)[0](**CHANGED[name])
    for argument, value in CHANGED[name].items():
        assert scheduler.config[argument] == getattr(scheduler.config, argument) == value
    with pytest.raises(TypeError, match="read-only"):
        scheduler.config["num_train_timesteps"] = 3
    with pytest.raises(TypeError, match="read-only"):
        scheduler.config.num_train_timesteps = 3
    with pytest.raises(AttributeError, match="no entry 'missing'"):
        _ = scheduler.config.missing
    assert copy.deepcopy(scheduler).config == scheduler.config
    assert pickle.loads(pickle.dumps(scheduler)).config == scheduler.config
    assert name in repr(scheduler)
    assert len(scheduler) == CHANGED[name].get("num_train_timesteps", len(scheduler))


@every_class
def test_files_go_both_ways(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(name)
    ours(**CHANGED[name]).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    read = theirs.from_pretrained(tmp_path / "ours")
    assert not caplog.records  # no entry that they don't know
    assert entries(read.config) == entries(theirs(**CHANGED[name]).config)

    theirs(**CHANGED[name]).save_pretrained(tmp_path / "pipeline" / "scheduler")
    read = ours.from_pretrained(tmp_path / "pipeline", subfolder="scheduler", token="unused")
    for argument, value in entries(ours(**CHANGED[name]).config).items():
        assert read.config[argument] == value
    again = ours.from_pretrained(tmp_path / "ours", numerics="diffusers")
    assert again.numerics == "diffusers"
    assert again.config["_class_name"] == name


@every_class
def test_numerics_and_compat_are_kept_where_they_are_not_the_default(
    name: str, tmp_path: Path
) -> None:
    ours = pair(name)[0]
    ours().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert "numerics" not in written
    assert "compat" not in written
    scheduler = ours(numerics="diffusers", compat=("bf16_noise",))
    scheduler.save_pretrained(tmp_path)
    read = ours.from_pretrained(tmp_path)
    assert (read.numerics, read.compat) == ("diffusers", {"bf16_noise"})
    carried = ours.from_config(scheduler)
    assert (carried.numerics, carried.compat) == ("diffusers", {"bf16_noise"})


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_configs_go_from_class_to_class_as_in_diffusers(first: str, second: str) -> None:
    """What a second class takes from the first's config, what it leaves to its own defaults, and
    what a third finds again."""
    ours, theirs = pair(first)
    ours_second, theirs_second = pair(second)
    expected = theirs_second.from_config(theirs(**CHANGED[first]).config)
    found = ours_second.from_config(ours(**CHANGED[first]).config)
    assert entries(found.config) == entries(expected.config)
    from_theirs = ours_second.from_config(theirs(**CHANGED[first]))
    assert entries(from_theirs.config) == entries(expected.config)
    back = ours.from_config(found.config)
    assert entries(back.config) == entries(theirs.from_config(expected.config).config)
    into_theirs = theirs_second.from_config(ours(**CHANGED[first]).config)
    assert entries(into_theirs.config) == entries(expected.config)


def test_overrides_and_unused_arguments() -> None:
    ours = schedulers.DDIMScheduler
    scheduler, unused = ours.from_config(
        schedulers.DDPMScheduler(beta_end=0.05),
        return_unused_kwargs=True,
        beta_start=0.002,
        subfolder="x",
    )
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.002, 0.05)
    assert unused == {"subfolder": "x"}
    with pytest.raises(TypeError, match="DDIMScheduler has no argument 'beta_begin'"):
        ours.from_config(scheduler, beta_begin=0.002)
    with pytest.raises(ValueError, match=r"config must be a mapping or a scheduler, got str"):
        ours.from_config("a/directory")
    with pytest.raises(OSError, match=r"no scheduler_config.json"):
        ours.from_pretrained("a/directory")
    with pytest.raises(ValueError, match="push_to_hub"):
        scheduler.save_pretrained("unused", push_to_hub=True)


def test_pipelines_replace_the_config() -> None:
    """As those of Stable Diffusion do with old configs: the next schedule goes by the new one."""
    x = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
    results = []
    for scheduler in (schedulers.DDIMScheduler(), diffusers.DDIMScheduler()):
        corrected = {**scheduler.config, "clip_sample": False, "steps_offset": 1}
        scheduler._internal_dict = FrozenDict(corrected)
        scheduler.set_timesteps(4)
        results.append(scheduler.step(x, 751, x.sin()).prev_sample)
    assert results[0].abs().max() > 1.1
    assert torch.allclose(results[0], results[1], rtol=1e-5)


def test_trained_betas_are_written(tmp_path: Path) -> None:
    betas = np.linspace(0.01, 0.1, 20)
    for given in (betas, betas.tolist(), torch.from_numpy(betas)):
        scheduler = schedulers.DDIMScheduler(num_train_timesteps=20, trained_betas=given)
        scheduler.save_pretrained(tmp_path)
        read = diffusers.DDIMScheduler.from_pretrained(tmp_path)
        assert torch.equal(read.betas, scheduler.betas)


def test_compatibles() -> None:
    assert schedulers.DDPMScheduler in schedulers.DDIMScheduler().compatibles
    assert schedulers.DDIMInverseScheduler().compatibles == [schedulers.DDIMInverseScheduler]


def test_bad_numerics_and_compat() -> None:
    for arguments, message in (
        ({"numerics": "fast"}, "numerics must be 'exact' or 'diffusers', got 'fast'"),
        ({"compat": ("typo",)}, "compat must name faults among .*, got 'typo'"),
        ({"compat": "bf16_noise"}, "compat must be a tuple of names"),
    ):
        with pytest.raises(ValueError, match=message):
            schedulers.DDIMScheduler(**arguments)
