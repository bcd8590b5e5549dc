// Queries and keys, normalized and turned: tokens of a sample are shared among threads, with all
// their heads.
#include <tuple>

#include "row_sums.h"

namespace vqkernels {
namespace {

HeadTensor heads_of(const Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.size(1),
          tensor.stride(0),  tensor.stride(1), tensor.stride(2)};
}

// What forward and backward share, with columns that lie next to each other and all else in fp32.
struct NormRopeCall {
  NormRopeCall(const Tensor& q_given, const Tensor& k_given,
               const std::optional<Tensor>& q_weight_given,
               const std::optional<Tensor>& k_weight_given, const std::optional<Tensor>& cos_given,
               const std::optional<Tensor>& sin_given, double eps, const std::string& norm,
               bool interleaved)
      : x{dense_rows(q_given), dense_rows(k_given)},
        weights{as_floats(q_weight_given), as_floats(k_weight_given)},
        cos(as_floats(cos_given)),
        sin(as_floats(sin_given)),
        out{empty(x[0].sizes(), x[0].scalar_type(), x[0]),
            empty(x[1].sizes(), x[1].scalar_type(), x[1])} {
    for (int i = 0; i < 2; ++i) {
      task.sides[i].x = heads_of(x[i]);
      task.sides[i].out = heads_of(out[i]);
      if (weights[i]) task.sides[i].weight = data<float>(*weights[i]);
    }
    task.batches = x[0].size(0);
    task.tokens = x[0].size(2);
    task.dim = x[0].size(3);
    task.eps = float(eps);
    task.normed = norm != "none";
    task.centered = norm == "layer";
    if (!cos) return;
    task.turn = interleaved ? Turn::pairs : Turn::halves;
    task.cos = data<float>(*cos);
    task.sin = data<float>(*sin);
    if (cos->dim() == 3) task.table_stride = cos->stride(0);
  }

  template <typename F>
  void each_chunk(const F& f) const {
    const int64_t heads = task.sides[0].x.heads + task.sides[1].x.heads;
    parallel(task.chunks(), grain(std::min(task.tokens, NormRope::kTokens) * heads * task.dim), f);
  }

  Tensor x[2];
  std::optional<Tensor> weights[2], cos, sin;
  Tensor out[2];
  NormRope task;
};

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k,
                                        const std::optional<Tensor>& q_weight,
                                        const std::optional<Tensor>& k_weight,
                                        const std::optional<Tensor>& cos,
                                        const std::optional<Tensor>& sin, double eps,
                                        const std::string& norm, bool interleaved) {
  const NormRopeCall call(q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved);
  call.each_chunk(
      [&](int64_t begin, int64_t end) { kernels().qk_norm_rope(call.task, begin, end); });
  return {call.out[0], call.out[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k,
    const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps,
    const std::string& norm, bool interleaved) {
  NormRopeCall call(q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved);
  NormRope& task = call.task;
  const Tensor grads[2] = {dense_rows(grad_q), dense_rows(grad_k)};
  // One run of chunks, whose sums `modulation_sums` adds in order.
  Chunks chunks;
  chunks.rows = chunks.rows_each = task.chunks() * Chunks::kRows;
  ChunkSums sums(chunks, task.dim, 2);
  for (int i = 0; i < 2; ++i) {
    task.sides[i].grad = heads_of(grads[i]);
    if (call.weights[i]) task.sides[i].weight_sums = sums.of(i);
  }
  call.each_chunk(
      [&](int64_t begin, int64_t end) { kernels().qk_norm_rope_backward(task, begin, end); });

  const auto weight_grad = [&](int i, const std::optional<Tensor>& weight, const Tensor& x) {
    Tensor grad = zeros(weight, x);
    if (!weight) return grad;
    ModulationSums all;
    all.chunks = chunks;
    all.width = task.dim;
    all.gate_sums = task.sides[i].weight_sums;
    all.gate = data<float>(grad);
    collect(all);
    return as(grad, *weight);
  };
  Tensor grad_q_weight = weight_grad(0, q_weight, q), grad_k_weight = weight_grad(1, k_weight, k);
  return {call.out[0], call.out[1], grad_q_weight, grad_k_weight};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}

}  // namespace
}  // namespace vqkernels
