// Attention of one head, as kernels see it. Torch-free, plain data.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace vqkernels {

// Rows of numbers that lie next to each other; rows `stride` elements apart.
struct HeadRows {
  void* data = nullptr;
  int64_t stride = 0;
};

enum class MaskKind : int32_t { none = 0, boolean = 1, additive = 2 };

struct AttentionTask {
  DType dtype = DType::f32;
  HeadRows q, k, v, out;  // `[queries, dim]`, `[keys, dim]`, `[keys, value_dim]`
  int64_t queries = 0, keys = 0, dim = 0, value_dim = 0;
  float scale = 1;
  bool causal = false;  // query i sees keys 0 to i
  MaskKind mask_kind = MaskKind::none;
  const void* mask = nullptr;  // bool, or the dtype's numbers, added to the scaled scores
  int64_t mask_row = 0, mask_col = 0;
  float* lse = nullptr;  // `[queries]`: log of the softmax's denominator; -inf without a key
  int64_t query_begin = 0, query_end = 0;
  // A weight whose 16-bit number is below `drop_below` is dropped, others times `kept_factor`.
  uint32_t drop_below = 0;  // 0 for no dropout
  float kept_factor = 1;
  uint64_t seed = 0;
  uint32_t head_number = 0;  // among all heads of all samples
};

// The gradients of the query heads that share one key head, from some of its keys:
//
//   p = exp(scale q.k - lse)    ds = p (grad v^T - delta) scale    delta = sum of grad * out
//   dv = p^T grad               dk = ds^T q                        dq = ds k
//
// With dropout, p in dv and grad v^T are each times the weight's factor.
struct AttentionBackwardTask {
  const AttentionTask* heads = nullptr;  // `[count]`, with out and lse, all with the same k and v
  const HeadRows* grads = nullptr;       // `[count]`, of their outputs
  int64_t count = 0;
  int64_t key_begin = 0, key_end = 0;
  HeadRows dk, dv;      // rows of all keys, the dtype's numbers
  float* dq = nullptr;  // `[count, queries, dim]`: what these keys give
};

// dq of one head: what several tasks gave, added in order.
struct AttentionQuerySums {
  DType dtype = DType::f32;
  const float* parts = nullptr;  // `[count, queries, dim]`, `apart` numbers apart
  int64_t count = 0, apart = 0;
  int64_t queries = 0, dim = 0;
  HeadRows dq;
};

}  // namespace vqkernels
