// The search: half-precision forms of rows against those of codes on tensor cores, candidates kept.
//
// Floors, for one H100 (132 multiprocessors at 1.755 GHz; mma.sync reaches about 65% of the 989
// TFLOP/s that wgmma has; 64 minima and 128 multiply-adds a cycle), N = 65536, K = 16384:
//
//   tensor     2 N K W / 640 TFLOP/s: 0.21 ms at W = 64, 0.86 ms at W = 256
//   epilogue   one maximum a score, at half rate: 0.072 ms, beside the products of the other block
//              on the multiprocessor
//   bytes      the book once for every block of rows out of L2: K W 2 bytes * N / 128, 4.3 GB at
//              W = 256, 0.8 ms at 5.5 TB/s: level with the tensor cores, half of that with 256 rows
//
// So a score costs the products and one maximum; no index is carried (candidates.h), and the bias
// is one more tensor-core step (search_terms.h).
//
// A block has 64 * kWarpsM rows and tiles of 128 codes, a warp 64 x 64 scores. Rows of up to
// kResident chunks of 64 columns stay in shared memory; chunks of codes (and of longer rows) come
// through a ring of cp.async stages that runs on across tiles. 16-byte pieces of a 128-byte row of
// shared memory are permuted by the row's number, so that ldmatrix meets no bank twice.
#pragma once

#include "candidates.h"
#include "tensor_core.h"

namespace vqkernels::cuda {

constexpr int kResident = 4;  // chunks of a row that stay in shared memory
constexpr int kWarpsN = 2;    // warps side by side over a tile's codes
constexpr int kRowSlots = 8;  // rows of which a thread holds scores
constexpr int kChunkBytes = kChunk * 2;

struct Search {
  const void* x;  // halves, `x_stride` apart, books `x_book` apart; 16-byte aligned
  int64_t x_stride, x_book;
  const void* codes;
  int64_t code_stride, code_book;
  RowTerms* row_terms;              // `[books, rows]`
  const Tile* tiles;                // `[books, tile_count]`
  const CodeTerms* terms_of_codes;  // `[books, tile_count * kTileCodes]`
  Record* records;                  // `[splits, books, rows]`
  int rows, codes_count, width, books;
  int tile_count, splits, tiles_per_split;
  // Of search_tiles alone.
  int stages;     // 2 or 3
  bool resident;  // rows stay in shared memory: at most kResident chunks
};

// Where things lie in a block's shared memory, in bytes.
template <int kWarpsM>
struct SearchLayout {
  static constexpr int kRows = 64 * kWarpsM;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;

  int chunks, resident_bytes, stage_rows, stage_tile, stage_bytes, row_terms, state, bytes;

  __host__ __device__ SearchLayout(int width, int stages, bool resident) {
    chunks = (width + kChunk - 1) / kChunk;
    resident_bytes = resident ? chunks * kRows * kChunkBytes : 0;
    stage_rows = kTileCodes * kChunkBytes;
    stage_tile = stage_rows + (resident ? 0 : kRows * kChunkBytes);
    stage_bytes = stage_tile + int(sizeof(Tile));
    row_terms = resident_bytes + stages * stage_bytes;
    state = row_terms + kRows * int(sizeof(RowTerms));
    bytes = state + CandidateState::bytes(kThreads, kRowSlots);
  }
};

// Copies columns `[chunk * kChunk, ...)` of rows `[first, first + count)` to swizzled shared
// memory. Rows from `end` on and columns from `width` on become zeros.
__device__ __forceinline__ void copy_chunk(char* to, const char* from, int64_t stride, int first,
                                           int end, int count, int chunk, int width, int threads) {
  const int columns = min(kChunk, width - chunk * kChunk);
  const int pieces = (columns + kStep - 1) / kStep * (kStep / kPiece);
  for (int i = threadIdx.x; i < count * (kChunk / kPiece); i += threads) {
    const int row = i / (kChunk / kPiece), piece = i % (kChunk / kPiece);
    if (piece >= pieces) continue;
    const int left = columns - piece * kPiece;
    const int bytes = first + row < end && left > 0 ? min(left, kPiece) * 2 : 0;
    const int64_t column = chunk * kChunk + (left > 0 ? piece * kPiece : 0);
    const char* source = from + (min(first + row, end - 1) * stride + column) * 2;
    cp_async_16(to + row * kChunkBytes + ((piece ^ (row & 7)) << 4), source, bytes);
  }
}

// What a warp multiplies in one tensor-core step: 64 rows and 64 codes.
struct Fragments {
  uint32_t rows[4][4], codes[4][4];

  // The step of the bias: `multipliers` are those of a thread's rows, eight apart.
  __device__ __forceinline__ void load_bias(const uint32_t (&multipliers)[8], const Tile& tile,
                                            int first_code) {
    const int lane = threadIdx.x % kWarp;
    const int code = first_code + lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i][0] = multipliers[2 * i];
      rows[i][1] = multipliers[2 * i + 1];
      rows[i][2] = rows[i][3] = 0;
      ldmatrix_x4(codes[i], tile.bias + bias_at(code + i * 16, column));
    }
  }

  __device__ __forceinline__ void load(const char* from_rows, const char* from_codes, int step) {
    const int lane = threadIdx.x % kWarp;
    // Rows of A come as (low rows, high rows) x (low columns, high columns), codes the other way.
    const int a_row = lane % 16, a_piece = step * 2 + lane / 16;
    const int b_row = lane % 8 + lane / 16 * 8, b_piece = step * 2 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 16 + a_row, code = i * 16 + b_row;
      ldmatrix_x4(rows[i], from_rows + row * kChunkBytes + ((a_piece ^ (row & 7)) << 4));
      ldmatrix_x4(codes[i], from_codes + code * kChunkBytes + ((b_piece ^ (code & 7)) << 4));
    }
  }

  template <typename Half>
  __device__ __forceinline__ void multiply(float (&scores)[4][8][4]) const {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t low[2] = {codes[pair][0], codes[pair][1]};
      const uint32_t high[2] = {codes[pair][2], codes[pair][3]};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        mma_16816<Half>(scores[m][2 * pair], rows[m], low, scores[m][2 * pair]);
        mma_16816<Half>(scores[m][2 * pair + 1], rows[m], high, scores[m][2 * pair + 1]);
      }
    }
  }
};

// The products of one chunk of `steps` tensor-core steps, added to a warp's 64 x 64 scores. Where
// the chunk is whole, a step's fragments are on their way during the step before.
template <typename Half>
__device__ __forceinline__ void multiply_chunk(float (&scores)[4][8][4], const char* rows,
                                               const char* codes, int steps) {
  constexpr int kSteps = kChunk / kStep;
  if (steps < kSteps) {
    for (int step = 0; step < steps; ++step) {
      Fragments fragments;
      fragments.load(rows, codes, step);
      fragments.multiply<Half>(scores);
    }
    return;
  }
  Fragments fragments[2];
  fragments[0].load(rows, codes, 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) fragments[(step + 1) % 2].load(rows, codes, step + 1);
    fragments[step % 2].multiply<Half>(scores);
  }
}

// A chunk of a tile on its way through the ring of stages.
struct Position {
  int tile, chunk = 0, stage = 0;

  __device__ __forceinline__ void advance(int chunks, int stages) {
    stage = stage + 1 == stages ? 0 : stage + 1;
    if (++chunk < chunks) return;
    chunk = 0;
    ++tile;
  }
};

template <typename Half, bool kScreened, int kWarpsM>
__global__ void __launch_bounds__(kWarp * kWarpsM * kWarpsN, kWarpsM == 2 ? 2 : 1)
    search_tiles(Search call) {
  using Layout = SearchLayout<kWarpsM>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads;
  VQKERNELS_DYNAMIC_SHARED(char, shared);
  const bool resident = call.resident;
  const Layout layout(call.width, call.stages, resident);
  RowTerms* row_terms = reinterpret_cast<RowTerms*>(shared + layout.row_terms);
  const CandidateState state{reinterpret_cast<float*>(shared + layout.state), kThreads, kRowSlots};

  const int row_blocks = (call.rows + kRows - 1) / kRows;
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % call.splits;
  const int book = blockIdx.x / row_blocks / call.splits;
  const char* x = static_cast<const char*>(call.x) + book * call.x_book * 2;
  const char* codes = static_cast<const char*>(call.codes) + book * call.code_book * 2;
  const Tile* tiles = call.tiles + int64_t(book) * call.tile_count;
  const CodeTerms* terms_of_codes =
      call.terms_of_codes + int64_t(book) * call.tile_count * kTileCodes;
  const int first_tile = split * call.tiles_per_split;
  const int end_tile = min(first_tile + call.tiles_per_split, call.tile_count);

  Position next{first_tile};
  const auto start_load = [&] {
    if (next.tile < end_tile) {
      char* stage = shared + layout.resident_bytes + next.stage * layout.stage_bytes;
      copy_chunk(stage, codes, call.code_stride, next.tile * kTileCodes, call.codes_count,
                 kTileCodes, next.chunk, call.width, kThreads);
      if (!resident) {
        copy_chunk(stage + layout.stage_rows, x, call.x_stride, first_row, call.rows, kRows,
                   next.chunk, call.width, kThreads);
      }
      if (next.chunk == layout.chunks - 1) {
        const char* terms = reinterpret_cast<const char*>(tiles + next.tile);
        for (int i = threadIdx.x * 16; i < int(sizeof(Tile)); i += kThreads * 16) {
          cp_async_16(stage + layout.stage_tile + i, terms + i, 16);
        }
      }
    }
    cp_async_commit();
    next.advance(layout.chunks, call.stages);
  };

  if (resident) {
    for (int chunk = 0; chunk < layout.chunks; ++chunk) {
      copy_chunk(shared + chunk * kRows * kChunkBytes, x, call.x_stride, first_row, call.rows,
                 kRows, chunk, call.width, kThreads);
    }
  }
  for (int i = 0; i < call.stages - 1; ++i) start_load();
  for (int row = threadIdx.x; row < kRows; row += kThreads) {
    const RowTerms* from = call.row_terms + int64_t(book) * call.rows;
    row_terms[row] = from[min(first_row + row, call.rows - 1)];
  }
  const float inverse_reference = 1.0f / tiles[0].all.scale;
  float lower[kRowSlots];
#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) {
    lower[slot] = -INFINITY;
    state.clear(slot, threadIdx.x);
  }

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / kWarpsN * 64, warp_code = warp % kWarpsN * 64;
  float scores[4][8][4] = {};
  for (Position now{first_tile}; now.tile < end_tile; now.advance(layout.chunks, call.stages)) {
    if (call.stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    start_load();

    const char* stage = shared + layout.resident_bytes + now.stage * layout.stage_bytes;
    const char* rows =
        resident ? shared + now.chunk * kRows * kChunkBytes : stage + layout.stage_rows;
    const int steps = (call.width - now.chunk * kChunk + kStep - 1) / kStep;
    multiply_chunk<Half>(scores, rows + warp_row * kChunkBytes, stage + warp_code * kChunkBytes,
                         steps);
    if (now.chunk < layout.chunks - 1) continue;

    const Tile& tile = *reinterpret_cast<const Tile*>(stage + layout.stage_tile);
    const auto row_of_slot = [&](int slot) { return row_terms[warp_row + slot * 8 + lane / 4]; };
    uint32_t multipliers[kRowSlots];
#pragma unroll
    for (int slot = 0; slot < kRowSlots; ++slot) {
      multipliers[slot] =
          bias_pair<Half, kScreened>(kScreened ? bias_weight(row_of_slot(slot), tile.all) : 1.0f);
    }
    Fragments of_bias;
    of_bias.load_bias(multipliers, tile, warp_code);
    of_bias.multiply<Half>(scores);
    fold_buckets<kScreened>(
        [&](int slot, int number) {
          return scores[slot / 2][number / 2][slot % 2 * 2 + number % 2];
        },
        row_of_slot, lower, tile.all, terms_of_codes + int64_t(now.tile) * kTileCodes,
        warp_code + lane % 4 * 2, state, now.tile * kTileCodes, inverse_reference);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0;
      }
    }
  }

#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) state.lower(slot, threadIdx.x) = lower[slot];
  __syncthreads();
  for (int row = threadIdx.x; row < kRows && first_row + row < call.rows; row += kThreads) {
    const int64_t at = (int64_t(split) * call.books + book) * call.rows + first_row + row;
    const auto thread_of = [&](int i) {
      return (row / 64 * kWarpsN + i / 4) * kWarp + row % 8 * 4 + i % 4;
    };
    call.records[at] =
        record_of<kSlots>(state, row % 64 / 8, thread_of, [](int i) { return 1u << i; });
  }
}

}  // namespace vqkernels::cuda
