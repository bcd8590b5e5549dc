"""`normal_noise` against its definition, element by element, and what it may not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels import normal_noise
from vqkernels.reference.normal_noise import philox4x32

every_capability = pytest.mark.every_capability
WORD = 2**32 - 1

# Known answers of the Random123 distribution's kat_vectors for philox4x32-10.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(quads: Tensor, sample: int, step: int, stream: int, seed: int) -> tuple[Tensor, ...]:
    counter = (quads, torch.tensor(sample), torch.tensor(step), torch.tensor(stream))
    key = (torch.tensor(seed & WORD), torch.tensor(seed >> 32 & WORD))
    return philox4x32(torch.broadcast_tensors(*counter), key)


def exact(elements: int, sample: int, step: int, stream: int, seed: int) -> Tensor:
    """The definition in float64."""
    w = words(torch.arange((elements + 3) // 4), sample, step, stream, seed)
    pairs = []
    for first, second in ((w[0], w[1]), (w[2], w[3])):
        radius = (-2 * torch.log((first + 1).double() / 2**32)).sqrt()
        angle = 2 * math.pi * (second.double() / 2**32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=1).flatten()[:elements]


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    found = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == answer


@every_capability
@pytest.mark.parametrize("elements", [1, 3, 4, 31, 128, 1023, 1029, 70_000])
@pytest.mark.parametrize(
    ("seed", "sample", "step", "stream"),
    [(0, 0, 0, 0), (-3, 5, 7, 9), (0x123456789ABCDEF0, 2**32 - 1, 2**32 - 1, 2**32 - 1)],
)
def test_against_the_definition(
    backend: str, elements: int, seed: int, sample: int, step: int, stream: int
) -> None:
    found = normal_noise(
        (1, elements), seed=seed, sample_ids=torch.tensor([sample]), step=step, stream=stream
    )
    error = (found[0].double() - exact(elements, sample, step, stream, seed)).abs().max()
    assert error <= 2e-6


@every_capability
@pytest.mark.parametrize("word", ["radius", "angle"])
def test_extreme_words(native_cpu: None, word: str) -> None:
    """Counters that give the largest and smallest radii and the corners of the angle."""
    quads = torch.arange(1 << 21)
    w = words(quads, 0, 0, 0, 0)
    first, second = torch.stack([w[0], w[2]]), torch.stack([w[1], w[3]])
    if word == "radius":
        ranked = first.flatten().sort().indices
    else:
        eighths = second % (1 << 29)
        ranked = torch.minimum(eighths, (1 << 29) - eighths).flatten().sort().indices
    chosen = torch.cat([ranked[:300], ranked[-300:]]) % len(quads)
    found = normal_noise((1, 4 * len(quads)), seed=0).view(-1, 4)[chosen]
    expected = exact(4 * len(quads), 0, 0, 0, 0).view(-1, 4)[chosen]
    assert (found.double() - expected).abs().max() <= 2e-6


@every_capability
def test_depends_on_its_key_alone(backend: str) -> None:
    whole = normal_noise((6, 3, 5), seed=-3, step=4)
    part = normal_noise((2, 3, 5), seed=2**64 - 3, step=4, sample_ids=torch.tensor([4, 1]))
    assert torch.equal(part, whole[[4, 1]])
    longer = normal_noise((6, 1000), seed=-3, step=4)
    assert torch.equal(longer[:, :15], whole.flatten(1))
    as_tensor = normal_noise((6, 3, 5), seed=torch.tensor(-3), step=torch.tensor([4]))
    assert torch.equal(as_tensor, whole)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(normal_noise((6, 3, 5), seed=-3, step=4, dtype=dtype), whole.to(dtype))
    for other in (
        {"seed": -2, "step": 4},
        {"seed": -3, "step": 5},
        {"seed": -3, "step": 4, "stream": 1},
    ):
        assert (normal_noise((6, 3, 5), **other) != whole).all()  # type: ignore[arg-type]


def test_threads_do_not_matter(native_cpu: None, restored_threads: None) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(normal_noise((3, 100_001), seed=1))
    assert torch.equal(*results)


def test_distribution() -> None:
    values = normal_noise((100, 10_000), seed=1).double()
    count = values.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 4 * math.sqrt(spread / count)
    ranked = torch.special.ndtr(values.flatten().sort().values)
    steps = torch.arange(count) / count
    assert (ranked - steps).abs().max() < 1.95 / math.sqrt(count)  # Kolmogorov, p = 0.001


@pytest.mark.parametrize("apart", ["sample_ids", "step", "stream", "seed"])
def test_independence(apart: str) -> None:
    def draw(number: int) -> Tensor:
        key = {"seed": 5, "step": 0, "stream": 0, "sample_ids": torch.tensor([3])}
        key[apart] = torch.tensor([number]) if apart == "sample_ids" else number
        return normal_noise((1, 200_000), **key)[0].double()  # type: ignore[arg-type]

    first, second = draw(0), draw(1)
    for a, b in ((first, second), (first[1:], first[:-1]), (first.square(), second.square())):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(len(a))


def test_out(backend: str) -> None:
    out = torch.empty(4, 5, dtype=torch.bfloat16)
    found = normal_noise((4, 5), seed=1, dtype=torch.bfloat16, out=out)
    assert found is out
    assert torch.equal(out, normal_noise((4, 5), seed=1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"out must be a contiguous torch.bfloat16 \[4, 5\]"):
        normal_noise((4, 5), seed=1, dtype=torch.bfloat16, out=torch.empty(4, 5))


def test_autograd_sees_what_out_overwrote(backend: str) -> None:
    x, out = torch.randn(4, 5, requires_grad=True), torch.ones(4, 5)
    product = x * out
    normal_noise((4, 5), seed=1, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_empty(backend: str) -> None:
    assert normal_noise((0, 3), seed=1).shape == (0, 3)
    assert normal_noise((3, 0), seed=1).shape == (3, 0)
    assert normal_noise((3,), seed=1).shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": ()}, ValueError, r"shape must be \[B, ...\]"),
        ({"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
        ({"sample_ids": torch.zeros(3)}, ValueError, r"sample_ids must be int64 \[2\], got"),
        ({"seed": 1.5}, TypeError, "seed must be an int or one int64, got float"),
        ({"step": torch.zeros(2)}, TypeError, "step must be an int or one int64"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normal_noise(**{"shape": (2, 3), "seed": 1, **arguments})  # type: ignore[arg-type]


def test_compiles() -> None:
    compiled = torch.compile(
        lambda seed, step: normal_noise((2, 6), seed=seed, step=step), fullgraph=True
    )
    for step in range(10):
        seed, number = torch.tensor(3), torch.tensor(step)
        assert torch.equal(compiled(seed, number), normal_noise((2, 6), seed=3, step=step))


def test_has_no_gradient() -> None:
    assert not vqkernels.normal_noise((2, 3), seed=1).requires_grad
