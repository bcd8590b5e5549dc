// `ada_layer_norm`, `gated_residual` and both in one pass.
//
// Floor, bytes an element, s the tokens' size: s read and s written; with a gated sum 2 s read and
// 2 s written, the gated sum alone 2 s and s. Rows stay in registers between their one read and
// their one write; vectors are read once for all rows of a tile. An element takes about 10 fp32
// operations: memory decides. What has to be under way for that is about 18 KB a multiprocessor of
// an H100 (3.35 TB/s for 0.7 us), at all times: a row's loads are issued before the sums along the
// row before it are formed. At 1152 bf16 columns a warp takes a row, so that no barrier stands
// between rows, and 16 warps of 128 registers have 36 KB under way, with a branch 73 KB.
//
// Other rows (pieces that memory does not align, a half stream beside a branch of another dtype,
// more columns than a block holds) are read once from memory too, and again from the cache.
#include "modulation_rows.h"

namespace vqkernels::cuda {
namespace {

constexpr int kAnyThreads = 256;
constexpr int kMostTile = 8;      // rows of one group of a tile
constexpr int kWantedWarps = 48;  // of a multiprocessor, thrice what it holds: tiles end in turn

// Pieces of a row that a thread holds at most.
template <typename T>
constexpr int kMostPieces = std::is_same_v<T, float> ? 4 : 5;
// Warps of a row that are then enough.
template <typename T>
constexpr int kRowWarps = (kMostColumns / kPiece<T> - 1) / (kMostPieces<T> * kWarp) + 1;
constexpr int kGatePieces = 2;  // of a gated sum alone, which needs no whole rows
constexpr int kGateWarps = 8;

// The mean as rounded, what the rounding left of it, and 1 / deviation. Without what is left, rows
// whose mean is far above their deviation would lose digits.
struct Normal {
  float mean, left, inverse;

  // The means of a row's distances from `mean` and of their squares.
  __device__ Normal(float mean, float away, float squares, const Modulate& call)
      : mean(mean), left(call.centered ? away : 0.0f) {
    const float variance = squares - left * left;
    inverse = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + call.eps);  // NaN stays
  }

  __device__ void store(const Modulate& call, unsigned sample, unsigned token) const {
    float* to = call.statistics + 2 * (sample * call.tokens + token);
    to[0] = mean + left;
    to[1] = inverse;
  }

  __device__ float normed(float value) const {
    return fmaf(value - mean, inverse, -left * inverse);
  }
};

// bias * (1 + scale) + shift.
template <int kCount>
__device__ __forceinline__ void load_addend(const Modulate& call, const Tile& tile, int column,
                                            float (&addend)[kCount]) {
  load_vector(call.shift, tile, column, addend);
  if (call.bias.data == nullptr) return;
  float ones[kCount], bias[kCount];
  load_factor(call.scale, {}, tile, column, ones);
  load_vector(call.bias, tile, column, bias);
#pragma unroll
  for (int e = 0; e < kCount; ++e) addend[e] = fmaf(bias[e], ones[e], addend[e]);
}

// Of a row in registers, of whose elements each counts `share`.
template <int kPieces, int kCount, typename Each>
__device__ __forceinline__ Normal normal_of(const float (&values)[kPieces][kCount],
                                            const Each& each, float share, const Modulate& call,
                                            RowSums& sum_row) {
  float mean[1] = {0};
  if (call.centered) {
    each([&](int i, int) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) mean[0] += values[i][e];
    });
    sum_row(mean);
    mean[0] *= share;
  }
  float sums[2] = {0, 0};
  each([&](int i, int) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float away = values[i][e] - mean[0];
      sums[0] += away;
      sums[1] = fmaf(away, away, sums[1]);
    }
  });
  sum_row(sums);
  return Normal(mean[0], sums[0] * share, sums[1] * share, call);
}

enum Kind { kFactor, kAddend, kGate };  // of vectors in shared memory; a gate alone is the first

// Threads of a block at most, and blocks at least. Unasked, the compiler aims at more of them, and
// spills; blocks whose warps have a row each are few enough at 128 registers.
template <typename T, bool kOneWarp, bool kNorm>
constexpr int kMostThreads = kWarp * (kOneWarp ? kMostGroups
                                      : kNorm  ? kRowWarps<T>
                                               : kGateWarps);

template <typename T, int kPieces, bool kOneWarp, bool kNorm, bool kGated>
__global__ void __launch_bounds__(kMostThreads<T, kOneWarp, kNorm>, kOneWarp ? 4 : 1)
    modulate_rows(Modulate call, Tiles tiles) {
  constexpr int kCount = kPiece<T>, kGateKind = kNorm ? kGate : 0;
  constexpr int kWhole = kNorm ? kPieces - 1 : 0;
  __shared__ RowSums::Slots slots;
  VQKERNELS_DYNAMIC_SHARED(float, memory);
  const int threads = kOneWarp ? kWarp : int(blockDim.x);  // of a row
  RowSums sum_row(slots, threads);
  const Tile tile(tiles, blockIdx.x);
  const int width = int(call.width), first = int(tile.column_block) * threads * kPieces;
  [[maybe_unused]] const float share = 1.0f / float(width);
  const auto each = [&](const auto& f) {
    each_piece<kPieces, kCount, kWhole>(first * kCount, width, threads, f);
  };

  Words ahead[kPieces];
  [[maybe_unused]] Words branches[kPieces];
  const auto fetch = [&](unsigned token) {
    if (token >= tile.end) return;
    const T* x = row_of<T>(call.x, tile.sample, token);
    each([&](int i, int column) { ahead[i] = load_words(x + column); });
    if constexpr (kGated) load_branch<T>(call.branch, tile.sample, token, each, branches);
  };
  fetch(tile.begin + threadIdx.y);

  SharedVectors<kCount> vectors(memory, first, width, threads, kPieces);
  if constexpr (kNorm) {
    vectors.fill(kFactor, [&](int column, float (&factor)[kCount]) {
      load_factor(call.scale, call.weight, tile, column, factor);
    });
    vectors.fill(kAddend, [&](int column, float (&addend)[kCount]) {
      load_addend(call, tile, column, addend);
    });
  }
  if constexpr (kGated) {
    vectors.fill(kGateKind, [&](int column, float (&gate)[kCount]) {
      load_vector(call.gate, tile, column, gate);
    });
  }
  __syncthreads();

  for (unsigned token = tile.begin + threadIdx.y; token < tile.end; token += blockDim.y) {
    float values[kPieces][kCount];
    each([&](int i, int) { unpack<T>(ahead[i], values[i]); });
    if constexpr (kGated) {
      T* stream = row_of<T>(call.stream, tile.sample, token);
      each([&](int i, int column) {
        float gate[kCount], added[kCount];
        vectors.read(kGateKind, i, gate);
        unpack<T>(branches[i], added);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          // The rounded sum: what a reader of the stream normalizes.
          const float sum = fmaf(gate[e], added[e], values[i][e]);
          values[i][e] = element(rounded<T>(sum));
        }
        store(stream + column, values[i]);
      });
    }
    fetch(token + blockDim.y);
    if constexpr (kNorm) {
      const Normal normal = normal_of(values, each, share, call, sum_row);
      if (threadIdx.x == 0) normal.store(call, tile.sample, token);
      T* out = row_of<T>(call.out, tile.sample, token);
      each([&](int i, int column) {
        float factor[kCount], addend[kCount];
        vectors.read(kFactor, i, factor);
        vectors.read(kAddend, i, addend);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          values[i][e] = fmaf(normal.normed(values[i][e]), factor[e], addend[e]);
        }
        store(out + column, values[i]);
      });
    }
  }
}

// Element by element, of any types: a block a row, which is read from the cache once it was read.
__global__ void __launch_bounds__(kAnyThreads, 1) modulate_any(Modulate call, Tiles tiles) {
  __shared__ RowSums::Slots slots;
  RowSums sum_row(slots, blockDim.x);
  const Tile tile(tiles, blockIdx.x);
  const bool gated = call.branch.data != nullptr, normalized = call.out.data != nullptr;
  const DType dtype = call.x.dtype;
  const int64_t step = blockDim.x;
  const auto at = [&](const Vectors& vectors, int64_t column) {
    return element_of(vectors.data, vectors.dtype, place(vectors, tile) + column);
  };

  for (unsigned token = tile.begin; token < tile.end; ++token) {
    const void* source = gated ? call.stream.data : call.x.data;
    const int64_t row =
        gated ? place(call.stream, tile.sample, token) : place(call.x, tile.sample, token);
    const auto value_at = [&](int64_t column) { return element_of(source, dtype, row + column); };
    if (gated) {
      const int64_t x = place(call.x, tile.sample, token);
      const int64_t branch = place(call.branch, tile.sample, token);
      for (int64_t column = threadIdx.x; column < call.width; column += step) {
        const float added = element_of(call.branch.data, call.branch.dtype, branch + column);
        const float sum =
            fmaf(at(call.gate, column), added, element_of(call.x.data, dtype, x + column));
        set_element(call.stream.data, dtype, row + column, sum);
      }
    }
    if (!normalized) continue;
    // A thread comes back to the columns that it wrote.
    float mean[1] = {0};
    if (call.centered) {
      for (int64_t column = threadIdx.x; column < call.width; column += step) {
        mean[0] += value_at(column);
      }
      sum_row(mean);
      mean[0] /= float(call.width);
    }
    float sums[2] = {0, 0};
    for (int64_t column = threadIdx.x; column < call.width; column += step) {
      const float away = value_at(column) - mean[0];
      sums[0] += away;
      sums[1] = fmaf(away, away, sums[1]);
    }
    sum_row(sums);
    const Normal normal(mean[0], sums[0] / float(call.width), sums[1] / float(call.width), call);
    if (threadIdx.x == 0) normal.store(call, tile.sample, token);
    const int64_t out = place(call.out, tile.sample, token);
    for (int64_t column = threadIdx.x; column < call.width; column += step) {
      float factor = 1.0f + at(call.scale, column);
      float addend = at(call.shift, column);
      if (call.bias.data != nullptr) addend = fmaf(at(call.bias, column), factor, addend);
      if (call.weight.data != nullptr) factor *= at(call.weight, column);
      const float result = fmaf(normal.normed(value_at(column)), factor, addend);
      set_element(call.out.data, dtype, out + column, result);
    }
  }
}

// Rows of a tile, of blocks of so many warps: more of them share a read of the vectors, while there
// are warps enough.
int64_t tile_rows(int64_t rows, int64_t groups, int64_t warps, const Context& context) {
  const int64_t blocks = int64_t(context.device.multiprocessors) * kWantedWarps / warps;
  const int64_t of_group = rows / (std::max<int64_t>(blocks, 1) * groups);
  return groups * std::clamp<int64_t>(of_group, 1, kMostTile);
}

template <typename T, bool kNorm, bool kGated>
void launch_rows(const Modulate& call, int64_t span, const Context& context) {
  const int64_t pieces = call.width / kPiece<T>;
  constexpr int kMost = kNorm ? kMostPieces<T> : kGatePieces;
  Share share = share_of(pieces, kMost);
  if (!kNorm) share = {std::min(share.warps, kGateWarps), kGatePieces};
  const unsigned groups = share.warps > 1 ? 1 : unsigned(std::min<int64_t>(kMostGroups, span));
  const int64_t rows = call.batch * call.tokens;
  Tiles tiles(call.batch, call.tokens, span,
              tile_rows(rows, groups, share.warps * groups, context));
  if (!kNorm) tiles.column_blocks = blocks_for(pieces, share.warps * kWarp * kGatePieces);
  const dim3 grid(tiles.count * tiles.column_blocks), block(share.warps * kWarp, groups);
  const int64_t shared = SharedVectors<kPiece<T>>::bytes(
      2 * kNorm + kGated, std::min<int64_t>(pieces, share.warps * kWarp * share.pieces));
  if constexpr (kNorm) {
    with_count<kMost>(share.pieces, [&](auto count) {
      constexpr int kPieces = decltype(count)::value;
      if (share.warps == 1) {
        VQKERNELS_LAUNCH((modulate_rows<T, kPieces, true, true, kGated>), grid, block, shared,
                         context.stream)
        (call, tiles);
      } else if constexpr (kPieces > kMost / 2) {  // fewer leave nothing to a second warp
        VQKERNELS_LAUNCH((modulate_rows<T, kPieces, false, true, kGated>), grid, block, shared,
                         context.stream)
        (call, tiles);
      }
    });
  } else {
    VQKERNELS_LAUNCH((modulate_rows<T, kGatePieces, false, false, true>), grid, block, shared,
                     context.stream)
    (call, tiles);
  }
}

}  // namespace

void modulate(const Modulate& problem, const Context& context) {
  if (problem.batch * problem.tokens * problem.width == 0) return;
  Modulate call = problem;
  const int count = piece_of(call.x.dtype);
  mark_packed({&call.gate, &call.shift, &call.scale, &call.weight, &call.bias}, count);
  const int64_t span = span_of({&call.gate, &call.shift, &call.scale});
  const bool gated = call.branch.data != nullptr, normalized = call.out.data != nullptr;
  if (call.width % count != 0 || (normalized && call.width > kMostColumns) ||
      !is_held_pair(call.x.dtype, call.branch) ||
      !are_packed({&call.x, &call.branch, &call.stream, &call.out}, count)) {
    const Tiles tiles(call.batch, call.tokens, span, 1);
    const unsigned threads = unsigned(std::min<int64_t>(kAnyThreads, (call.width + 31) / 32 * 32));
    VQKERNELS_LAUNCH(modulate_any, dim3(tiles.count), dim3(threads), 0, context.stream)
    (call, tiles);
    return;
  }
  with_type(call.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (normalized && gated) return launch_rows<T, true, true>(call, span, context);
    if (gated) return launch_rows<T, false, true>(call, span, context);
    launch_rows<T, true, false>(call, span, context);
  });
}

}  // namespace vqkernels::cuda
