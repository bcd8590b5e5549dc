// What a block finds out about a whole sample before its elements take a step: standard deviations
// for rescaled guidance, and a quantile for a dynamic threshold. Elements are computed again on
// each pass over the sample; its operands come from the cache.
#pragma once

#include "denoise_terms.h"

namespace vqkernels::cuda {

constexpr int kWarps = kPieceThreads / kWarp;

// Calls f(count, first) for the pieces of a sample that are the thread's where a block has the
// whole of it; `count` is a constant: the elements of a piece, or 1 behind the last whole one.
template <int kCount, typename F>
__device__ __forceinline__ void each_of_sample(const NoiseGrid& grid, const F& f) {
#pragma unroll 1
  for (int64_t first = int64_t(threadIdx.x) * kCount; first < grid.elements;
       first += kPieceThreads * kCount) {
    each_level<kCount>(grid, first, [&](auto count, int64_t at, int64_t) { f(count, at); });
  }
}

// Sums over the block's threads, the same in each of them and on each run: warps, then the warps in
// order. Each use has slots of its own.
template <int kSums>
__device__ __forceinline__ void block_sum(double (&slots)[kWarps][kSums], double (&sums)[kSums]) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(sums[k]);
  if (threadIdx.x % kWarp == 0) {
    for (int k = 0; k < kSums; ++k) slots[threadIdx.x / kWarp][k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0;
    for (int warp = 0; warp < kWarps; ++warp) sums[k] += slots[warp][k];
  }
}

struct GuidanceSlots {
  double sums[kWarps][2], squares[kWarps][4];
};

// std(model_output) / std(guided output). Squares are of what is away from the mean, so that a mean
// far above the deviation costs no digits; a piece is summed in fp32, pieces in float64.
template <int kCount>
__device__ __forceinline__ float ratio_of_deviations(const DenoiseStep& call, const Row& row,
                                                     unsigned sample, GuidanceSlots& slots) {
  const auto each_pair = [&](const auto& f) {
    each_of_sample<kCount>(call.grid, [&](auto count, int64_t first) {
      constexpr int kNow = decltype(count)::value;
      Outputs<kNow> outputs;
      outputs.template load<true>(call, sample, first);
      float model[kNow], guided[kNow];
      outputs.model.read(call.model_output, model);
      outputs.template read<true>(call, row, 1.0f, guided);
      f(model, guided);
    });
  };
  double sums[2] = {0, 0};
  each_pair([&](const auto& model, const auto& guided) {
    float of_model = 0, of_guided = 0;
    for (float value : model) of_model += value;
    for (float value : guided) of_guided += value;
    sums[0] += of_model;
    sums[1] += of_guided;
  });
  block_sum(slots.sums, sums);
  const double count = double(call.grid.elements);
  const float means[2] = {float(sums[0] / count), float(sums[1] / count)};
  double squares[4] = {0, 0, 0, 0};
  each_pair([&](const auto& model, const auto& guided) {
    const auto add = [&](const auto& values, float mean, double& away, double& square) {
      float of_away = 0, of_square = 0;
      for (float value : values) {
        of_away += value - mean;
        of_square = fmaf(value - mean, value - mean, of_square);
      }
      away += of_away;
      square += of_square;
    };
    add(model, means[0], squares[0], squares[1]);
    add(guided, means[1], squares[2], squares[3]);
  });
  block_sum(slots.squares, squares);
  const double of_model = squares[1] - squares[0] * squares[0] / count;
  const double of_guided = squares[3] - squares[2] * squares[2] / count;
  return float(sqrt(of_model / of_guided));
}

// Where a quantile lies among a sample's elements in their order.
struct Rank {
  unsigned below;  // of the element below the quantile
  bool last;       // there is none above it
  float weight;    // of the one above

  Rank(int64_t elements, double ratio) {
    const double at = ratio * double(elements - 1);
    below = unsigned(std::min(int64_t(at), elements - 1));
    last = below + 1 == elements;
    weight = float(at - below);
  }
};

// Magnitudes are ranked by their bits, which as integers have the same order: eight bits at a time,
// by counting the elements that share the bits found so far.
struct Ranking {
  static constexpr int kBins = 256;
  unsigned counts[kBins];
  unsigned bin, before, above;
};

// Which bin holds the element of this rank, and how many elements lie before the bin: by one warp.
__device__ __forceinline__ void find_bin(Ranking& ranking, unsigned rank) {
  constexpr int kEach = Ranking::kBins / kWarp;
  const int first = int(threadIdx.x) * kEach;
  unsigned own = 0;
  for (int i = 0; i < kEach; ++i) own += ranking.counts[first + i];
  unsigned through = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned left = __shfl_up_sync(kWholeWarp, through, step);
    if (int(threadIdx.x) >= step) through += left;
  }
  unsigned before = through - own;
  if (rank < before || rank >= through) return;
  int bin = first;
  while (rank >= before + ranking.counts[bin]) before += ranking.counts[bin++];
  ranking.bin = unsigned(bin);
  ranking.before = before;
}

// A quantile of magnitudes as torch.quantile interpolates it; NaN if any is. `each` calls its
// argument with every element of the thread.
template <typename Each>
__device__ __forceinline__ float quantile(const Each& each, const Rank& of, Ranking& ranking) {
  const auto each_magnitude = [&](const auto& f) {
    each([&](float value) { f(__float_as_uint(value) << 1); });  // without the sign
  };
  if (threadIdx.x == 0) ranking.above = ~0u;
  unsigned found = 0, rank = of.below;
  bool broken = false;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < Ranking::kBins) ranking.counts[threadIdx.x] = 0;
    __syncthreads();
    each_magnitude([&](unsigned bits) {
      broken |= bits > 0xff000000u;
      const unsigned bin = (bits ^ found) >> shift;
      if (bin < unsigned(Ranking::kBins)) atomicAdd(&ranking.counts[bin], 1u);
    });
    if (__syncthreads_or(broken)) return NAN;
    if (threadIdx.x < kWarp) find_bin(ranking, rank);
    __syncthreads();
    found |= ranking.bin << shift;
    rank -= ranking.before;
  }
  unsigned next = found;
  if (!of.last && rank + 1 == ranking.counts[ranking.bin]) {  // no other is equal
    unsigned nearest = ~0u;
    each_magnitude([&](unsigned bits) {
      if (bits > found) nearest = min(nearest, bits);
    });
    atomicMin(&ranking.above, nearest);
    __syncthreads();
    next = ranking.above;
  }
  const float low = __uint_as_float(found >> 1), high = __uint_as_float(next >> 1);
  return of.weight < 0.5f ? low + of.weight * (high - low)
                          : high - (high - low) * (1.0f - of.weight);
}

// The limit of a dynamic threshold: the quantile of predictions' magnitudes, from 1 to the clip.
template <typename T>
__device__ __forceinline__ float dynamic_limit(const DenoiseStep& call, const Row& row,
                                               unsigned sample, float factor, const Rank& rank,
                                               Ranking& ranking) {
  const auto each = [&](const auto& f) {
    each_of_sample<kPiece<T>>(call.grid, [&](auto count, int64_t first) {
      constexpr int kNow = decltype(count)::value;
      Loaded<kNow> loaded;
      Outputs<kNow> outputs;
      loaded.template load_as<T>(call.sample, sample, first);
      outputs.template load<true>(call, sample, first);
      float x[kNow], output[kNow], prediction[kNow];
      loaded.template read_as<T>(x);
      outputs.template read<true>(call, row, factor, output);
      predict(row, x, output, prediction);
      for (float value : prediction) f(value);
    });
  };
  const float s = quantile(each, rank, ranking);
  return s != s ? s : fminf(fmaxf(s, 1.0f), row[kClip]);
}

}  // namespace vqkernels::cuda
