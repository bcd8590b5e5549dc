// Normalized and turned heads, as kernels see them. Torch-free, plain data.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace vqkernels {

// A tensor `[B, H, N, d]` whose columns lie next to each other; strides in elements.
struct HeadTensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t heads = 0, batch_stride = 0, head_stride = 0, row_stride = 0;
};

// q or k. Forward, `out` is the result; backward, it is the gradient of x, of x's dtype too, and
// `grad` is that of the result.
struct NormRopeSide {
  HeadTensor x, grad, out;
  const float* weight = nullptr;  // `[d]` or null
  float* weight_sums = nullptr;   // `[chunks, d]` or null
};

enum class Turn : int32_t { none = 0, halves = 1, pairs = 2 };

// With n the normalized row, y = n * weight and pairs (a, b) of its columns:
//
//   out    = (a cos - b sin, b cos + a sin)
//   grad_x = (h weight - mean(h weight) - n mean(h weight n)) / deviation
//
// where h is grad, turned back. Both are computed chunk by chunk: some tokens of one sample, all
// their heads.
struct NormRope {
  static constexpr int64_t kTokens = 16;  // of a chunk; fixed, since weights are summed by chunks

  NormRopeSide sides[2];
  int64_t batches = 0, tokens = 0, dim = 0;
  const float *cos = nullptr, *sin = nullptr;  // `[N, d / 2]`
  int64_t table_stride = 0;                    // from one sample's table to the next
  float eps = 0;
  bool normed = true, centered = false;
  Turn turn = Turn::none;

  int64_t chunks_each() const { return (tokens + kTokens - 1) / kTokens; }
  int64_t chunks() const { return batches * chunks_each(); }
};

}  // namespace vqkernels
