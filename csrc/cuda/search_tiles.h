// The search: half-precision forms of rows against those of codes on tensor cores, candidates kept.
//
// Floors, for one H100 (132 multiprocessors at 1.755 GHz; mma.sync reaches about 65% of the 989
// TFLOP/s that wgmma has; 64 minima and 128 multiply-adds a cycle), N = 65536, K = 16384:
//
//   tensor     2 N K W / 640 TFLOP/s: 0.21 ms at W = 64, 0.86 ms at W = 256
//   epilogue   one multiply-add and one maximum a score, the maximum at half rate: 0.072 ms. It
//   runs
//              beside the products of the other block on the multiprocessor.
//   bytes      the book once for every block of rows out of L2: K W 2 bytes * N / 128, 4.3 GB at
//              W = 256, 0.8 ms at 5.5 TB/s: level with the tensor cores, half of that with 256 rows
//
// So a score costs the products, one multiply-add and one maximum; no index is carried. For each of
// its rows a thread compares the maximum of its 16 columns of the tile with the best lower bound
// that its four threads know. Only where an upper bound reaches that (the first tiles, then about
// one tile in t) it looks at the columns one by one: it keeps the code with the largest upper
// bound, and the largest upper bound of all others. Few registers, and nothing is lost: a code that
// may be the best is either named or raises `open`.
//
// A block has 64 * kWarpsM rows and tiles of 128 codes, a warp 64 x 64 scores. Rows of up to
// kResident chunks of 64 columns stay in shared memory; chunks of codes (and of longer rows) come
// through a ring of cp.async stages that runs on across tiles. 16-byte pieces of a 128-byte row of
// shared memory are permuted by the row's number, so that ldmatrix meets no bank twice.
#pragma once

#include "search_terms.h"
#include "tensor_core.h"

namespace vqkernels::cuda {

constexpr int kChunk = 64;    // columns a stage
constexpr int kPiece = 8;     // columns of 16 bytes
constexpr int kResident = 4;  // chunks of a row that stay in shared memory
constexpr int kWarpsN = 2;    // warps side by side over a tile's codes
constexpr int kRowSlots = 8;  // rows of which a thread holds scores
constexpr int kChunkBytes = kChunk * 2;

struct Search {
  const void* x;  // halves, `x_stride` apart, books `x_book` apart; 16-byte aligned
  int64_t x_stride, x_book;
  const void* codes;
  int64_t code_stride, code_book;
  const RowTerms* row_terms;  // `[books, rows]`
  const Tile* tiles;          // `[books, tile_count]`
  Record* records;            // `[splits, books, rows]`
  int rows, codes_count, width, books;
  int tile_count, splits, tiles_per_split;
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
    bytes = state + 4 * kRowSlots * kThreads * 4;
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

// The products of one chunk of `steps` tensor-core steps, added to a warp's 64 x 64 scores.
template <typename Half>
__device__ __forceinline__ void multiply_chunk(float (&scores)[4][8][4], const char* rows,
                                               const char* codes, int steps) {
  const int lane = threadIdx.x % kWarp;
  // Rows of A come as (low rows, high rows) x (low columns, high columns), codes the other way.
  const int a_row = lane % 16, a_piece = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_piece = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kChunk / kStep; ++step) {
    if (step >= steps) break;
    uint32_t a[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int row = m * 16 + a_row, piece = step * 2 + a_piece;
      ldmatrix_x4(a[m], rows + row * kChunkBytes + ((piece ^ (row & 7)) << 4));
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t b[4];
      const int row = pair * 16 + b_row, piece = step * 2 + b_piece;
      ldmatrix_x4(b, codes + row * kChunkBytes + ((piece ^ (row & 7)) << 4));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_16816<Half>(scores[m][2 * pair], a[m], low, scores[m][2 * pair]);
        mma_16816<Half>(scores[m][2 * pair + 1], a[m], high, scores[m][2 * pair + 1]);
      }
    }
  }
}

// A thread's knowledge of its rows' candidates, in shared memory: four numbers a row and thread.
struct CandidateState {
  float* base;
  int threads;

  __device__ float& upper(int slot, int thread) const { return at(0, slot, thread); }
  __device__ float& open(int slot, int thread) const { return at(1, slot, thread); }
  __device__ float& lower(int slot, int thread) const { return at(2, slot, thread); }
  __device__ int& index(int slot, int thread) const {
    return reinterpret_cast<int&>(at(3, slot, thread));
  }

 private:
  __device__ float& at(int what, int slot, int thread) const {
    return base[(what * kRowSlots + slot) * threads + thread];
  }
};

// How far the score of one row and one code may be off, in the tile's units; +inf where the search
// must not decide. `ratio` is 2^(f-e), or 0 where the units of tile and book lie too far apart.
__device__ __forceinline__ float uncertainty(const RowTerms& row, float ratio, float bias,
                                             float norm, float error) {
  const bool in_range = ratio >= 0x1p-100f && ratio <= 0x1p100f;
  const float of_bias = fmaf(ratio * kBiasError, bias, kTiny);
  return in_range ? fmaf(row.error, norm, fmaf(row.norm, error, of_bias)) : INFINITY;
}

// Folds a tile's scores into the candidates. `scores` are products on entry; `row_terms` and
// `first_column` are those of the warp.
template <bool kScreen>
__device__ __forceinline__ void fold_tile(float (&scores)[4][8][4], float (&lower)[kRowSlots],
                                          const Tile& tile, const RowTerms* row_terms,
                                          int first_column, const CandidateState& state,
                                          int first_code, float inverse_reference) {
  const int lane = threadIdx.x % kWarp;
  first_column += lane % 4 * 2;
  const TileTerms all = tile.all;
  const float unit = all.scale * inverse_reference;
  const bool in_range = unit >= 0x1p-100f && unit <= 0x1p100f;
  const auto row_of_slot = [&](int slot) { return row_terms[slot * 8 + lane / 4]; };

  float best[kRowSlots], weight[kRowSlots];
#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) {
    best[slot] = -INFINITY;
    weight[slot] = kScreen ? fminf(row_of_slot(slot).scale * all.scale, 0x1p100f) : 1.0f;
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float bias = tile.codes[first_column + n * 8 + j].bias;
      const float factor = kScreen ? 1.0f : tile.codes[first_column + n * 8 + j].scale;
#pragma unroll
      for (int slot = 0; slot < kRowSlots; ++slot) {
        float& score = scores[slot / 2][n][slot % 2 * 2 + j];
        score = kScreen ? fmaf(-weight[slot], bias, score) : fmaf(score, factor, -bias);
        best[slot] = fmaxf(best[slot], score);
      }
    }
  }
#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) {
    const RowTerms row = row_of_slot(slot);
    const float ratio = in_range ? row.scale * all.scale : 0.0f;
    // A comparison with NaN, which an unbounded error may make, is not "below".
    const float most = best[slot] + uncertainty(row, ratio, all.bias, all.norm, all.error);
    const bool below = most * unit < lower[slot];
    if (!__any_sync(kWholeWarp, !below)) continue;

    const int thread = threadIdx.x;
    float upper = state.upper(slot, thread), open = state.open(slot, thread), low = lower[slot];
    int index = state.index(slot, thread);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = first_column + n * 8 + j;
        const CodeTerms code = tile.codes[column];
        const float score = scores[slot / 2][n][slot % 2 * 2 + j];
        const float off = uncertainty(row, ratio, code.bias, code.norm, code.error);
        float high = off < INFINITY ? (score + off) * unit : INFINITY;
        if (code.bias == INFINITY) high = -INFINITY;
        low = fmaxf(low, (score - off) * unit);
        if (high > upper) {
          open = fmaxf(open, upper);
          upper = high;
          index = first_code + column;
        } else {
          open = fmaxf(open, high);
        }
      }
    }
    state.upper(slot, thread) = upper;
    state.open(slot, thread) = open;
    state.index(slot, thread) = index;
    low = fmaxf(low, __shfl_xor_sync(kWholeWarp, low, 1));
    lower[slot] = fmaxf(low, __shfl_xor_sync(kWholeWarp, low, 2));
  }
}

// What the threads that share a row know of it, as one record.
template <int kWarpsM>
__device__ __forceinline__ Record record_of(const CandidateState& state, int row) {
  const int warp_m = row / 64, slot = row % 64 / 8, group = row % 8;
  const auto thread_of = [&](int i) {
    return (warp_m * kWarpsN + i / 4) * kWarp + group * 4 + i % 4;
  };
  Record record{-INFINITY, -INFINITY, 0, 0, {}, {}};
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    record.lower = fmaxf(record.lower, state.lower(slot, thread_of(i)));
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const float upper = state.upper(slot, thread_of(i));
    float open = state.open(slot, thread_of(i));
    if (upper >= record.lower && upper > -INFINITY) {
      if (record.count == kCandidates) open = upper;
#pragma unroll
      for (int at = 0; at < kCandidates; ++at) {
        if (at != record.count) continue;
        record.upper[at] = upper;
        record.index[at] = state.index(slot, thread_of(i));
      }
      record.count = min(record.count + 1, kCandidates);
    }
    if (open >= record.lower) record.open_slots |= 1u << i;
    record.open = fmaxf(record.open, open);
  }
  return record;
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

template <typename Half, bool kScreen, int kWarpsM>
__global__ void __launch_bounds__(kWarp * kWarpsM * kWarpsN, kWarpsM == 2 ? 2 : 1)
    search_tiles(Search call) {
  using Layout = SearchLayout<kWarpsM>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads;
  VQKERNELS_DYNAMIC_SHARED(char, shared);
  const bool resident = call.resident;
  const Layout layout(call.width, call.stages, resident);
  RowTerms* row_terms = reinterpret_cast<RowTerms*>(shared + layout.row_terms);
  const CandidateState state{reinterpret_cast<float*>(shared + layout.state), kThreads};

  const int row_blocks = (call.rows + kRows - 1) / kRows;
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % call.splits;
  const int book = blockIdx.x / row_blocks / call.splits;
  const char* x = static_cast<const char*>(call.x) + book * call.x_book * 2;
  const char* codes = static_cast<const char*>(call.codes) + book * call.code_book * 2;
  const Tile* tiles = call.tiles + int64_t(book) * call.tile_count;
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
    state.upper(slot, threadIdx.x) = -INFINITY;
    state.open(slot, threadIdx.x) = -INFINITY;
    state.index(slot, threadIdx.x) = -1;
  }

  const int warp = threadIdx.x / kWarp;
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
    fold_tile<kScreen>(scores, lower, tile, row_terms + warp_row, warp_code, state,
                       now.tile * kTileCodes, inverse_reference);
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
    call.records[at] = record_of<kWarpsM>(state, row);
  }
}

}  // namespace vqkernels::cuda
