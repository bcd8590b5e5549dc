"""Small calls that together take every path of the CUDA noise kernels, each with its check."""

from __future__ import annotations

from typing import Any

import noise_calls
import torch
from _helpers.data import generator
from _helpers.precision import assert_rounded_once
from cuda_calls import Case, CudaCalls, Device
from torch import Tensor

from vqkernels.ops.denoise_step import denoise_coefficients
from vqkernels.reference import denoise_step as denoise_reference
from vqkernels.reference import diffuse as diffuse_reference
from vqkernels.reference import normal_noise as normal_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEY = torch.tensor([-(2**40) - 7, 5, 2**33 + 1])
# Each term has a coefficient, and the first row leaves each out that may be left out.
TABLE = denoise_coefficients(
    guidance=[1, 3, 7.5],
    prediction_sample=[1.25, 0, 0.9],
    prediction_output=[-0.5, 1, -0.75],
    clip=[0.7, 1.5, 1.2],
    prev_sample=[0.4, 0, 0.3],
    prev_prediction=[0.6, 1.1, 0.8],
    prev_output=[0, 0.2, -0.1],
    prev_history_0=[0, 0.5, 0.6],
    prev_history_1=[0, -0.4, 0.3],
    prev_history_2=[0.1, 0, 0.2],
    prev_history_3=[-0.2, 0.1, 0],
    prev_noise=[0, 0.5, 0.25],
    variance_log_min=[-4, -3, -2],
    variance_log_max=[-1, -1.5, -0.5],
    extra_sample=[0, 1, 0.2],
    extra_prediction=[1, 0, 0.3],
    extra_output=[-1, 0.3, 0],
    extra_history_0=[0, 0.5, 0.1],
    extra_history_3=[0, 0.7, 0.4],
)


class Draw:
    """Random tensors, the same ones for each seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = generator(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype)

    def levels(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator) + 0.1


def wide(value: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return [wide(of) for of in value] if isinstance(value, list | tuple) else value


def check_diffuse(calls: CudaCalls, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Of the op's arguments, against float64."""
    found = noise_calls.diffuse(calls, *arguments)
    exact = diffuse_reference.diffuse(*map(wide, arguments))
    assert [of.dtype for of in found] == [arguments[0].dtype] * 2
    assert_rounded_once(found, exact)
    return found


DEFAULTS: dict[str, Any] = {
    "uncond_output": None,
    "history": [],
    "variance": None,
    "noise": None,
    "key": None,
    "sample_ids": None,
    "threshold": "none",
    "ratio": 0.995,
    "variance_type": "learned_range",
    "want_prediction": True,
    "want_extra": True,
}


def step_exactly(*tensors: Tensor, index: Tensor | None = None, **more: Any) -> list[Tensor]:
    """Of sample, model_output and the table, in float64."""
    index = torch.tensor(0) if index is None else index
    options = {name: wide(more.get(name, value)) for name, value in DEFAULTS.items()}
    return list(denoise_reference.denoise_step(*map(wide, tensors), index, **options))


def check_step(calls: CudaCalls, *tensors: Tensor, **more: Any) -> tuple[Tensor | None, ...]:
    """Of the op's arguments, against float64."""
    exact = step_exactly(*tensors, **more)
    wanted = {name: more.get(name, True) for name in ("want_prediction", "want_extra")}
    found = noise_calls.denoise_step(calls, *tensors, **(more | wanted))
    pairs = [(mine, true) for mine, true in zip(found, exact, strict=True) if mine is not None]
    assert len(pairs) == 1 + sum(wanted.values())
    assert all(mine.dtype == tensors[0].dtype for mine, _ in pairs)
    assert_rounded_once(*zip(*pairs, strict=True))
    return found


def _diffuse(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = FP32,
    levels: int = 1,
    noise: torch.dtype | None = None,
    target: str = "v",
) -> Case:
    """`levels`: dimensions that alpha and sigma have; noise is drawn where it has no dtype."""

    def run(calls: CudaCalls) -> None:
        draw = Draw()
        x0, of = draw(*shape, dtype=dtype), shape[:levels]
        given = None if noise is None else draw(*shape, dtype=noise)
        key = KEY if given is None else None
        check_diffuse(calls, x0, draw.levels(*of), draw.levels(*of), given, key, None, target)

    return Case(f"noise-diffuse-{name}", run)


def _step(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    levels: int = 0,
    given: str = "",
    table: Tensor = TABLE,
    device: Device | None = None,
    **more: Any,
) -> Case:
    """`levels`: dimensions of the index; `given`: u(ncond), v(ariance), n(oise), k(ey) and digits
    for so many tensors of history."""

    def run(calls: CudaCalls) -> None:
        draw = Draw()
        sample, model_output = (draw(*shape, dtype=dtype) for dtype in dtypes)
        of = shape[:levels]
        index = torch.randint(-1, 5, of, generator=generator(1)) if of else torch.tensor(1)
        history = [
            draw(*shape, dtype=dtypes[0]) for _ in range(int("0" + given[-1:].strip("uvnk")))
        ]
        check_step(
            calls,
            sample,
            model_output,
            table,
            index=index,
            uncond_output=draw(*shape, dtype=dtypes[1]) if "u" in given else None,
            history=history,
            variance=draw.levels(*shape).to(dtypes[1]) if "v" in given else None,
            noise=draw(*shape, dtype=FP16) if "n" in given else None,
            key=KEY if "k" in given else None,
            sample_ids=torch.arange(shape[0]) * 2**31 - 3 if "k" in given else None,
            **more,
        )

    return Case(f"noise-step-{name}", run, *([] if device is None else [device]))


def rescaled(table: Tensor = TABLE) -> Tensor:
    table = table.clone()
    table[:, 1] = torch.tensor([0.7, 0.4, 1.0])
    return table


def check_normals(calls: CudaCalls, shape: tuple[int, ...], sample_ids: Tensor | None) -> None:
    """As the reference draws them, in each dtype."""
    exact = normal_reference.normal_noise(shape, KEY, sample_ids, torch.float64)
    for dtype in (FP32, FP16, BF16):
        found = noise_calls.normal_noise(calls, shape, KEY, sample_ids, dtype).double()
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() if dtype != FP32 else 0
        assert ((found - exact).abs() <= 2e-6 + rounding).all()


def _normals(calls: CudaCalls) -> None:
    for shape in ((2, 37), (1, 2100), (300, 2), (3, 2, 16)):
        check_normals(calls, shape, None)
        check_normals(calls, shape, torch.arange(shape[0]) * -(2**29) + 5)


def _views(calls: CudaCalls) -> None:
    """Halves of channels and of batches are read in place, from wherever they begin."""
    draw = Draw()
    for dtype, size in ((FP32, 8), (BF16, 16), (FP16, 7)):
        both = draw(3, 4, 5, size, dtype=dtype)
        output, variance = both.chunk(2, dim=1)
        uncond, cond = draw(6, 2, 5, size, dtype=dtype).chunk(2)
        x = draw(3 * 10 * size + 1, dtype=dtype)[1:].view(3, 2, 5, size)  # no piece is whole
        levels = draw.levels(3), draw.levels(3)
        check_diffuse(calls, output, *levels, uncond, None, None, "flow")
        check_diffuse(calls, x, *levels, None, KEY, None, "v")
        more = {"variance": variance.abs(), "key": KEY, "history": [cond]}
        check_step(calls, x, output, TABLE, index=torch.tensor(2), **more)
        check_step(calls, x, cond, TABLE, index=torch.tensor(2), uncond_output=uncond)


def _in_place(calls: CudaCalls) -> None:
    draw = Draw()
    for more in ({}, {"threshold": "dynamic", "ratio": 0.8}, {"threshold": "clip"}):
        for of in (0, 1):
            operands = [draw(2, 2100, dtype=BF16) for _ in range(3)]
            sample, history, output = operands
            index = torch.tensor([2, 1])
            arguments = {"index": index, "history": [history], **more}
            exact = step_exactly(sample, output, TABLE, **arguments)
            prev, *_ = noise_calls.denoise_step(
                calls, sample, output, TABLE, out=operands[of], **arguments
            )
            assert_rounded_once([prev], exact[:1])


def _not_numbers(calls: CudaCalls) -> None:
    """In a step they stay where they are; where a whole sample is looked at they spoil it, and no
    other. A coefficient of 0 leaves them out."""
    draw = Draw()
    for dtype in (FP32, BF16):
        sample, output, uncond = (draw(3, 2, 20, dtype=dtype) for _ in range(3))
        output[1, 0, 3], sample[2, 1, 4] = torch.nan, torch.inf
        for more in (
            {"threshold": "clip"},
            {"threshold": "dynamic"},
            {"uncond_output": uncond},
            {"uncond_output": uncond, "threshold": "dynamic"},
        ):
            for table in (TABLE, rescaled()):
                for row in (0, 1, 2):
                    arguments = {"index": torch.tensor(row), **more}
                    exact = step_exactly(sample, output, table, **arguments)
                    found = noise_calls.denoise_step(
                        calls, sample, output, table, want_prediction=True, want_extra=True,
                        **arguments,
                    )  # fmt: skip
                    for mine, true in zip(found, exact, strict=True):
                        assert torch.equal(mine.isnan(), true.isnan())
                        assert torch.equal(mine.isinf(), true.isinf())
                        finite = true.isfinite()
                        assert_rounded_once([mine[finite]], [true[finite]])


def check_quantile(calls: CudaCalls, x: Tensor, ratio: float, dtype: torch.dtype = FP32) -> None:
    """Predictions are x itself, and the limits between 1 and 5."""
    table = denoise_coefficients(prediction_output=1, prev_prediction=1, clip=5)
    x = x.to(dtype)
    more = {"threshold": "dynamic", "ratio": ratio, "want_extra": False}
    check_step(calls, torch.zeros_like(x), x, table, **more)


def _ranks(calls: CudaCalls) -> None:
    """Neighbours that share all digits, some or none; equal ones on both sides of the rank."""
    draw = Draw()
    close = 2 + torch.arange(1500.0) * 2**-20
    for x in (
        3 * draw(2, 1500),
        close[torch.randperm(1500, generator=generator(3))].view(1, -1) * -1,
        torch.full((1, 9), 1.5),
        torch.tensor([[4.0, 1.25, -4, 1.25, 2, -2, 0, 4]]),
        torch.tensor([[-3.0]]),
    ):
        for ratio in (0.0, 0.3, 0.5, 0.995, 1.0):
            check_quantile(calls, x, ratio)


def cases() -> list[Case]:
    """Fast enough to run some hundred times."""
    several = Device(multiprocessors=2)
    return [
        Case("noise-normals", _normals),
        _diffuse("drawn", (2, 37)),
        _diffuse("drawn-halves", (3, 2, 24), BF16, target="epsilon"),
        _diffuse("given", (2, 1100), FP16, noise=FP32, target="flow"),
        _diffuse("given-halves", (2, 19), FP32, noise=BF16, target="sample"),
        _diffuse("tokens", (2, 5, 16), BF16, levels=2),
        _diffuse("odd-tokens", (2, 7, 3), FP16, levels=2, target="flow"),
        _diffuse("elements", (2, 9), levels=2),
        _diffuse("one", (5,)),
        _step("plain", (3, 41), given="0"),
        _step("halves", (2, 1100), (BF16, FP16), 1, "k2", threshold="clip"),
        _step("float-outputs", (2, 44), (FP16, FP32), 1, "vn4", variance_type="learned"),
        _step("half-outputs", (2, 9, 5), (FP32, BF16), 1, "vk1", want_extra=False),
        _step("tokens", (2, 6, 16), (BF16, BF16), 2, "k3", want_prediction=False),
        _step("odd-tokens", (3, 5, 3), (FP32, FP32), 2, "vk2", threshold="clip"),
        _step("guided", (3, 2500), (BF16, BF16), 1, "uk1", device=several),
        _step("guided-drawn", (2, 2, 33), (FP32, FP16), 0, "uvk"),
        _step("rescaled", (2, 2300), (FP32, FP32), 1, "u1", rescaled(), several),
        _step("rescaled-halves", (2, 4500), (FP16, BF16), 1, "u", rescaled(), several),
        _step("dynamic", (2, 2100), (FP32, FP32), 1, "k", threshold="dynamic", ratio=0.9),
        _step("dynamic-guided", (2, 4300), (BF16, FP16), 1, "uk1", rescaled(), several,
              threshold="dynamic", ratio=0.7),
        Case("noise-views", _views),
        Case("noise-in-place", _in_place),
        Case("noise-not-numbers", _not_numbers),
        Case("noise-ranks", _ranks),
    ]  # fmt: skip
