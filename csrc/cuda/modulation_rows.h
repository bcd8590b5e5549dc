// Rows of modulated tokens as kernels hold them.
//
// Threads share a row in pieces of 16 bytes: piece i of a thread lies `blockDim.x` pieces behind
// its piece i - 1, so that neighbours read neighbouring pieces. A row belongs to the threads of one
// threadIdx.y, which are whole warps; more than one warp means one row at a time a block.
//
// A *span* is the longest run of tokens that share every vector of a call. A block works on a tile
// of one span: it puts the vectors into shared memory, as floats, once for all its rows. Registers
// that held them would halve the warps, and with them the bytes under way.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "modulation.h"
#include "pieces.h"

namespace vqkernels::cuda {

constexpr int kMostWarps = 16;      // of a row
constexpr int kMostColumns = 8192;  // three vectors of floats fit every GPU's shared memory
constexpr int kMostGroups = 4;      // rows side by side, where a warp takes a row

// A piece as it lies in memory, two halves a register, until its elements are needed.
using Words = Packed<uint32_t, 4>;

template <typename T>
__device__ __forceinline__ Words load_words(const T* from) {
  return *reinterpret_cast<const Words*>(from);
}

template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Words& words, float (&values)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(&values[e], &words.values[e], sizeof(float));
    } else {
      values[e] = element(half_of_bits<T>(uint16_t(words.values[e / 2] >> e % 2 * 16)));
    }
  }
}

// How a call's rows are divided among blocks: tiles of at most `rows` tokens of one span, times
// blocks of columns.
struct Tiles {
  unsigned tokens, length;  // of a sample, of a span
  unsigned rows, per_span;
  unsigned column_blocks = 1;
  unsigned count = 0;  // of tiles

  Tiles(int64_t batch, int64_t tokens, int64_t span, int64_t rows)
      : tokens(unsigned(tokens)),
        length(unsigned(span)),
        rows(unsigned(std::min(span, rows))),
        per_span(unsigned((span + this->rows - 1) / this->rows)),
        count(unsigned(batch * (tokens / span) * per_span)) {}
};

struct Tile {
  unsigned index, column_block;
  unsigned sample, begin, end;  // tokens of a sample

  __device__ Tile(const Tiles& tiles, unsigned block)
      : index(block / tiles.column_blocks), column_block(block % tiles.column_blocks) {
    const unsigned span = index / tiles.per_span, spans = tiles.tokens / tiles.length;
    const unsigned first = index % tiles.per_span * tiles.rows;
    const unsigned start = span % spans * tiles.length;
    sample = span / spans;
    begin = start + first;
    end = start + min(first + tiles.rows, tiles.length);
  }
};

__device__ __forceinline__ int64_t place(const Tokens& tokens, unsigned sample, unsigned token) {
  return sample * tokens.strides[0] + token * tokens.strides[1];
}

template <typename T>
__device__ __forceinline__ T* row_of(const Tokens& tokens, unsigned sample, unsigned token) {
  return static_cast<T*>(tokens.data) + place(tokens, sample, token);
}

// Calls f with the Type of a branch's elements: the stream's, or any beside a float stream.
template <typename T, typename F>
__device__ __forceinline__ void on_branch(const Tokens& branch, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    on_type(branch.dtype, f);
  } else {
    f(Type<T>());
  }
}

// Pieces of a branch's row, as the stream's type holds them without loss.
template <typename T, int kPieces, typename Each>
__device__ __forceinline__ void load_branch(const Tokens& branch, unsigned sample, unsigned token,
                                            const Each& each, Words (&pieces)[kPieces]) {
  on_branch<T>(branch, [&](auto type) {
    using X = typename decltype(type)::type;
    const X* from = row_of<X>(branch, sample, token);
    each([&](int i, int column) {
      if constexpr (std::is_same_v<T, X>) {
        pieces[i] = load_words(from + column);
      } else {
        float values[kPiece<T>];
        load(from + column, values);
        memcpy(&pieces[i], values, sizeof(values));
      }
    });
  });
}

// Where the vector begins that serves a tile.
__device__ __forceinline__ int64_t place(const Vectors& vectors, const Tile& tile) {
  return tile.sample * vectors.strides[0] +
         tile.begin / unsigned(vectors.each) * vectors.strides[1];
}

template <int kCount>
__device__ __forceinline__ void load_vector(const Vectors& vectors, const Tile& tile, int column,
                                            float (&values)[kCount]) {
  const int64_t at = place(vectors, tile) + column;
  on_type(vectors.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(vectors.data) + at;
    if (vectors.packed) {
      load(from, values);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) values[e] = element(from[e]);
    }
  });
}

// (1 + scale) * weight.
template <int kCount>
__device__ __forceinline__ void load_factor(const Vectors& scale, const Vectors& weight,
                                            const Tile& tile, int column, float (&factor)[kCount]) {
  load_vector(scale, tile, column, factor);
#pragma unroll
  for (int e = 0; e < kCount; ++e) factor[e] += 1.0f;
  if (weight.data == nullptr) return;
  float weights[kCount];
  load_vector(weight, tile, column, weights);
#pragma unroll
  for (int e = 0; e < kCount; ++e) factor[e] *= weights[e];
}

// Calls f(i, column) for this thread's pieces of a row from `first` on, which `threads` share. The
// first kWhole of them are there: of a row that `share_of` divides all but the last.
template <int kPieces, int kCount, int kWhole = 0, typename F>
__device__ __forceinline__ void each_piece(int first, int width, int threads, const F& f) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = first + (i * threads + int(threadIdx.x)) * kCount;
    if (i < kWhole || column < width) f(i, column);
  }
}

// A block's part of the vectors of a tile, as floats in dynamic shared memory. A piece lies there
// in parts of four floats, each kind and part by itself: neighbours read neighbouring 16 bytes.
template <int kCount>
class SharedVectors {
 public:
  // Of the pieces from `first` on, as many as `threads` hold of a row, `each` of them a thread.
  __device__ SharedVectors(float* memory, int first, int width, int threads, int each)
      : memory_(memory),
        first_(first),
        pieces_(min(threads * each, width / kCount - first)),
        threads_(threads) {}

  // Lets f(column, values) fill a vector: from the column on, as many as a piece has.
  template <typename F>
  __device__ __forceinline__ void fill(int kind, const F& f) {
    const int threads = blockDim.x * blockDim.y;
#pragma unroll 1
    for (int piece = threadIdx.y * blockDim.x + threadIdx.x; piece < pieces_; piece += threads) {
      float values[kCount];
      f((first_ + piece) * kCount, values);
#pragma unroll
      for (int e = 0; e < kCount; ++e) place(kind, piece, e)[e % 4] = values[e];
    }
  }

  // This thread's piece i.
  __device__ __forceinline__ void read(int kind, int i, float (&values)[kCount]) const {
    const int piece = i * threads_ + int(threadIdx.x);
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      const auto part = load_packed<4>(place(kind, piece, e));
      for (int k = 0; k < 4; ++k) values[e + k] = part.values[k];
    }
  }

  static int64_t bytes(int kinds, int64_t pieces) {
    return kinds * pieces * kCount * int64_t(sizeof(float));
  }

 private:
  __device__ __forceinline__ float* place(int kind, int piece, int element) const {
    return memory_ + ((kind * (kCount / 4) + element / 4) * pieces_ + piece) * 4;
  }

  float* memory_;
  int first_, pieces_, threads_;
};

// Sums over the threads of a row, the same in each of them. Two sets of slots take turns, so that
// one barrier a sum is enough.
class RowSums {
 public:
  using Slots = float[2][kMostWarps][2];

  __device__ RowSums(Slots& slots, int threads) : slots_(slots), warps_(threads / kWarp) {}

  template <int kSums>
  __device__ __forceinline__ void operator()(float (&sums)[kSums]) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(sums[k]);
    if (warps_ == 1) return;
    auto& slots = slots_[turn_];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) {
      for (int k = 0; k < kSums; ++k) slots[threadIdx.x / kWarp][k] = sums[k];
    }
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(lane < warps_ ? slots[lane][k] : 0.0f);
  }

 private:
  Slots& slots_;
  int warps_, turn_ = 0;
};

// Launchers' part -------------------------------------------------------------------------------

inline int64_t span_of(std::initializer_list<const Vectors*> vectors) {
  int64_t span = 0;
  for (const Vectors* of : vectors) {
    if (of->data != nullptr) span = std::gcd(span, of->each);
  }
  return span;
}

inline bool are_packed(const void* data, DType dtype, const int64_t (&strides)[2], int count) {
  const int64_t bytes = std::min(16, count * (dtype == DType::f32 ? 4 : 2));
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && strides[0] % count == 0 &&
         strides[1] % count == 0;
}

inline bool are_packed(std::initializer_list<const Tokens*> tokens, int count) {
  return std::all_of(tokens.begin(), tokens.end(), [&](const Tokens* of) {
    return of->data == nullptr || are_packed(of->data, of->dtype, of->strides, count);
  });
}

inline int piece_of(DType dtype) { return dtype == DType::f32 ? kPiece<float> : kPiece<__half>; }

inline void mark_packed(std::initializer_list<Vectors*> vectors, int count) {
  for (Vectors* of : vectors) of->packed = are_packed(of->data, of->dtype, of->strides, count);
}

// Warps that share a row of so many pieces, and pieces of a thread: few warps, as much as their
// registers take.
struct Share {
  int warps, pieces;
};

inline Share share_of(int64_t pieces_of_row, int most) {
  const int64_t warps = (pieces_of_row + kWarp * most - 1) / (kWarp * most);
  return {int(warps), int((pieces_of_row + kWarp * warps - 1) / (kWarp * warps))};
}

// Calls f with `count`, which is at most kMost, as a constant.
template <int kMost, typename F>
void with_count(int count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>());
}

// Kernels hold branches of the stream's dtype, and any beside a float stream.
inline bool is_held_pair(DType stream, const Tokens& branch) {
  return branch.data == nullptr || branch.dtype == stream || stream == DType::f32;
}

}  // namespace vqkernels::cuda
