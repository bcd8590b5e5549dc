"""`denoise_step` against its equation, written out in float64 for one sample at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels import denoise_coefficients, denoise_step, normal_noise
from vqkernels.ops.denoise_step import COLUMNS

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
SHAPES = [(3, 4, 6, 7), (2, 1500), (5,), (2, 3)]


def table(steps: int = 3) -> Tensor:
    """Rows in which every column counts."""
    generator = torch.Generator().manual_seed(3)
    columns = {name: torch.rand(steps, generator=generator) - 0.4 for name in COLUMNS}
    columns["guidance"] = torch.tensor([2.5, 1.0, 7.0])[:steps]
    columns["clip"] = torch.tensor([0.7, 1.5, 0.9])[:steps]
    columns["prev_output"][0] = columns["extra_prediction"][1] = columns["prev_prediction"][2] = 0
    return denoise_coefficients(**columns)


def expected(
    sample: Tensor,
    output: Tensor,
    rows: Tensor,
    *,
    uncond: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    variance: Tensor | None = None,
    variance_type: str = "learned_range",
    noise: Tensor | None = None,
    threshold: str = "none",
    ratio: float = 0.995,
) -> list[Tensor]:
    """Previous sample, prediction and extra of a sample, in float64; each element has its row."""
    c = dict(zip(COLUMNS, rows.double().unbind(-1), strict=True))
    x, o = sample.double(), output.double()
    if uncond is not None:
        guided = o + (c["guidance"] - 1) * (o - uncond.double())
        rescale = c["guidance_rescale"]
        if o.numel() > 1 and (rescale != 0).any():
            guided = guided * (rescale * o.std() / guided.std() + 1 - rescale)
        o = guided
    p = c["prediction_sample"] * x + c["prediction_output"] * o
    if threshold == "clip":
        p = torch.clamp(p, -c["clip"], c["clip"])
    if threshold == "dynamic":
        s = torch.quantile(p.abs().flatten(), ratio).clamp(min=1)
        s = torch.minimum(s, c["clip"].flatten()[0])
        p = p.clamp(-s, s) / s
    sums = []
    for kind in ("prev", "extra"):
        total = c[f"{kind}_sample"] * x + c[f"{kind}_prediction"] * p + c[f"{kind}_output"] * o
        for i, entry in enumerate(history):
            total = total + c[f"{kind}_history_{i}"] * entry.double()
        sums.append(total)
    if noise is not None:
        z = noise.double()
        if variance is not None and variance_type == "learned":
            z = z * variance.double().sqrt()
        elif variance is not None:
            part = (variance.double() + 1) / 2
            low, high = c["variance_log_min"], c["variance_log_max"]
            z = z * torch.exp((low + part * (high - low)) / 2)
        sums[0] = sums[0] + c["prev_noise"] * z
    return [sums[0], p, sums[1]]


def check(sample: Tensor, output: Tensor, rows: Tensor, index: Tensor | None, **given: Any) -> None:
    """Every sample of a call against `expected`."""
    found = denoise_step(
        sample, output, rows, index=index, want_prediction=True, want_extra=True, **given
    )
    at = torch.zeros((), dtype=torch.int64) if index is None else index.clamp(0, len(rows) - 1)
    at = at.reshape(at.shape + (1,) * (sample.dim() - at.dim())).expand(sample.shape)
    noise = given.get("noise")
    if "seed" in given:
        key = {"seed": given["seed"], "stream": given.get("stream", 0)}
        drawn = [
            normal_noise(sample.shape, step=row + given.get("step", 0), **key)
            for row in range(len(rows))
        ]
        noise = torch.stack(drawn).gather(0, at[None])[0]
    for b in range(len(sample)):
        one = expected(
            sample[b],
            output[b],
            rows[at[b]],
            uncond=None if "uncond_output" not in given else given["uncond_output"][b],
            history=tuple(entry[b] for entry in given.get("history", ())),
            variance=None if "variance" not in given else given["variance"][b],
            variance_type=given.get("variance_type", "learned_range"),
            noise=None if noise is None else noise[b],
            threshold=given.get("threshold", "none"),
            ratio=given.get("ratio", 0.995),
        )
        for name, mine, true in zip(found._fields, found, one, strict=True):
            assert mine is not None
            assert mine.dtype == sample.dtype
            rounding = torch.finfo(mine.dtype).eps / 2 * true.abs() + 1e-5
            assert ((mine[b].double() - true).abs() <= rounding).all(), name


@every_capability
@pytest.mark.parametrize(("dtype", "model_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", ["none", "clip", "dynamic"])
def test_equation(
    backend: str,
    threshold: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    model_dtype: torch.dtype,
) -> None:
    def draw(to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(to)

    sample, output = draw(), draw(model_dtype)
    for index in (None, torch.tensor(2), torch.randint(0, 3, shape[:1])):
        check(sample, output, table(), index, threshold=threshold)
        check(sample, output, table(), index, threshold=threshold, seed=5, step=2, stream=3)
        check(sample, output, table(), index, history=(draw(), draw()), noise=draw())
        check(
            sample,
            output,
            table(),
            index,
            threshold=threshold,
            ratio=0.8,
            uncond_output=draw(model_dtype),
            history=(draw(), draw(), draw(), draw()),
            variance=draw(model_dtype).clamp(-1, 1),
            seed=9,
        )
        variance = torch.rand(shape).to(model_dtype)
        check(sample, output, table(), index, variance=variance, variance_type="learned", seed=9)


@every_capability
@pytest.mark.parametrize("levels", [(2, 6), (2, 1, 5), (2, 6, 5), (2, 6, 1)])
@pytest.mark.parametrize("threshold", ["none", "clip"])
def test_rows_of_tokens(backend: str, threshold: str, levels: tuple[int, ...]) -> None:
    sample, output = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    index = torch.randint(-1, 4, levels)  # some outside of the table: its ends are taken
    check(sample, output, table(), index, threshold=threshold, seed=1)


@every_capability
@pytest.mark.parametrize("elements", [1, 2, 7, 1000, 5000])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.995, 1.0])
def test_quantiles_are_exact(backend: str, elements: int, ratio: float) -> None:
    sample = torch.randn(3, elements) * 4
    sample[1] = sample[1].round()  # ties
    rows = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0)
    found = denoise_step(sample, sample, rows, threshold="dynamic", ratio=ratio).prev_sample
    s = torch.quantile(sample.abs().double(), ratio, dim=1, keepdim=True).clamp(min=1).float()
    torch.testing.assert_close(found, sample.clamp(-s, s) / s, rtol=3e-7, atol=0)


def test_quantile_of_more_than_torch_takes(native_cpu: None) -> None:
    sample = (torch.arange(2**24 + 5) % 1000 / 100)[None]
    rows = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0)
    found = denoise_step(sample, sample, rows, threshold="dynamic", ratio=0.5).prev_sample
    s = sample.sort().values[0, (2**24 + 4) // 2]
    torch.testing.assert_close(found, sample.clamp(-s, s) / s)


@every_capability
def test_dynamic_threshold_meets_nan_and_infinity(backend: str) -> None:
    sample = torch.randn(3, 50)
    sample[0, 4], sample[1, 5] = torch.nan, torch.inf
    rows = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0, clip=3.0)
    found = denoise_step(sample, sample, rows, threshold="dynamic").prev_sample
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    assert found[1, 5] == 1


@every_capability
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_rescaled_guidance_has_the_conditional_deviation(backend: str, offset: float) -> None:
    cond, uncond = torch.randn(2, 3000) + offset, torch.randn(2, 3000) + offset
    rows = denoise_coefficients(guidance=5.0, guidance_rescale=1.0, prev_output=1.0)
    found = denoise_step(cond, cond, rows, uncond_output=uncond).prev_sample
    guided = uncond.double() + 5 * (cond.double() - uncond.double())
    factor = cond.double().std(1) / guided.std(1)
    torch.testing.assert_close(found.double(), guided * factor[:, None], rtol=2e-6, atol=2e-6)


@every_capability
def test_guidance_of_one_is_the_conditional_output(backend: str) -> None:
    output, uncond = torch.randn(2, 50), torch.full((2, 50), torch.inf)
    rows = denoise_coefficients(prev_output=1.0)
    assert torch.equal(denoise_step(output, output, rows, uncond_output=uncond)[0], output)


@every_capability
def test_terms_without_coefficient_do_not_count(backend: str) -> None:
    infinite, sample = torch.full((2, 50), torch.inf), torch.randn(2, 50)
    rows = denoise_coefficients(prev_sample=0.5, prediction_sample=1.0)
    found = denoise_step(
        sample, infinite, rows, history=[infinite], noise=infinite, want_prediction=True
    )
    assert torch.equal(found.prev_sample, sample / 2)
    assert found.prediction is not None
    assert torch.equal(found.prediction, sample)
    assert found.extra is None


@every_capability
def test_operands_that_lie_apart(backend: str) -> None:
    """Halves of channels and of a batch, and other layouts."""
    shape = (2, 4, 5, 6)
    both = torch.randn(4, 8, 5, 6)
    cond, variance = both[:2].chunk(2, dim=1)
    uncond = both[2:, :4]
    sample = torch.randn(shape).to(memory_format=torch.channels_last)
    given = {"uncond_output": uncond, "variance": variance.clamp(-1, 1), "seed": 3}
    found = denoise_step(sample, cond, table(), **given)  # type: ignore[arg-type]
    dense = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in given.items()}
    same = denoise_step(sample.contiguous(), cond.contiguous(), table(), **dense)  # type: ignore[arg-type]
    assert torch.equal(found.prev_sample, same.prev_sample)


@every_capability
def test_samples_stand_alone(backend: str) -> None:
    sample, output, uncond = torch.randn(5, 33), torch.randn(5, 33), torch.randn(5, 33)
    index = torch.tensor([0, 2, 1, 0, 2])
    whole = denoise_step(
        sample, output, table(), index=index, uncond_output=uncond, seed=4, threshold="dynamic"
    )
    for i in range(5):
        one = slice(i, i + 1)
        alone = denoise_step(
            sample[one],
            output[one],
            table(),
            index=index[one],
            uncond_output=uncond[one],
            seed=4,
            sample_ids=torch.tensor([i]),
            threshold="dynamic",
        )
        assert torch.equal(alone.prev_sample, whole.prev_sample[one])


def test_threads_do_not_matter(native_cpu: None, restored_threads: None) -> None:
    sample, output = torch.randn(3, 100_001), torch.randn(3, 100_001)
    for given in ({}, {"threshold": "dynamic"}, {"uncond_output": torch.randn(3, 100_001)}):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(denoise_step(sample, output, table(), seed=1, **given)[0])  # type: ignore[arg-type]
        assert torch.equal(*results)


def test_large_results_go_past_the_caches(native_cpu: None) -> None:
    sample, output = torch.randn(3, 3_000_001), torch.randn(3, 3_000_001)
    rows = denoise_coefficients(
        prediction_sample=1.0, prediction_output=-0.5, prev_sample=0.2, prev_prediction=0.8
    )
    found = denoise_step(sample, output, rows, want_prediction=True)
    prediction = sample - 0.5 * output
    torch.testing.assert_close(found.prediction, prediction, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.prev_sample, 0.2 * sample + 0.8 * prediction, rtol=1e-6, atol=1e-6
    )


def test_out_may_be_an_operand(backend: str) -> None:
    output, entry = torch.randn(2, 3000), torch.randn(2, 3000)
    for given in (
        {},
        {"history": [entry]},
        {"uncond_output": torch.randn(2, 3000)},
        {"want_extra": True, "want_prediction": True},
    ):
        sample = torch.randn(2, 3000)
        expected_step = denoise_step(sample, output, table(), seed=1, **given)  # type: ignore[arg-type]
        found = denoise_step(sample, output, table(), seed=1, out=sample, **given)  # type: ignore[arg-type]
        assert found.prev_sample is sample
        for mine, true in zip(found, expected_step, strict=True):
            assert mine is true is None or torch.equal(mine, true)  # type: ignore[arg-type]


def test_autograd_sees_what_out_overwrote(backend: str) -> None:
    weight, sample = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    product = weight * sample
    denoise_step(sample, sample, table(), out=sample)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_empty(backend: str) -> None:
    for shape in ((0, 4), (3, 0)):
        x = torch.zeros(shape)
        for threshold in ("none", "dynamic"):
            found = denoise_step(x, x, table(), threshold=threshold, seed=1, uncond_output=x)
            assert found.prev_sample.shape == shape


def test_float64_goes_to_the_reference() -> None:
    sample, output = torch.randn(2, 9).double(), torch.randn(2, 9).double()
    found = denoise_step(sample, output, table())
    assert found.prev_sample.dtype == torch.float64
    true = expected(sample[0], output[0], table()[0].expand(9, -1))[0]
    torch.testing.assert_close(found.prev_sample[0], true, rtol=1e-12, atol=1e-12)


def test_a_compiled_loop_does_not_recompile() -> None:
    rows = table()

    @torch.compile(fullgraph=True)
    def compiled(x: Tensor, index: Tensor, seed: Tensor) -> Tensor:
        return denoise_step(x, x.tanh(), rows, index=index, seed=seed).prev_sample

    x = torch.randn(2, 30)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(10):
            index, seed = torch.tensor(step % 3), torch.tensor(step)
            plain = denoise_step(x, x.tanh(), rows, index=index, seed=step).prev_sample
            torch.testing.assert_close(compiled(x, index, seed), plain)


def test_coefficients() -> None:
    rows = denoise_coefficients(prev_sample=[1 / 3, 0.5], clip=2)
    assert rows.dtype == torch.float32
    assert rows.shape == (2, 22)
    named = dict(zip(COLUMNS, rows[0].tolist(), strict=True))
    assert named["guidance"] == 1
    assert named["clip"] == 2
    assert named["prev_sample"] == float(torch.tensor(1 / 3))
    assert math.isinf(denoise_coefficients()[0, COLUMNS.index("clip")])
    with pytest.raises(TypeError, match=r"columns are guidance, .*, got 'prev'"):
        denoise_coefficients(prev=1.0)
    with pytest.raises(ValueError, match="columns must have one length, got"):
        denoise_coefficients(prev_sample=[1, 2], prev_output=[1, 2, 3])
    with pytest.raises(ValueError, match="prev_noise must not be NaN"):
        denoise_coefficients(prev_noise=[1, math.nan])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample": torch.zeros(2, 3).long()}, TypeError, "sample must be float32"),
        ({"model_output": torch.zeros(3, 2)}, ValueError, "model_output must have sample's shape"),
        ({"coefficients": torch.zeros(2, 22).double()}, TypeError, "coefficients must be float32"),
        ({"coefficients": torch.zeros(0, 22)}, ValueError, r"coefficients must be \[T, 22\]"),
        ({"index": torch.zeros(2)}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.zeros(3).long()}, ValueError, r"index must be \[2\]"),
        (
            {"uncond_output": torch.zeros(2, 3).half()},
            TypeError,
            "uncond_output must have model_output's dtype torch.float32, got torch.float16",
        ),
        ({"history": [torch.zeros(2, 3)] * 5}, ValueError, "history must hold at most 4"),
        ({"history": [torch.zeros(2, 3).half()]}, TypeError, r"history\[0\] must have sample's"),
        ({"threshold": "static"}, ValueError, "threshold must be one of 'none'"),
        ({"ratio": 1.5}, ValueError, r"ratio must lie in \[0, 1\], got 1.5"),
        ({"variance_type": "fixed"}, ValueError, "variance_type must be one of"),
        (
            {"index": torch.zeros(2, 3).long(), "threshold": "dynamic"},
            ValueError,
            r"index must be a scalar or \[2\] with dynamic thresholds, got \[2, 3\]",
        ),
        (
            {"seed": 1, "noise": torch.zeros(2, 3)},
            ValueError,
            "give noise or seed, got both",
        ),
        ({"out": torch.zeros(2, 3).half()}, ValueError, "out must be a contiguous torch.float32"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {
        "sample": torch.zeros(2, 3),
        "model_output": torch.zeros(2, 3),
        "coefficients": table(),
    }
    with pytest.raises(error, match=message):
        denoise_step(**{**given, **arguments})  # type: ignore[arg-type]


def test_has_no_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert not vqkernels.denoise_step(x, x, table()).prev_sample.requires_grad
