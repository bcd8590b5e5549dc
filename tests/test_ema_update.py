"""`ema_update` against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqkernels import code_statistics, ema_update, nearest_code


def state(*books: int, codes: int = 9, dim: int = 4) -> list[Tensor]:
    """codebook, cluster_size, embed_sum, counts, sums."""
    sizes, sums = torch.rand(*books, codes) * 5, torch.randn(*books, codes, dim)
    counts = torch.randint(0, 6, (*books, codes)).float()
    return [torch.randn(*books, codes, dim), sizes, sums, counts, torch.randn(*books, codes, dim)]


def formula(
    size: Tensor, total: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    size, total, counts, sums = (t.double() for t in (size, total, counts, sums))
    size = decay * size + (1 - decay) * counts
    total = decay * total + (1 - decay) * sums
    everything = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (everything + size.shape[-1] * eps) * everything
    return total / smoothed[..., None], size, total


@pytest.mark.every_capability
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("books", [(), (1,), (3,)])
def test_formula(
    backend: str, books: tuple[int, ...], eps: float, decay: float, as_tensor: bool
) -> None:
    tensors = state(*books)
    before = [t.clone() for t in tensors]
    given = torch.tensor(decay) if as_tensor else decay
    results = ema_update(*tensors, decay=given, eps=eps)
    for result, expected in zip(results, formula(*tensors[1:], decay, eps), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    pointers = {t.data_ptr() for t in tensors}
    assert not pointers & {t.data_ptr() for t in results}


def test_a_code_that_was_never_chosen_stays_finite(backend: str) -> None:
    codebook, size, total, counts, sums = state()
    size[2], total[2], counts[2], sums[2] = 0, 0, 0, 0
    new_codebook, new_size, _ = ema_update(codebook, size, total, counts, sums, decay=0.9, eps=1e-5)
    assert new_codebook.isfinite().all()
    assert new_size[2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_codebook_keeps_its_dtype(backend: str, dtype: torch.dtype) -> None:
    codebook, *rest = state()
    new_codebook, size, total = ema_update(codebook.to(dtype), *rest, decay=0.9, eps=1e-5)
    assert (new_codebook.dtype, size.dtype, total.dtype) == (dtype, torch.float32, torch.float32)
    expected, _, _ = ema_update(codebook, *rest, decay=0.9, eps=1e-5)
    assert torch.equal(new_codebook, expected.to(dtype))


def test_it_converges_to_the_means_of_the_clusters(backend: str) -> None:
    means = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    x = means.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    codebook = means + torch.randn(3, 2)
    size, total = torch.ones(3), codebook.clone()
    for _ in range(200):
        counts, sums = code_statistics(x, nearest_code(x, codebook), 3)
        codebook, size, total = ema_update(codebook, size, total, counts, sums, decay=0.9, eps=1e-5)
    exact = torch.stack([x[i::3].mean(0) for i in range(3)])
    torch.testing.assert_close(codebook, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(size, torch.full((3,), 50.0), rtol=1e-4, atol=0)


BAD_CALLS = {
    "codebook of rank 1": (lambda c, n, s: (c[0], n, s, n, s), ValueError, "codebook"),
    "integer codebook": (lambda c, n, s: (c.int(), n, s, n, s), TypeError, "codebook.*int32"),
    "cluster_size of another shape": (
        lambda c, n, s: (c, n[:4], s, n, s),
        ValueError,
        r"cluster_size must have shape \[5\], got \[4\]",
    ),
    "embed_sum of another shape": (
        lambda c, n, s: (c, n, s[:, :2], n, s),
        ValueError,
        r"embed_sum must have shape \[5, 3\], got \[5, 2\]",
    ),
    "counts of another shape": (
        lambda c, n, s: (c, n, s, s, s),
        ValueError,
        r"counts must have shape \[5\], got \[5, 3\]",
    ),
    "sums of another shape": (lambda c, n, s: (c, n, s, n, n), ValueError, "sums must have shape"),
    "integer cluster_size": (lambda c, n, s: (c, n.long(), s, n, s), TypeError, "cluster_size"),
    "integer everything": (
        lambda c, n, s: (c, n.long(), s.long(), n.long(), s.long()),
        TypeError,
        "cluster_size.*int64",
    ),
    "integer counts": (lambda c, n, s: (c, n, s, n.long(), s), TypeError, "counts.*int64"),
    "list": (lambda c, n, s: (c, n.tolist(), s, n, s), TypeError, "cluster_size.*list"),
    "two devices": (lambda c, n, s: (c, n, s, n.to("meta"), s), ValueError, "counts.*device"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    arrange, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        ema_update(
            *arrange(torch.randn(5, 3), torch.ones(5), torch.randn(5, 3)), decay=0.9, eps=1e-5
        )


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_decay_outside_its_range(backend: str, decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay.*{decay}"):
        ema_update(*state(), decay=decay, eps=1e-5)


def test_decay_is_one_float32_value(backend: str) -> None:
    for wrong in (torch.rand(2), torch.tensor(1), torch.tensor(0.5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="decay must be"):
            ema_update(*state(), decay=wrong, eps=1e-5)
    tensors = state()
    shapes = [torch.tensor(0.5), torch.tensor([0.5]), 0.5]
    results = [ema_update(*tensors, decay=decay, eps=1e-5) for decay in shapes]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    with pytest.raises(ValueError, match=r"decay.*meta|device"):
        ema_update(*tensors, decay=torch.tensor(0.5, device="meta"), eps=1e-5)


@pytest.mark.every_capability
@pytest.mark.parametrize("books", [(), (3,)])
def test_layouts_and_threads(backend: str, restored_threads: None, books: tuple[int, ...]) -> None:
    """Views of every argument; the same bits on any number of threads."""
    dense = state(*books, codes=700, dim=33)
    strided = [torch.stack([t + 1, t], -1)[..., 1] for t in dense]
    strided[0] = dense[0].mT.contiguous().mT
    strided[4] = dense[4].mT.contiguous().mT
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [ema_update(*t, decay=0.9, eps=1e-5) for t in (dense, strided)]
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


def test_no_gradient(backend: str) -> None:
    tensors = state()
    tensors[4].requires_grad_()
    with pytest.raises(NotImplementedError, match="detach"):
        ema_update(*tensors, decay=0.9, eps=1e-5)[2].sum().backward()
