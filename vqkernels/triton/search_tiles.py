"""Nearest code with tensor cores: tiles of rows against tiles of codes, minimum in registers.

Floors, for one H100 (132 multiprocessors, 4,270 half-precision multiply-adds' flop and 128 lane
operations a cycle each, 1.755 GHz), N = 65536, K = 16384:

    tensor      2 N K D / 989 TFLOP/s: 0.14 ms at D = 64, 0.56 ms at D = 256; fp32 rows as six
                half-precision products: six times that (fp32 lanes alone: 15 times)
    epilogue    each of the N K scores costs a subtraction, a minimum, a comparison and, for its
                place, part of a selection: 3.0 (sm_100, which subtracts two at once) to 3.7
                instructions as compiled, 0.036 ms an instruction if all of them issue at full rate:
                0.11 to 0.13 ms. With two or more programs on a multiprocessor it hides behind
                another program's products.
    bytes       x and indices once, the book once for every BLOCK_N rows out of L2:
                K D 2 bytes * N / BLOCK_N = 4.3 GB at D = 256, 0.8 ms at 5.5 TB/s if nothing else
                ran; BLOCK_N = 128 keeps it level with the tensor cores.

So the minimum must stay cheap. A row's running minimum is kept in LANES lanes, one for each column
modulo LANES: 8 columns repeat in a thread of a wgmma or tcgen05 result, 16 or 32 where warps of
mma.sync stand side by side on the codes (configs.py). Within half a tile the columns of a lane are
halved until one is left, which stays inside a thread, and no shuffle is needed until the very end.
The lower index stands on the left in every comparison and wins a tie.

fp32 is exact without TF32: x = x1 + x2 + x3 and c = c1 + c2 + c3 in bf16, and the six products
that reach 2^-24 are summed in fp32, the small ones first. An estimate of the alternative, one
product of half-precision terms as a screen: if its error leaves five codes a row to check, each D
multiply-adds in fp32 and D 4 bytes out of L2, that is 0.34 GB at N = 65536, D = 256: 0.06 ms beside
a product of 0.56 ms at K = 16384, instead of 3.4 ms. But a minimum alone does not say which codes
lie within the error: the epilogue has to compare each score with the row's bound and set candidates
aside, a branch and a list in shared memory that Triton cannot express without writing the scores
out. The CUDA kernel is the place for that; here the six products stay.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.triton.rows import row_offsets, search_place, store_found

# Which terms of x and of a code make each product, two bits a pair, smallest first:
# (2, 0), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0). Two terms of x need the last five, one the last 3.
_X_OF_PAIR = tl.constexpr(0b00_00_00_01_01_10)
_CODE_OF_PAIR = tl.constexpr(0b00_01_10_00_01_00)


@triton.jit
def search_tiles(
    x,
    x_strides,
    codes,
    code_strides,
    bias,
    scale,
    indices,
    label_strides,
    scores,
    sizes,
    G,
    K,
    padded,
    D,
    splits,
    tiles_per_split,
    SCALED: tl.constexpr,
    X_TERMS: tl.constexpr,
    RESIDENT: tl.constexpr,
    WHOLE_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program: BLOCK_N rows of one book against one split's tiles of BLOCK_K codes.

    X_TERMS: 0 native products, 1 to 3 bf16 terms of x with three of each code.
    RESIDENT: D <= BLOCK_D, x stays on chip.
    SPLIT: write the best score and index of this split, to be merged; else the final index.
    """
    split, g, r = search_place(sizes, splits, BLOCK_N)
    inside_n = r < sizes[0]
    d = tl.arange(0, BLOCK_D)
    d64 = d.to(tl.int64)
    rows = x + row_offsets(g, r, sizes, x_strides)
    codes += g.to(tl.int64) * code_strides[1]
    bias += g.to(tl.int64) * padded
    scale += g.to(tl.int64) * padded

    finite = inside_n
    x_at = rows[:, None] + d64[None, :] * x_strides[4]
    if RESIDENT:
        x1, x2, x3 = _load_rows(
            x_at, x_strides[5], inside_n[:, None], (d < D)[None, :], X_TERMS, WHOLE_D
        )
        finite = finite & (_not_finite(x1) == 0)
    else:
        broken = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, D, BLOCK_D):
            inside_d = (start + d < D)[None, :]
            at = rows[:, None] + (start + d64)[None, :] * x_strides[4]
            x1 = _load(at, inside_n[:, None], inside_d, WHOLE_D)
            broken = tl.maximum(broken, _not_finite(x1))
        finite = finite & (broken == 0)

    HALF: tl.constexpr = BLOCK_K // 2
    PRODUCTS: tl.constexpr = _products_of(X_TERMS)
    best = tl.full([BLOCK_N, LANES], float("inf"), tl.float32)
    place = tl.full([BLOCK_N, LANES], -1, tl.int32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))
    for tile in range(first, last):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        # The tail reads the last code again; its bias of +inf keeps it from winning.
        code = codes + tl.minimum(k, K - 1).to(tl.int64)[None, :] * code_strides[2]
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if RESIDENT:
            at = code + d64[:, None] * code_strides[3]
            product = _products(
                product, x1, x2, x3, at, code_strides[0], (d < D)[:, None], X_TERMS, WHOLE_D
            )
        else:
            # One product a step, all chunks of D for the smallest terms first: a single product
            # in the loop is what every version of Triton overlaps with the loads.
            at = code + d64[:, None] * code_strides[3]
            chunks = tl.cdiv(D, BLOCK_D)
            for step in range(0, PRODUCTS * chunks):
                pair = step // chunks
                start = (step - pair * chunks) * BLOCK_D
                x_shift = start.to(tl.int64) * x_strides[4]
                code_shift = start.to(tl.int64) * code_strides[3]
                if X_TERMS > 0:
                    pair += 6 - PRODUCTS
                    x_shift += _term_of(_X_OF_PAIR, pair) * x_strides[5]
                    code_shift += _term_of(_CODE_OF_PAIR, pair) * code_strides[0]
                inside_d = start + d < D
                x_tile = _load(x_at + x_shift, inside_n[:, None], inside_d[None, :], WHOLE_D)
                code_tile = _load_codes(at + code_shift, inside_d[:, None], WHOLE_D)
                product = tl.dot(x_tile, code_tile, product, input_precision="ieee")
        # Half a tile at a time: fewer registers, and a tcgen05 result leaves its memory in halves.
        pair = tl.reshape(product, (BLOCK_N, 2, HALF))
        left, right = tl.split(tl.permute(pair, (0, 2, 1)))
        k0 = tile * BLOCK_K
        best, place = _fold(best, place, left, bias, scale, k0, SCALED, BLOCK_N, HALF, LANES)
        k0 += HALF
        best, place = _fold(best, place, right, bias, scale, k0, SCALED, BLOCK_N, HALF, LANES)

    lane = tl.arange(0, LANES)[None, :]
    candidate = tl.where(place >= 0, place * LANES + lane, 0x7FFFFFFF)
    score = tl.min(best, 1)
    index = tl.min(tl.where(best == score[:, None], candidate, 0x7FFFFFFF), 1)
    index = tl.where(finite & (index < K), index, -1)
    store_found(index, score, indices, label_strides, scores, sizes, split, g, r, G, SPLIT)


@triton.jit
def _load(at, inside_rows, inside_columns, WHOLE_D: tl.constexpr):
    if WHOLE_D:
        return tl.load(at, mask=inside_rows, other=0.0)
    else:
        return tl.load(at, mask=inside_rows & inside_columns, other=0.0)


@triton.jit
def _not_finite(x_tile):
    """[BLOCK_N] 1 for a row with a NaN or an infinity."""
    return tl.max(tl.where(tl.abs(x_tile.to(tl.float32)) < float("inf"), 0, 1), 1)


@triton.jit
def _load_rows(at, term, inside_rows, inside_columns, X_TERMS: tl.constexpr, WHOLE_D: tl.constexpr):
    """The terms of a tile of x; those that x does not have repeat the first and are not used."""
    x1 = _load(at, inside_rows, inside_columns, WHOLE_D)
    x2 = x1
    x3 = x1
    if X_TERMS >= 2:
        x2 = _load(at + term, inside_rows, inside_columns, WHOLE_D)
    if X_TERMS == 3:
        x3 = _load(at + term + term, inside_rows, inside_columns, WHOLE_D)
    return x1, x2, x3


@triton.jit
def _products(
    product, x1, x2, x3, at, term, inside_d, X_TERMS: tl.constexpr, WHOLE_D: tl.constexpr
):
    """product + x @ codes for one chunk of D; `at` [BLOCK_D, BLOCK_K]."""
    c1 = _load_codes(at, inside_d, WHOLE_D)
    if X_TERMS == 0:
        product = tl.dot(x1, c1, product, input_precision="ieee")
    else:
        c2 = _load_codes(at + term, inside_d, WHOLE_D)
        c3 = _load_codes(at + term + term, inside_d, WHOLE_D)
        if X_TERMS == 3:
            product = tl.dot(x3, c1, product)
        if X_TERMS >= 2:
            product = tl.dot(x2, c2, product)
            product = tl.dot(x2, c1, product)
        product = tl.dot(x1, c3, product)
        product = tl.dot(x1, c2, product)
        product = tl.dot(x1, c1, product)
    return product


@triton.jit
def _load_codes(at, inside_d, WHOLE_D: tl.constexpr):
    if WHOLE_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside_d, other=0.0)


@triton.jit
def _fold(
    best,
    place,
    product,
    bias,
    scale,
    first_k,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """Running minima after the scores of codes first_k, first_k + 1, ...; the first of equals
    stays, and a NaN never wins over a number."""
    k = first_k + tl.arange(0, BLOCK_K)
    start = tl.load(bias + k)[None, :]
    if SCALED:  # noqa: SIM108 (a constant, decided when the kernel is built)
        score = tl.fma(-product, tl.load(scale + k)[None, :], start)
    else:
        score = start - product
    value = tl.reshape(score, (BLOCK_N, BLOCK_K // LANES, LANES))
    position = tl.arange(0, BLOCK_K // LANES)[None, :, None] + tl.zeros_like(value).to(tl.int32)
    for _ in tl.static_range(_log2(BLOCK_K // LANES)):
        left, right = _halves(value)
        left_position, right_position = _halves(position)
        value = tl.minimum(left, right)
        position = tl.where(left == value, left_position, right_position)
    value = tl.reshape(value, (BLOCK_N, LANES))
    position = tl.reshape(position, (BLOCK_N, LANES))
    better = value < best
    return tl.where(better, value, best), tl.where(better, first_k // LANES + position, place)


@triton.jit
def _halves(values):
    pairs = tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2, values.shape[2]))
    return tl.split(tl.permute(pairs, (0, 1, 3, 2)))


@triton.jit
def _term_of(PAIRS: tl.constexpr, pair):
    return ((tl.full((), PAIRS, tl.int32) >> 2 * pair) & 3).to(tl.int64)


@triton.constexpr_function
def _products_of(x_terms):
    return (1, 3, 5, 6)[x_terms]


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def merge_splits(
    scores,
    split_indices,
    indices,
    label_strides,
    sizes,
    G,
    splits,
    BLOCK: tl.constexpr,
):
    """The best of all splits for each row, the first split on a tie."""
    blocks = tl.cdiv(sizes[0], BLOCK)
    g = tl.program_id(0) // blocks
    r = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = r < sizes[0]
    best = tl.full([BLOCK], float("inf"), tl.float32)
    index = tl.full([BLOCK], -1, tl.int32)
    for split in range(0, splits):
        at = (split * G + g.to(tl.int64)) * sizes[0] + r
        score = tl.load(scores + at, mask=inside, other=float("inf"))
        candidate = tl.load(split_indices + at, mask=inside, other=-1)
        better = (score < best) & (candidate >= 0)
        best = tl.where(better, score, best)
        index = tl.where(better, candidate, index)
    at = row_offsets(g, r, sizes, label_strides)
    tl.store(indices + at, index.to(tl.int64), mask=inside)
