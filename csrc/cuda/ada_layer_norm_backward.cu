// Gradients of `ada_layer_norm`, `gated_residual` and both in one pass.
//
// Floor, bytes an element, s the tokens' size: grad and x read, grad_x written: 3 s; with the gated
// sum 6 s (the stream, two gradients and the branch read, two gradients written), the gated sum
// alone 3 s. One pass: a block walks a chunk of one span's rows, each of which stays in registers,
// and keeps the sums down the columns there as well; `modulation_sums.h` adds chunks up in order. A
// chunk's length follows from the shapes alone, so sums have the same bits on every run and device.
//
// At 1152 bf16 columns three warps take a row: 12 warps of 158 registers have four rows of two
// tensors under way, 18 KB. With a branch a thread has one piece only, whose three sums and eight
// pieces, of this row and of the next, take 126 registers: five warps a row, three rows of four
// tensors a multiprocessor, 28 KB.
//
// Other rows (pieces that memory does not align, a half stream beside a branch of another dtype,
// more columns than a block holds) are read twice: sums along the rows of a chunk first.
#include "modulation_sums.h"

namespace vqkernels::cuda {
namespace {

constexpr int kMostChunk = 64, kLeastChunk = 8;  // rows
constexpr int64_t kChunks = 1024;           // shorter chunks while there would be fewer of them
constexpr int kMostBackwardColumns = 4096;  // that a block's warps hold
constexpr int kAnyThreads = 256;

// Pieces of a row that a thread holds at most, and warps of a row that are then enough.
template <typename T, bool kGated>
constexpr int kMostPieces = std::is_same_v<T, float> ? 4
                            : kGated                 ? 1
                                                     : 2;
template <typename T, bool kGated>
constexpr int kBackwardWarps = kMostBackwardColumns / (kMostPieces<T, kGated> * kPiece<T> * kWarp);
constexpr int kGatePieces = 2;
constexpr int kGateWarps = 8;

// Sums of rows, one row a chunk: fp32, or a gradient itself.
struct ChunkSums {
  Results grads, normed, gates;
};

// Adds up what the groups of a block summed, in order, and stores it as row `chunk` of `to`.
// `of_groups`: shared memory for `[groups, columns of the block]`.
template <int kPieces, int kCount>
__device__ __forceinline__ void store_sums(const Results& to, float* of_groups, unsigned chunk,
                                           int first, int width,
                                           const float (&sums)[kPieces][kCount]) {
  const int64_t row = int64_t(chunk) * width;
  if (blockDim.y == 1) {
    on_type(to.dtype, [&](auto type) {
      auto* sums_of_chunk = static_cast<typename decltype(type)::type*>(to.data) + row;
      each_piece<kPieces, kCount>(first, width, blockDim.x, [&](int i, int column) {
        store(sums_of_chunk + column, sums[i]);
      });
    });
    return;
  }
  const int columns = int(blockDim.x) * kPieces * kCount;
  __syncthreads();  // until nobody reads what was there before
  each_piece<kPieces, kCount>(0, width - first, blockDim.x, [&](int i, int column) {
    store(of_groups + threadIdx.y * columns + column, sums[i]);
  });
  __syncthreads();
  const int threads = blockDim.x * blockDim.y;
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < min(columns, width - first);
       column += threads) {
    float sum = of_groups[column];
    for (int group = 1; group < int(blockDim.y); ++group)
      sum += of_groups[group * columns + column];
    set_element(to.data, to.dtype, row + first + column, sum);
  }
}

// At least one block: unasked, the compiler aims at more, and spills.
template <typename T, int kPieces, bool kNorm, bool kGated>
__global__ void __launch_bounds__((kNorm ? kBackwardWarps<T, kGated> : kGateWarps) * kWarp, 1)
    modulate_rows_backward(ModulateBackward call, Tiles tiles, ChunkSums to) {
  constexpr int kCount = kPiece<T>, kFactor = 0, kGate = kNorm;
  constexpr int kWhole = kNorm ? kPieces - 1 : 0;
  __shared__ RowSums::Slots slots;
  VQKERNELS_DYNAMIC_SHARED(float, memory);
  const int threads = blockDim.x;  // of a row
  RowSums sum_row(slots, threads);
  const Tile tile(tiles, blockIdx.x);
  const int width = int(call.width), first = int(tile.column_block) * threads * kPieces;
  [[maybe_unused]] const float share = 1.0f / float(width);
  const auto each = [&](const auto& f) {
    each_piece<kPieces, kCount, kWhole>(first * kCount, width, threads, f);
  };

  // A row's loads are issued before the sums along the row before it are formed.
  Words grads_ahead[kPieces];
  [[maybe_unused]] Words x_ahead[kPieces], passed_ahead[kPieces], branch_ahead[kPieces];
  [[maybe_unused]] float statistics_ahead[2];
  const auto fetch = [&](unsigned token) {
    if (token >= tile.end) return;
    const auto load_row = [&](const Tokens& of, Words(&pieces)[kPieces]) {
      const T* row = row_of<T>(of, tile.sample, token);
      each([&](int i, int column) { pieces[i] = load_words(row + column); });
    };
    load_row(call.grad, grads_ahead);
    if constexpr (kNorm) {
      load_row(call.x, x_ahead);
      const float* of_row = call.statistics + 2 * (tile.sample * call.tokens + token);
      statistics_ahead[0] = of_row[0];
      statistics_ahead[1] = of_row[1];
    }
    if constexpr (kGated) load_branch<T>(call.branch, tile.sample, token, each, branch_ahead);
    if constexpr (kNorm) {
      if (call.passed.data != nullptr) load_row(call.passed, passed_ahead);
    }
  };
  fetch(tile.begin + threadIdx.y);

  SharedVectors<kCount> vectors(memory, first, width, threads, kPieces);
  if constexpr (kNorm) {
    vectors.fill(kFactor, [&](int column, float (&factor)[kCount]) {
      load_factor(call.scale, call.weight, tile, column, factor);
    });
  }
  if constexpr (kGated) {
    vectors.fill(kGate, [&](int column, float (&gate)[kCount]) {
      load_vector(call.gate, tile, column, gate);
    });
  }
  __syncthreads();

  [[maybe_unused]] float of_grads[kPieces][kCount] = {}, of_normed[kPieces][kCount] = {};
  [[maybe_unused]] float of_gates[kPieces][kCount] = {};
  for (unsigned token = tile.begin + threadIdx.y; token < tile.end; token += blockDim.y) {
    float grads[kPieces][kCount];
    [[maybe_unused]] float normed[kPieces][kCount], inverse = 0;
    [[maybe_unused]] Words passed[kPieces], branches[kPieces];
    each([&](int i, int) {
      unpack<T>(grads_ahead[i], grads[i]);
      if constexpr (kNorm) {
        unpack<T>(x_ahead[i], normed[i]);
        passed[i] = passed_ahead[i];
      }
      if constexpr (kGated) branches[i] = branch_ahead[i];
    });
    [[maybe_unused]] const float mean = kNorm ? statistics_ahead[0] : 0.0f;
    if constexpr (kNorm) inverse = statistics_ahead[1];
    fetch(token + blockDim.y);
    if constexpr (kNorm) {
      float along[2] = {0, 0};  // of h and of h n
      each([&](int i, int) {
        float factor[kCount];
        vectors.read(kFactor, i, factor);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          normed[i][e] = (normed[i][e] - mean) * inverse;
          of_grads[i][e] += grads[i][e];
          of_normed[i][e] = fmaf(grads[i][e], normed[i][e], of_normed[i][e]);
          grads[i][e] *= factor[e];  // h
          along[0] += grads[i][e];
          along[1] = fmaf(grads[i][e], normed[i][e], along[1]);
        }
      });
      sum_row(along);
      const float constant = call.centered ? along[0] * share : 0.0f;
      const float slope = along[1] * share;
      T* grad_x = row_of<T>(call.grad_x, tile.sample, token);
      each([&](int i, int column) {
        float others[kCount] = {};
        if (call.passed.data != nullptr) unpack<T>(passed[i], others);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const float centered = fmaf(normed[i][e], -slope, grads[i][e] - constant);
          grads[i][e] = fmaf(centered, inverse, others[e]);
        }
        store(grad_x + column, grads[i]);
      });
    }
    if constexpr (kGated) {
      each([&](int i, int) {
        float gate[kCount], added[kCount];
        vectors.read(kGate, i, gate);
        unpack<T>(branches[i], added);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          of_gates[i][e] = fmaf(grads[i][e], added[e], of_gates[i][e]);
          grads[i][e] *= gate[e];
        }
      });
      on_branch<T>(call.branch, [&](auto type) {
        using X = typename decltype(type)::type;
        X* grad_branch = row_of<X>(call.grad_branch, tile.sample, token);
        each([&](int i, int column) { store(grad_branch + column, grads[i]); });
      });
    }
  }
  if constexpr (kNorm) {
    store_sums(to.grads, memory, tile.index, first * kCount, width, of_grads);
    store_sums(to.normed, memory, tile.index, first * kCount, width, of_normed);
  }
  if constexpr (kGated) {
    store_sums(to.gates, memory, tile.index, first * kCount, width, of_gates);
  }
}

// Element by element, of any types: a block a chunk; all its rows first for the sums along them,
// then once more, a column a thread.
__global__ void __launch_bounds__(kAnyThreads, 1)
    modulate_any_backward(ModulateBackward call, Tiles tiles, ChunkSums to) {
  __shared__ RowSums::Slots slots;
  __shared__ float along_rows[kMostChunk][2];  // constant, slope
  RowSums sum_row(slots, blockDim.x);
  const Tile tile(tiles, blockIdx.x);
  const bool gated = call.branch.data != nullptr, normalized = call.x.data != nullptr;
  const auto at = [&](const Vectors& vectors, int64_t column) {
    return element_of(vectors.data, vectors.dtype, place(vectors, tile) + column);
  };
  const auto factor_at = [&](int64_t column) {
    const float ones = 1.0f + at(call.scale, column);
    return call.weight.data == nullptr ? ones : ones * at(call.weight, column);
  };
  const auto of = [&](const Tokens& tokens, unsigned token, int64_t column) {
    return element_of(tokens.data, tokens.dtype, place(tokens, tile.sample, token) + column);
  };
  const auto set = [&](const Tokens& tokens, unsigned token, int64_t column, float value) {
    set_element(tokens.data, tokens.dtype, place(tokens, tile.sample, token) + column, value);
  };
  const auto statistics = [&](unsigned token) {
    return call.statistics + 2 * (tile.sample * call.tokens + token);
  };

  if (normalized) {
    for (unsigned token = tile.begin; token < tile.end; ++token) {
      const float mean = statistics(token)[0], inverse = statistics(token)[1];
      float along[2] = {0, 0};
      for (int64_t column = threadIdx.x; column < call.width; column += blockDim.x) {
        const float h = of(call.grad, token, column) * factor_at(column);
        along[0] += h;
        along[1] = fmaf(h, (of(call.x, token, column) - mean) * inverse, along[1]);
      }
      sum_row(along);
      if (threadIdx.x > 0) continue;
      along_rows[token - tile.begin][0] = call.centered ? along[0] / float(call.width) : 0.0f;
      along_rows[token - tile.begin][1] = along[1] / float(call.width);
    }
    __syncthreads();
  }
  const int64_t row = tile.index * call.width;
  for (int64_t column = threadIdx.x; column < call.width; column += blockDim.x) {
    const float factor = normalized ? factor_at(column) : 0.0f;
    const float gate = gated ? at(call.gate, column) : 0.0f;
    float of_grads = 0, of_normed = 0, of_gates = 0;
    for (unsigned token = tile.begin; token < tile.end; ++token) {
      float grad = of(call.grad, token, column);
      if (normalized) {
        const float mean = statistics(token)[0], inverse = statistics(token)[1];
        const float normed = (of(call.x, token, column) - mean) * inverse;
        of_grads += grad;
        of_normed = fmaf(grad, normed, of_normed);
        const float constant = along_rows[token - tile.begin][0];
        const float slope = along_rows[token - tile.begin][1];
        grad = fmaf(normed, -slope, grad * factor - constant) * inverse;
        if (call.passed.data != nullptr) grad += of(call.passed, token, column);
        set(call.grad_x, token, column, grad);
      }
      if (gated) {
        of_gates = fmaf(grad, of(call.branch, token, column), of_gates);
        set(call.grad_branch, token, column, grad * gate);
      }
    }
    if (normalized) {
      set_element(to.grads.data, to.grads.dtype, row + column, of_grads);
      set_element(to.normed.data, to.normed.dtype, row + column, of_normed);
    }
    if (gated) set_element(to.gates.data, to.gates.dtype, row + column, of_gates);
  }
}

// Rows that one block sums: a function of the shapes alone.
int64_t chunk_rows(int64_t span, int64_t spans) {
  int64_t chunk = kMostChunk;
  while (chunk > kLeastChunk && (span + chunk - 1) / chunk * spans < kChunks) chunk /= 2;
  return chunk;
}

template <typename T, bool kNorm, bool kGated>
void launch_rows(const ModulateBackward& call, Tiles tiles, const ChunkSums& to,
                 const Context& context) {
  const int64_t pieces = call.width / kPiece<T>;
  constexpr int kMost = kNorm ? kMostPieces<T, kGated> : kGatePieces;
  Share share = share_of(pieces, kMost);
  if (!kNorm) share = {std::min(share.warps, kGateWarps), kGatePieces};
  const unsigned groups = share.warps > 1 ? 1 : std::min(unsigned(kMostGroups), tiles.rows);
  const int64_t columns = int64_t(share.warps) * kWarp * share.pieces * kPiece<T>;
  if (!kNorm) tiles.column_blocks = blocks_for(call.width, columns);
  const int64_t of_vectors = SharedVectors<kPiece<T>>::bytes(
      kNorm + kGated, std::min<int64_t>(pieces, share.warps * kWarp * share.pieces));
  const int64_t of_groups = groups > 1 ? groups * columns * int64_t(sizeof(float)) : 0;
  const int64_t shared = std::max(of_vectors, of_groups);
  const dim3 grid(tiles.count * tiles.column_blocks), block(share.warps * kWarp, groups);
  with_count<kMost>(share.pieces, [&](auto count) {
    constexpr int kPieces = decltype(count)::value;
    if constexpr (kNorm || kPieces == kGatePieces) {
      VQKERNELS_LAUNCH((modulate_rows_backward<T, kPieces, kNorm, kGated>), grid, block, shared,
                       context.stream)
      (call, tiles, to);
    }
  });
}

void launch_backward(const ModulateBackward& call, const Tiles& tiles, const ChunkSums& to,
                     const Context& context) {
  const int count = piece_of(call.grad.dtype);
  const bool gated = call.branch.data != nullptr, normalized = call.x.data != nullptr;
  if (call.width % count != 0 || (normalized && call.width > kMostBackwardColumns) ||
      !is_held_pair(call.grad.dtype, call.branch) ||
      !are_packed(
          {&call.grad, &call.x, &call.grad_x, &call.passed, &call.branch, &call.grad_branch},
          count)) {
    const unsigned threads = unsigned(std::min<int64_t>(kAnyThreads, (call.width + 31) / 32 * 32));
    VQKERNELS_LAUNCH(modulate_any_backward, dim3(tiles.count), dim3(threads), 0, context.stream)
    (call, tiles, to);
    return;
  }
  with_type(call.grad.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (normalized && gated) return launch_rows<T, true, true>(call, tiles, to, context);
    if (gated) return launch_rows<T, false, true>(call, tiles, to, context);
    launch_rows<T, true, false>(call, tiles, to, context);
  });
}

}  // namespace

void modulate_backward(const ModulateBackward& problem, const Context& context) {
  const int64_t rows = problem.batch * problem.tokens;
  if (rows * problem.width == 0) return;
  ModulateBackward call = problem;
  mark_packed({&call.gate, &call.scale, &call.weight, &call.bias}, piece_of(call.grad.dtype));
  int64_t span = 0;
  for (const VectorGradients* of : {&call.grad_gate, &call.grad_shift, &call.grad_scale}) {
    if (of->data != nullptr) span = std::gcd(span, of->each);
  }
  const Tiles tiles(call.batch, call.tokens, span, chunk_rows(span, rows / span));

  // A gradient that is one chunk's sum needs no room for sums.
  const auto sums_for = [&](const VectorGradients& of, bool alone) -> Results {
    if (of.data == nullptr) return {};
    if (alone && rows / of.each == tiles.count) return {of.data, of.dtype};
    return {context.array<float>(tiles.count * call.width), DType::f32};
  };
  const bool weighted = call.weight.data != nullptr, biased = call.bias.data != nullptr;
  const ChunkSums sums{sums_for(call.grad_shift, !biased),
                       sums_for(call.grad_scale, !weighted && !biased),
                       sums_for(call.grad_gate, true)};
  launch_backward(call, tiles, sums, context);

  AddUp all(tiles, call);
  all.add(sums.gates, call.grad_gate);
  all.add(sums.grads, call.grad_shift);
  if (Total* total = all.add(sums.normed, call.grad_scale)) {
    total->weight = call.weight;
    total->bias = call.bias;
    if (biased) total->beside = static_cast<const float*>(sums.grads.data);
  }
  if (Total* total = all.add(sums.normed, call.grad_weight)) total->scaled = true;
  if (Total* total = all.add(sums.grads, call.grad_bias)) total->scaled = true;
  all.launch(context);
}

}  // namespace vqkernels::cuda
