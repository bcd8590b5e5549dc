// Tiles of q, k and v in shared memory, and the two products of attention over them.
//
// A tile's rows follow each other without padding. Their 16-byte pieces are permuted by the row's
// number, so that the eight rows that ldmatrix reads at once meet every bank once: with g =
// gcd(pieces, 8) rows come back to the same banks after 8 / g of them, and each such round has a
// permutation of its own, of g neighbours. Heads of 72 columns, 9 pieces, need none.
#pragma once

#include "rows.h"
#include "tensor_core.h"

namespace vqkernels::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kWarp * kAttentionWarps;
constexpr int kRowTiles = 2;  // of 16 queries, a warp: keys and values are read once for both
constexpr int kWarpQueries = 16 * kRowTiles;
constexpr int kQueries = kWarpQueries * kAttentionWarps;  // of a block
constexpr int kHalfPiece = 8;                             // halves in 16 bytes

// Rows of a head in shared memory.
template <int kDim>
struct HeadRows {
  static_assert(kDim % kHalfPiece == 0);
  static constexpr int kPieces = kDim / kHalfPiece;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kNeighbours = kPieces % 8 == 0 ? 8 : (kPieces & -kPieces);

  // Where a piece of a row lies.
  static constexpr __host__ __device__ __forceinline__ int at(int row, int piece) {
    const int round = row / (8 / kNeighbours) % kNeighbours;
    return row * kRowBytes + ((piece ^ round) << 4);
  }
};

template <int kDim>
constexpr bool meets_every_bank_once() {
  for (int piece = 0; piece < HeadRows<kDim>::kPieces; ++piece) {
    int banks = 0;  // a bit for each 16 bytes of 128
    for (int row = 0; row < 8; ++row) banks |= 1 << (HeadRows<kDim>::at(row, piece) / 16 % 8);
    if (banks != 255) return false;
  }
  return true;
}
static_assert(meets_every_bank_once<64>() && meets_every_bank_once<72>() &&
              meets_every_bank_once<80>() && meets_every_bank_once<96>() &&
              meets_every_bank_once<128>());

// A block's shared memory: its queries, then a ring of tiles of keys and of values.
template <int kDim, bool kMasked>
struct AttentionLayout {
  // Scores and sums of both row tiles, and what a mask takes, have to fit a thread's 255 registers.
  static constexpr int kKeys = kDim <= 80 && !kMasked ? 64 : 32;  // of a tile
  static constexpr int kSlots = 128 / kKeys + 1;  // 128 rows on their way while a tile is read
  static constexpr int kQueryBytes = kQueries * HeadRows<kDim>::kRowBytes;
  static constexpr int kTileBytes = kKeys * HeadRows<kDim>::kRowBytes;
  static constexpr int kBytes = kQueryBytes + kSlots * kTileBytes;
};

// Starts the copy of pieces `[kFirst, kFirst + kCount)` of kRows rows of a head, from row `first`
// on; rows from `end` on become zeros.
template <int kDim, int kRows, int kFirst, int kCount>
__device__ __forceinline__ void copy_pieces(char* to, const char* head, int64_t row_stride,
                                            int first, int end) {
  using Tile = HeadRows<kDim>;
  constexpr int kStep = kAttentionThreads / kCount;
  static_assert(kStep % 8 == 0);  // so that a thread's rows are permuted alike
  const int begin = threadIdx.x / kCount, piece = kFirst + threadIdx.x % kCount;
  const char* from = head + ((first + begin) * row_stride + piece * kHalfPiece) * 2;
  char* into = to + Tile::at(begin, piece);
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    const int row = begin + i * kStep;
    if (kRows % kStep != 0 && row >= kRows) break;
    const bool inside = first + row < end;
    cp_async_16(into + i * kStep * Tile::kRowBytes,
                inside ? from + i * kStep * row_stride * 2 : head, inside ? 16 : 0);
  }
}

template <int kDim, int kRows>
__device__ __forceinline__ void copy_rows(char* to, const char* head, int64_t row_stride, int first,
                                          int end) {
  constexpr int kPieces = HeadRows<kDim>::kPieces;
  constexpr int kMost = kPieces < 16 ? 8 : 16;
  copy_pieces<kDim, kRows, 0, kMost>(to, head, row_stride, first, end);
  if constexpr (kPieces > kMost) {
    copy_pieces<kDim, kRows, kMost, kPieces - kMost>(to, head, row_stride, first, end);
  }
}

// Numbers of a warp's queries, as accumulators of kColumns / 8 products side by side. A thread has
// kRowTiles * 2 rows, eight apart (row_of_slot), and of each the columns 2t and 2t + 1 of every 8.
template <int kColumns>
using Sums = float[kRowTiles][kColumns / 8][4];

constexpr int kSlotsOfRows = kRowTiles * 2;

__device__ __forceinline__ int row_of_slot(int slot) {
  return slot * 8 + int(threadIdx.x % kWarp) / 4;
}

// scores += queries * keys^T, for the warp's queries.
template <typename Half, int kDim, int kKeys>
__device__ __forceinline__ void multiply_keys(Sums<kKeys>& scores, const char* queries,
                                              const char* keys) {
  using Tile = HeadRows<kDim>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    // Rows of A come as (low rows, high rows) x (low columns, high columns), keys the other way.
    uint32_t of_rows[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ldmatrix_x4(of_rows[m], queries + Tile::at(m * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int pair = 0; pair < kKeys / 16; ++pair) {
      const int key = pair * 16 + lane % 8 + lane / 16 * 8;
      uint32_t of_keys[4];
      ldmatrix_x4(of_keys, keys + Tile::at(key, step * 2 + lane / 8 % 2));
      const uint32_t low[2] = {of_keys[0], of_keys[1]}, high[2] = {of_keys[2], of_keys[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16816<Half>(scores[m][2 * pair], of_rows[m], low, scores[m][2 * pair]);
        mma_16816<Half>(scores[m][2 * pair + 1], of_rows[m], high, scores[m][2 * pair + 1]);
      }
    }
  }
  if constexpr (kDim % 16 != 0) {
    uint32_t of_rows[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ldmatrix_x2(of_rows[m], queries + Tile::at(m * 16 + lane % 16, Tile::kPieces - 1));
    }
#pragma unroll
    for (int four = 0; four < kKeys / 32; ++four) {
      uint32_t of_keys[4];
      ldmatrix_x4(of_keys, keys + Tile::at(four * 32 + lane, Tile::kPieces - 1));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float (&sums)[4] = scores[m][four * 4 + n];
          mma_1688<Half>(sums, of_rows[m], of_keys[n], sums);
        }
      }
    }
  }
}

// out += weights * values.
template <typename Half, int kDim, int kKeys>
__device__ __forceinline__ void multiply_values(Sums<kDim>& out, const Sums<kKeys>& weights,
                                                const char* values) {
  using Tile = HeadRows<kDim>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t of_rows[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = weights[m][step * 2 + i / 2];
        of_rows[m][i] = pair_of<Half>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
    const int key = step * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < Tile::kPieces / 2; ++pair) {
      uint32_t of_values[4];
      ldmatrix_x4_transposed(of_values, values + Tile::at(key, pair * 2 + lane / 16));
      const uint32_t low[2] = {of_values[0], of_values[1]};
      const uint32_t high[2] = {of_values[2], of_values[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16816<Half>(out[m][2 * pair], of_rows[m], low, out[m][2 * pair]);
        mma_16816<Half>(out[m][2 * pair + 1], of_rows[m], high, out[m][2 * pair + 1]);
      }
    }
    if constexpr (Tile::kPieces % 2 != 0) {
      constexpr int kLast = Tile::kPieces - 1;
      uint32_t of_values[2];
      ldmatrix_x2_transposed(of_values, values + Tile::at(key, kLast));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16816<Half>(out[m][kLast], of_rows[m], of_values, out[m][kLast]);
      }
    }
  }
}

}  // namespace vqkernels::cuda
