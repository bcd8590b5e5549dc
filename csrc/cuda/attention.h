// Attention on CUDA devices, forward: a launcher over raw pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace vqkernels::cuda {

enum class MaskKind : int32_t { none = 0, boolean = 1, additive = 2 };

// A tensor `[B, H, N, d]` with neighbouring columns; strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct Attention {
  Heads q, k, v, out;    // `dim` columns each; rows begin at multiples of 16 bytes
  float* lse = nullptr;  // `[batches, heads, queries]`: the softmax's denominator, its logarithm
  Heads mask;            // bytes, or `dtype` added to the scores; any strides
  int64_t mask_column_stride = 0;
  MaskKind mask_kind = MaskKind::none;
  DType dtype = DType::bf16;
  int batches = 0, heads = 0, key_heads = 0;  // key_heads divides heads
  int queries = 0, keys = 0, dim = 0;
  float scale = 1;
  bool causal = false;  // query i sees keys 0 to i; excludes a mask
};

// Whether there is a kernel for heads of `dim` columns.
bool attention_serves(DType dtype, int64_t dim);

// Writes out and lse; zeros and -inf for a query that sees no key.
void attention(const Attention& problem, const Context& context);

}  // namespace vqkernels::cuda
