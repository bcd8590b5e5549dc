// The search on warpgroups (compute capability 9.0): rows in registers, codes in shared memory.
//
// Floors, for one H100 (132 multiprocessors at 1.755 GHz; wgmma reaches 780 TFLOP/s), N = 65536,
// K = 16384:
//
//   tensor     2 N K W / 780 TFLOP/s: 0.18 ms at W = 64, 0.70 ms at W = 256
//   epilogue   one maximum a score, at half rate: 0.074 ms
//   bytes      the book once for every block of 128 rows out of L2 at W = 256: 4.3 GB, 0.8 ms at
//              5.5 TB/s
//
// A warpgroup has 64 rows and keeps them in registers for good: products read only codes from
// shared memory, which at 64 codes a product takes half of its rate. Its scores of a tile of 128
// codes are two halves, and one half is folded (candidates.h) while the products of the other run.
// Codes come through a ring of stages of whole tiles, which lie in global memory as products read
// them from shared memory: 64 columns by 64 columns, 16-byte pieces permuted by the row's number.
// So one thread starts one copy a tile, and no fence has to make it seen.
//
// Half-precision rows that are searched as they are have their terms made here, from the registers.
#pragma once

#include "candidates.h"
#include "search_launch.h"
#include "search_tiles.h"

namespace vqkernels::cuda {

constexpr int kHalfTile = 64;
constexpr int kSwizzleBytes = 1024;  // what shared tiles are aligned to

// Columns are padded to kSteps tensor-core steps.
template <int kSteps>
struct WarpgroupLayout {
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kThreads = 4 * kWarp * kWarpgroups;
  static constexpr int kSlotsOfThread = 2;  // rows of which a thread holds scores
  static constexpr int kChunks = (kSteps * kStep + kChunk - 1) / kChunk;
  static constexpr int kChunkOfTile = kTileCodes * kChunkBytes;
  static constexpr int kStageBytes = kChunks * kChunkOfTile;
  static constexpr int kStages = kStageBytes < (48 << 10) ? 4 : 3;
  static constexpr int kTerms = kStages * kStageBytes;  // the tiles' terms, from here on
  static constexpr int kBarriers = kTerms + kStages * int(sizeof(Tile));
  static constexpr int kState = kBarriers + kStages * 8;
  static constexpr int kEnd = kState + CandidateState::bytes(kThreads, kSlotsOfThread);
  static constexpr int kBytes = kEnd + kSwizzleBytes;  // the start is aligned within
};

// The rows `row` and row + 8 of a warp's 16, as a thread holds them.
template <int kSteps>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kSteps][4], const Search& call,
                                          const char* x, int row) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const char* at = x + min(row + part * 8, call.rows - 1) * call.x_stride * 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int from = step * kStep + side * 8 + column;
        a[step][side * 2 + part] =
            from < call.width ? *reinterpret_cast<const uint32_t*>(at + from * 2) : 0;
      }
    }
  }
}

// Terms of one of the two rows that a thread shares with three others, as prepare_rows makes them.
template <typename Half, int kSteps>
__device__ __forceinline__ RowTerms terms_of(const uint32_t (&a)[kSteps][4], int part) {
  // All ones in an exponent: infinite or not a number.
  constexpr uint32_t kExponent = std::is_same_v<Half, __half> ? 0x7c00u : 0x7f80u;
  float squares = 0;
  int finite = 1, zero = 1;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t pair = a[step][side * 2 + part];
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const uint32_t bits = pair >> (16 * which) & 0xffffu;
        const float value = element(half_of_bits<Half>(uint16_t(bits)));
        squares = fmaf(value, value, squares);
        finite &= (bits & kExponent) != kExponent;
        zero &= (bits & 0x7fffu) == 0;
      }
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    squares += __shfl_xor_sync(kWholeWarp, squares, step);
    finite &= __shfl_xor_sync(kWholeWarp, finite, step);
    zero &= __shfl_xor_sync(kWholeWarp, zero, step);
  }
  return terms_of_halves(squares, finite != 0, zero != 0, kSteps);
}

template <typename Half, bool kScreened, int kSteps>
__global__ void __launch_bounds__(WarpgroupLayout<kSteps>::kThreads, warpgroup_blocks(kSteps))
    search_warpgroups(Search call) {
#ifdef VQKERNELS_WARPGROUPS
  using Layout = WarpgroupLayout<kSteps>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads, kStages = Layout::kStages;
  constexpr int kSlotsOfThread = Layout::kSlotsOfThread;
  VQKERNELS_DYNAMIC_SHARED(char, unaligned);
  char* shared = unaligned + (-reinterpret_cast<uintptr_t>(unaligned) & (kSwizzleBytes - 1));
  const CandidateState state{reinterpret_cast<float*>(shared + Layout::kState), kThreads,
                             kSlotsOfThread};

  const int row_blocks = (call.rows + kRows - 1) / kRows;
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % call.splits;
  const int book = blockIdx.x / row_blocks / call.splits;
  const char* x = static_cast<const char*>(call.x) + book * call.x_book * 2;
  const char* codes = static_cast<const char*>(call.codes) + book * call.code_book * 2;
  const Tile* tiles = call.tiles + int64_t(book) * call.tile_count;
  const CodeTerms* terms_of_codes =
      call.terms_of_codes + int64_t(book) * call.tile_count * kTileCodes;
  RowTerms* terms_of_rows = call.row_terms + int64_t(book) * call.rows;
  const int first_tile = split * call.tiles_per_split;
  const int end_tile = min(first_tile + call.tiles_per_split, call.tile_count);

  uint64_t* arrived = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  const auto start_load = [&](int tile) {  // by one thread
    if (tile >= end_tile) return;
    const int stage = (tile - first_tile) % kStages;
    mbarrier_arrive_expecting(arrived + stage, Layout::kStageBytes + int(sizeof(Tile)));
    bulk_copy(shared + stage * Layout::kStageBytes, codes + int64_t(tile) * Layout::kStageBytes,
              Layout::kStageBytes, arrived + stage);
    bulk_copy(shared + Layout::kTerms + stage * int(sizeof(Tile)), tiles + tile, int(sizeof(Tile)),
              arrived + stage);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) mbarrier_init(arrived + stage, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) start_load(first_tile + i);
  }

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row_of_block = warp * 16 + lane / 4;  // and 8 rows below it
  uint32_t a[kSteps][4];
  load_rows<kSteps>(a, call, x, first_row + row_of_block);
  RowTerms row_terms[kSlotsOfThread];
#pragma unroll
  for (int slot = 0; slot < kSlotsOfThread; ++slot) {
    const int row = row_of_block + slot * 8;
    if (kScreened) {
      row_terms[slot] = terms_of_rows[min(first_row + row, call.rows - 1)];
    } else {
      row_terms[slot] = terms_of<Half, kSteps>(a, slot);
      if (lane % 4 == 0 && split == 0 && first_row + row < call.rows) {
        terms_of_rows[first_row + row] = row_terms[slot];
      }
    }
  }
  const float inverse_reference = 1.0f / tiles[0].all.scale;
  float lower[kSlotsOfThread];
#pragma unroll
  for (int slot = 0; slot < kSlotsOfThread; ++slot) {
    lower[slot] = -INFINITY;
    state.clear(slot, threadIdx.x);
  }

  float scores[2][32];
  const Tile* terms_of_stage = reinterpret_cast<const Tile*>(shared + Layout::kTerms);
  const auto multiply = [&](int half, int stage) {
    const char* of_half = shared + stage * Layout::kStageBytes + half * kHalfTile * kChunkBytes;
    const Tile& tile = terms_of_stage[stage];
    uint32_t multipliers[4] = {};
#pragma unroll
    for (int slot = 0; slot < kSlotsOfThread; ++slot) {
      multipliers[slot] =
          bias_pair<Half, kScreened>(kScreened ? bias_weight(row_terms[slot], tile.all) : 1.0f);
    }
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      constexpr int kPerChunk = kChunk / kStep;
      warpgroup_mma<Half>(scores[half], a[step], of_half + step / kPerChunk * Layout::kChunkOfTile,
                          step % kPerChunk, step > 0);
    }
    warpgroup_mma_packed<Half>(scores[half], multipliers, tile.bias + bias_at(half * kHalfTile, 0));
    warpgroup_commit();
  };
  const auto fold = [&](int half, int stage, int tile) {
    settle(scores[half]);
    fold_buckets<kScreened>(
        [&](int slot, int number) { return scores[half][number / 2 * 4 + slot * 2 + number % 2]; },
        [&](int slot) { return row_terms[slot]; }, lower, terms_of_stage[stage].all,
        terms_of_codes + int64_t(tile) * kTileCodes, half * kHalfTile + lane % 4 * 2, state,
        tile * kTileCodes, inverse_reference);
  };

  // No products are left open over the loop's end: ptxas puts those whose sums are read while
  // others run in a row if it cannot see where each ends.
  int stage = 0, parity = 0;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    mbarrier_wait(arrived + stage, parity);
    multiply(0, stage);
    multiply(1, stage);
    warpgroup_wait<1>();
    fold(0, stage, tile);
    warpgroup_wait<0>();
    fold(1, stage, tile);
    __syncthreads();  // the stage has been read
    if (threadIdx.x == 0) start_load(tile + kStages);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }

#pragma unroll
  for (int slot = 0; slot < kSlotsOfThread; ++slot) state.lower(slot, threadIdx.x) = lower[slot];
  __syncthreads();
  for (int row = threadIdx.x; row < kRows && first_row + row < call.rows; row += kThreads) {
    const int64_t at = (int64_t(split) * call.books + book) * call.rows + first_row + row;
    call.records[at] = record_of<4>(
        state, row % 16 / 8, [&](int i) { return row / 16 * kWarp + row % 8 * 4 + i; },
        [](int i) { return 0x11u << i; });
  }
#endif
}

}  // namespace vqkernels::cuda
