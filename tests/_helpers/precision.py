"""How far a result may be from float64, judged by how far plain PyTorch is in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_good_as_eager(out: Tensor, eager: Tensor, exact: Tensor, name: str = "") -> None:
    """Twice eager's largest error and one unit in the last place of the largest number; in fp32,
    where eager's error is a matter of luck, 2e-6 of the largest number."""
    assert out.shape == exact.shape, name
    assert out.isfinite().all() or not exact.isfinite().all(), name
    out, eager, exact = out.detach(), eager.detach(), exact.detach()
    error = (out.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max()
    allowed = allowed + torch.finfo(out.dtype).eps * exact.abs().max()
    if out.dtype == torch.float32:
        allowed = allowed.clamp(min=2e-6 * float(exact.abs().max()))
    assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def assert_rounded_once(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """One rounding to each result's dtype, of what fp32 arithmetic gave."""
    for mine, true in zip(found, exact, strict=True):
        rounding = torch.finfo(mine.dtype).eps / 2 * true.abs() + 2e-6 * true.abs().max()
        assert ((mine.double() - true).abs() <= rounding).all()


def forward_and_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """The function's results, then the gradients of its inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, list(grads)[: len(outputs)])]


def judge(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    eager: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """Results and gradients of `ours` against `eager` in the inputs' dtypes and in float64."""
    found = forward_and_backward(ours, inputs, grads)
    plain = forward_and_backward(eager, inputs, grads)
    exact = forward_and_backward(eager, [t.double() for t in inputs], [g.double() for g in grads])
    for i, (mine, low, true) in enumerate(zip(found, plain, exact, strict=True)):
        assert_as_good_as_eager(mine, low, true, f"result {i}")
