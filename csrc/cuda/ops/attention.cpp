#include "../attention.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "tensors.h"

namespace vqkernels::cuda {
namespace {

constexpr int64_t kMostRows = int64_t(1) << 30;  // of a head: numbers of rows are 32-bit

// As reference.like_queries: heads lie beside each other in memory where q has them so.
Tensor like_queries(const Tensor& q) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), columns = q.size(3);
  if (q.stride(1) >= q.stride(2))
    return empty({batch, heads, queries, columns}, q.scalar_type(), q);
  return torch::stable::transpose(empty({batch, queries, heads, columns}, q.scalar_type(), q), 1,
                                  2);
}

// `tensor`, or a copy where its rows do not lie in pieces of 16 bytes.
Tensor in_pieces(const Tensor& tensor) {
  constexpr int64_t kPiece = 16, kHalves = 8;
  bool fits = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kPiece == 0;
  for (int64_t dim = 0; fits && dim < 3; ++dim) {
    fits = tensor.size(dim) == 1 || tensor.stride(dim) % kHalves == 0;
  }
  if (fits) return tensor;
  Tensor copy = empty(leading_sizes(tensor, 4), tensor.scalar_type(), tensor);
  return torch::stable::copy_(copy, tensor);
}

Heads heads_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::tuple<Tensor, Tensor> attention_op(const Tensor& q_given, const Tensor& k_given,
                                        const Tensor& v_given,
                                        const std::optional<Tensor>& attn_mask, bool is_causal,
                                        double scale, double dropout_p,
                                        const std::optional<Tensor>&) {
  const Call call("attention", q_given);
  const DType dtype = dtype_of(q_given);
  const int64_t dim = q_given.size(3), columns = v_given.size(3), keys = k_given.size(2);
  if (!attention_serves(dtype, dim) || columns != dim) {
    throw std::invalid_argument(
        "CUDA attention takes float16 and bfloat16 with 64, 72, 80, 96 or 128 columns of q, k and "
        "v, got " +
        std::to_string(dim) + " of q and " + std::to_string(columns) + " of v");
  }
  if (dropout_p > 0) throw std::invalid_argument("CUDA attention has no dropout");
  const int64_t rows = std::max(q_given.size(2), keys);
  if (rows > kMostRows) {
    throw std::invalid_argument("q and k must have at most 2^30 rows a head, got " +
                                std::to_string(rows));
  }
  const Tensor out = like_queries(q_given);
  const Tensor lse = empty(leading_sizes(q_given, 3), ScalarType::Float, q_given);
  if (lse.numel() == 0) return {out, lse};
  const Tensor q = in_pieces(q_given), k = in_pieces(k_given), v = in_pieces(v_given);
  Attention problem;
  problem.q = heads_of(q);
  problem.k = heads_of(k);
  problem.v = heads_of(v);
  problem.out = heads_of(out);
  problem.lse = data<float>(lse);
  if (attn_mask) {
    const bool boolean = attn_mask->scalar_type() == ScalarType::Bool;
    problem.mask = heads_of(*attn_mask);
    problem.mask_column_stride = attn_mask->stride(3);
    problem.mask_kind = boolean ? MaskKind::boolean : MaskKind::additive;
  }
  problem.dtype = dtype;
  problem.batches = int(q.size(0));
  problem.heads = int(q.size(1));
  problem.key_heads = int(k.size(1));
  problem.queries = int(q.size(2));
  problem.keys = int(keys);
  problem.dim = int(dim);
  problem.scale = float(scale);
  problem.causal = is_causal;
  attention(problem, call.context());
  call.finish();
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention_op));
}

}  // namespace
}  // namespace vqkernels::cuda
