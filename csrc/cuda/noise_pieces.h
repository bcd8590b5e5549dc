// Samples as kernels of noise reach them: a thread has a piece of 16 bytes of one sample, the
// elements of each operand at the same places, whatever their types.
#pragma once

#include <type_traits>

#include "noise.h"
#include "normals.h"
#include "pieces.h"

namespace vqkernels::cuda {

constexpr int kPieceThreads = 256;
// Blocks of a multiprocessor: unasked, the compiler aims at more, and spills.
constexpr int kPieceBlocks = 4;

// How pieces are divided among blocks: `per_sample` blocks for each `block.y` samples, whose pieces
// a row of threads has.
struct Shares {
  unsigned batch, per_sample;

  // Of the running thread; `sample` may lie behind the last.
  __device__ __forceinline__ unsigned sample() const {
    return blockIdx.x / per_sample * blockDim.y + threadIdx.y;
  }
  __device__ __forceinline__ int64_t piece() const {
    return int64_t(blockIdx.x % per_sample) * blockDim.x + threadIdx.x;
  }
};

// Elements as they lie in memory. Their type is asked for twice, when they are loaded and when they
// are read, so that loads of all operands are under way before the first is waited for.
template <int kCount>
struct Loaded {
  uint32_t words[kCount];

  template <typename T>
  __device__ __forceinline__ void load_as(const Samples& samples, unsigned sample, int64_t first) {
    const T* from = static_cast<const T*>(samples.data) + sample * samples.stride + first;
    Packed<T, kCount> packed;
    if (samples.packed) {
      packed = load_packed<kCount>(from);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) packed.values[e] = from[e];
    }
    memcpy(words, &packed, sizeof(packed));
  }

  template <typename T>
  __device__ __forceinline__ void read_as(float (&values)[kCount]) const {
    Packed<T, kCount> packed;
    memcpy(&packed, words, sizeof(packed));
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] = element(packed.values[e]);
  }

  __device__ __forceinline__ void load(const Samples& samples, unsigned sample, int64_t first) {
    on_type(samples.dtype,
            [&](auto type) { load_as<typename decltype(type)::type>(samples, sample, first); });
  }

  __device__ __forceinline__ void read(const Samples& samples, float (&values)[kCount]) const {
    on_type(samples.dtype, [&](auto type) { read_as<typename decltype(type)::type>(values); });
  }
};

template <typename T, int kCount>
__device__ __forceinline__ void store(const Samples& samples, unsigned sample, int64_t first,
                                      const float (&values)[kCount]) {
  T* to = static_cast<T*>(samples.data) + sample * samples.stride + first;
  if constexpr (kCount > 1) {
    if (samples.packed) {
      Packed<T, kCount> packed;
#pragma unroll
      for (int e = 0; e < kCount; ++e) packed.values[e] = rounded<T>(values[e]);
      uint4 words;
      memcpy(&words, &packed, sizeof(words));
      // A plain assignment is taken apart: the compiler joins it with the stores below.
      __stwb(reinterpret_cast<uint4*>(to), words);
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) to[e] = rounded<T>(values[e]);
}

__device__ __forceinline__ int64_t level_of(const NoiseGrid& grid, int64_t element) {
  if (grid.levels == 1) return 0;
  const int64_t each = grid.elements / grid.levels;
  if (grid.elements >> 32 == 0) return unsigned(element) / unsigned(each);
  return element / each;
}

// Calls f(count, first, level) for the kCount elements from `first` on: once where all are there
// and of one level, which `count` tells as a constant, else for each.
template <int kCount, typename F>
__device__ __forceinline__ void each_level(const NoiseGrid& grid, int64_t first, const F& f) {
  const int64_t end = first + kCount;
  if (end <= grid.elements) {
    const int64_t level = level_of(grid, first);
    if (grid.levels == 1 || level_of(grid, end - 1) == level) {
      return f(std::integral_constant<int, kCount>(), first, level);
    }
  }
  for (int64_t e = first; e < min(end, grid.elements); ++e) {
    f(std::integral_constant<int, 1>(), e, level_of(grid, e));
  }
}

__device__ __forceinline__ Normals normals_of(const Noise& noise, unsigned sample, int64_t step) {
  const int64_t id = noise.sample_ids == nullptr ? int64_t(sample) : noise.sample_ids[sample];
  return {uint64_t(noise.key[0]), uint32_t(id), uint32_t(noise.key[1] + step),
          uint32_t(noise.key[2])};
}

// Launchers' part -------------------------------------------------------------------------------

// Whether pieces of `count` elements may be moved at once: they lie at multiples of their size, or
// of 16 bytes.
inline bool is_packed(const Samples& of, const NoiseGrid& grid, int count) {
  const int64_t width = of.dtype == DType::f32 ? 4 : 2;
  const int64_t bytes = std::min<int64_t>(16, count * width);
  return reinterpret_cast<uintptr_t>(of.data) % bytes == 0 &&
         (grid.batch == 1 || of.stride * width % bytes == 0);
}

struct Launches {
  Shares shares;
  dim3 grid, block;
};

// A thread for each piece of `count` elements; small samples share a block if they may.
inline Launches launches_for(const NoiseGrid& of, int count, bool may_share = true) {
  const int64_t pieces = (of.elements + count - 1) / count;
  unsigned columns = kPieceThreads;
  while (may_share && columns > kWarp && columns / 2 >= pieces) columns /= 2;
  const unsigned rows = kPieceThreads / columns, per_sample = blocks_for(pieces, columns);
  const int64_t blocks = (of.batch + rows - 1) / rows * per_sample;
  if (blocks >> 31 != 0) throw std::invalid_argument("too many samples: more than 2^31 blocks");
  return {{unsigned(of.batch), per_sample}, dim3(unsigned(blocks)), dim3(columns, rows)};
}

}  // namespace vqkernels::cuda
