"""Normals of counters: Philox4x32-10, then Box-Muller in fp32.

A counter (quad, sample, step, stream) serves four elements. Errors, absolute, over all words: under
1e-6, and 8e-7 more where the hardware's root is within 2^-23 only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_KEY_STEP_0 = tl.constexpr(0x9E3779B9)
_KEY_STEP_1 = tl.constexpr(0xBB67AE85)

# Of an exponent where it stands in a float's bits.
_MINUS_TWO_LN_2 = tl.constexpr(-1.3862943611198906 * 2.0**-23)
_WORD = tl.constexpr(2.0**-32)
_HALF_QUARTER = tl.constexpr(2.0**-29)


@triton.jit
def philox4x32(seed, c0, c1, c2, c3):
    """The four words of uint32 counters under an int64 seed. The sums of a key wrap."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide product instead of its halves: half the multiplications.
        p0 = c0.to(tl.uint64) * _MULTIPLIER_0
        p1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, _KEY_STEP_0, sanitize_overflow=False)
        k1 = tl.add(k1, _KEY_STEP_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def four_normals(seed, quad, sample, step, stream):
    """The normals of each counter; the words of `sample`, `step` and `stream` are scalars or go
    with `quad`, whose shape the results have."""
    zero = quad.to(tl.uint32) * 0
    w0, w1, w2, w3 = philox4x32(
        seed,
        quad.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + stream.to(tl.uint32),
    )
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normals_from(
    seed, first, sample, step, stream, SHAPE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):
    """The normals of COUNT elements behind each counter `first`, a scalar or `[R, 1]`, as `SHAPE`.
    With WIDE a thread draws eight adjacent ones, 16 bytes of halves; without it `step` may go with
    the counters."""
    if WIDE:
        quad = first.to(tl.uint32) + 2 * tl.arange(0, COUNT // 8).to(tl.uint32)
        n0, n1, n2, n3 = four_normals(seed, quad, sample, step, stream)
        m0, m1, m2, m3 = four_normals(seed, quad + 1, sample, step, stream)
        n0, n1, n2, n3 = tl.join(n0, m0), tl.join(n1, m1), tl.join(n2, m2), tl.join(n3, m3)
    else:
        quad = first.to(tl.uint32) + tl.arange(0, COUNT // 4).to(tl.uint32)
        n0, n1, n2, n3 = four_normals(seed, quad, sample, step, stream)
    # The last of what is joined changes fastest.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), SHAPE)


@triton.jit
def normals_of_elements(seed, element, sample, step, stream):
    """The normal of each element, where neighbours may differ in their step: four are drawn for
    one that is kept."""
    n0, n1, n2, n3 = four_normals(seed, element >> 2, sample, step, stream)
    place = element & 3
    low = tl.where(place == 0, n0, n1)
    high = tl.where(place == 2, n2, n3)
    return tl.where(place < 2, low, high)


@triton.jit
def _box_muller(first, second):
    radius = _radius(first)
    # In quarter turns from the nearest one, exactly: y pi / 4 with abs(y) <= 1.
    shifted = tl.add(second, 0x20000000, sanitize_overflow=False)
    quarter = shifted >> 30
    y = ((shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * _HALF_QUARTER
    square = y * y
    sine = tl.fma(square, -3.5954507824e-05, 2.4900071322e-03)
    sine = tl.fma(sine, square, -8.0745434770e-02)
    sine = y * tl.fma(sine, square, 7.8539816114e-01)
    cosine = tl.fma(square, -3.1916015918e-04, 1.5850397628e-02)
    cosine = tl.fma(cosine, square, -3.0842448792e-01)
    cosine = tl.fma(cosine, square, 1.0)
    turned = (quarter & 1) != 0
    x = tl.where(turned, sine, cosine) * tl.where(((quarter + 1) & 2) != 0, -radius, radius)
    y = tl.where(turned, cosine, sine) * tl.where((quarter & 2) != 0, -radius, radius)
    return x, y


@triton.jit
def _radius(word):
    """sqrt(-2 log(u)), u = (word + 1) / 2^32 = 2^k m with m in [sqrt(1/2), sqrt(2)): the series of
    1 - m. Where k = 0 that is 1 - u, exact from the word; u in fp32 has lost what matters there."""
    u = tl.fma(word.to(tl.float32), _WORD, _WORD)
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000
    rest = 1.0 - (bits - power).to(tl.float32, bitcast=True)
    rest = tl.where(power == 0, (word ^ 0xFFFFFFFF).to(tl.float32) * _WORD, rest)
    series = tl.fma(rest, 0.24421952, 0.37565456)
    series = tl.fma(series, rest, 0.40909512)
    series = tl.fma(series, rest, 0.49793586)
    series = tl.fma(series, rest, 0.66632059)
    series = tl.fma(series, rest, 1.00002797)
    series = tl.fma(series, rest, 2.00000175)
    return tl.sqrt(tl.fma(power.to(tl.float32), _MINUS_TWO_LN_2, series * rest))
