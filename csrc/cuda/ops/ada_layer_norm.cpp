#include <tuple>

#include "../modulation.h"
#include "tensors.h"

namespace vqkernels::cuda {
namespace {

Tensor dense_columns(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) < 2 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense_columns(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(dense_columns(*tensor)) : std::nullopt;
}

// The stride of a dimension with one place is never used, and may be anything.
int64_t stride_of(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) < 2 ? 0 : tensor.stride(dim);
}

Tokens tokens_of(const Tensor& x) {
  return {x.data_ptr(), dtype_of(x), {stride_of(x, 0), stride_of(x, 1)}};
}

int64_t tokens_each(const Tensor& vectors, const Tensor& x) {
  return vectors.dim() == 2 ? x.size(1) : x.size(1) / vectors.size(1);
}

// Vectors `[B, D]` or `[B, F, D]` for the tokens of x.
Vectors vectors_of(const Tensor& vectors, const Tensor& x) {
  const int64_t frame = vectors.dim() == 2 ? 0 : stride_of(vectors, 1);
  return {vectors.data_ptr(),
          dtype_of(vectors),
          {stride_of(vectors, 0), frame},
          tokens_each(vectors, x)};
}

Vectors row_of(const std::optional<Tensor>& row, const Tensor& x) {
  if (!row) return {};
  return {row->data_ptr(), dtype_of(*row), {}, x.size(1)};
}

VectorGradients gradients_of(const Tensor& grad, int64_t each) {
  return {grad.data_ptr(), dtype_of(grad), each};
}

std::vector<int64_t> sizes_of(const Tensor& tensor) { return leading_sizes(tensor, tensor.dim()); }

Tensor contiguous_like(const Tensor& tensor) {
  return empty(sizes_of(tensor), tensor.scalar_type(), tensor);
}

Tensor statistics_for(const Tensor& x) {
  return empty({x.size(0), x.size(1), 2}, ScalarType::Float, x);
}

template <typename Problem>
Problem problem_for(const Tensor& x) {
  Problem problem;
  problem.batch = x.size(0);
  problem.tokens = x.size(1);
  problem.width = x.size(2);
  return problem;
}

// For the gradients of an op: as they are where tokens are summed, zeros where there are none.
struct Gradients {
  explicit Gradients(const Tensor& x) : x(x), none(x.numel() == 0) {}

  Tensor of(const Tensor& like) const {
    return none ? zeros(sizes_of(like), like.scalar_type(), like) : contiguous_like(like);
  }
  Tensor of(const std::optional<Tensor>& like) const {
    return like ? of(*like) : empty({0}, x.scalar_type(), x);
  }

  Tensor x;
  bool none;
};

std::tuple<Tensor, Tensor> ada_layer_norm_op(const Tensor& x_given, const Tensor& shift_given,
                                             const Tensor& scale_given,
                                             const std::optional<Tensor>& weight_given,
                                             const std::optional<Tensor>& bias_given, double eps,
                                             const std::string& norm) {
  const Call call("ada_layer_norm", x_given);
  Tensor out = contiguous_like(x_given), statistics = statistics_for(x_given);
  if (out.numel() == 0) return {out, torch::stable::zero_(statistics)};
  const Tensor x = dense_columns(x_given), shift = dense_columns(shift_given);
  const Tensor scale = dense_columns(scale_given);
  const std::optional<Tensor> weight = dense_columns(weight_given);
  const std::optional<Tensor> bias = dense_columns(bias_given);
  auto problem = problem_for<Modulate>(x);
  problem.x = tokens_of(x);
  problem.out = tokens_of(out);
  problem.shift = vectors_of(shift, x);
  problem.scale = vectors_of(scale, x);
  problem.weight = row_of(weight, x);
  problem.bias = row_of(bias, x);
  problem.eps = float(eps);
  problem.centered = norm == "layer";
  problem.statistics = data<float>(statistics);
  modulate(problem, call.context());
  call.finish();
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ada_layer_norm_backward_op(
    const Tensor& grad_given, const Tensor& x_given, const Tensor& shift, const Tensor& scale_given,
    const std::optional<Tensor>& weight_given, const std::optional<Tensor>& bias_given,
    const Tensor& statistics_given, const std::string& norm) {
  const Call call("ada_layer_norm_backward", x_given);
  const Gradients grads(x_given);
  Tensor grad_x = grads.of(x_given), grad_shift = grads.of(shift);
  Tensor grad_scale = grads.of(scale_given), grad_weight = grads.of(weight_given);
  Tensor grad_bias = grads.of(bias_given);
  if (grads.none) return {grad_x, grad_shift, grad_scale, grad_weight, grad_bias};
  const Tensor x = dense_columns(x_given), grad = dense_columns(grad_given);
  const Tensor scale = dense_columns(scale_given), statistics = dense(statistics_given);
  const std::optional<Tensor> weight = dense_columns(weight_given);
  const std::optional<Tensor> bias = dense_columns(bias_given);
  auto problem = problem_for<ModulateBackward>(x);
  problem.grad = tokens_of(grad);
  problem.x = tokens_of(x);
  problem.grad_x = tokens_of(grad_x);
  problem.scale = vectors_of(scale, x);
  problem.weight = row_of(weight, x);
  problem.bias = row_of(bias, x);
  problem.centered = norm == "layer";
  problem.statistics = data<float>(statistics);
  problem.grad_shift = gradients_of(grad_shift, tokens_each(shift, x));
  problem.grad_scale = gradients_of(grad_scale, tokens_each(scale, x));
  const int64_t rows = x.size(0) * x.size(1);
  if (weight) problem.grad_weight = gradients_of(grad_weight, rows);
  if (bias) problem.grad_bias = gradients_of(grad_bias, rows);
  modulate_backward(problem, call.context());
  call.finish();
  return {grad_x, grad_shift, grad_scale, grad_weight, grad_bias};
}

Tensor gated_residual_op(const Tensor& residual_given, const Tensor& x_given,
                         const Tensor& gate_given) {
  const Call call("gated_residual", residual_given);
  Tensor out = contiguous_like(residual_given);
  if (out.numel() == 0) return out;
  const Tensor residual = dense_columns(residual_given), x = dense_columns(x_given);
  const Tensor gate = dense_columns(gate_given);
  auto problem = problem_for<Modulate>(residual);
  problem.x = tokens_of(residual);
  problem.branch = tokens_of(x);
  problem.stream = tokens_of(out);
  problem.gate = vectors_of(gate, x);
  modulate(problem, call.context());
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward_op(const Tensor& grad_given,
                                                      const Tensor& x_given,
                                                      const Tensor& gate_given) {
  const Call call("gated_residual_backward", x_given);
  const Gradients grads(x_given);
  Tensor grad_x = grads.of(x_given), grad_gate = grads.of(gate_given);
  if (grads.none) return {grad_x, grad_gate};
  const Tensor grad = dense_columns(grad_given), x = dense_columns(x_given);
  const Tensor gate = dense_columns(gate_given);
  auto problem = problem_for<ModulateBackward>(x);
  problem.grad = tokens_of(grad);
  problem.branch = tokens_of(x);
  problem.grad_branch = tokens_of(grad_x);
  problem.gate = vectors_of(gate, x);
  problem.grad_gate = gradients_of(grad_gate, tokens_each(gate, x));
  modulate_backward(problem, call.context());
  call.finish();
  return {grad_x, grad_gate};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_op(
    const Tensor& residual_given, const Tensor& x_given, const Tensor& gate_given,
    const Tensor& shift_given, const Tensor& scale_given, double eps, const std::string& norm) {
  const Call call("gated_residual_ada_layer_norm", residual_given);
  Tensor normed = contiguous_like(residual_given), stream = contiguous_like(residual_given);
  Tensor statistics = statistics_for(x_given);
  if (normed.numel() == 0) return {normed, stream, torch::stable::zero_(statistics)};
  const Tensor residual = dense_columns(residual_given), x = dense_columns(x_given);
  const Tensor gate = dense_columns(gate_given), shift = dense_columns(shift_given);
  const Tensor scale = dense_columns(scale_given);
  auto problem = problem_for<Modulate>(residual);
  problem.x = tokens_of(residual);
  problem.branch = tokens_of(x);
  problem.stream = tokens_of(stream);
  problem.out = tokens_of(normed);
  problem.gate = vectors_of(gate, x);
  problem.shift = vectors_of(shift, x);
  problem.scale = vectors_of(scale, x);
  problem.eps = float(eps);
  problem.centered = norm == "layer";
  problem.statistics = data<float>(statistics);
  modulate(problem, call.context());
  call.finish();
  return {normed, stream, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward_op(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_stream, const Tensor& stream_given,
    const Tensor& x_given, const Tensor& gate_given, const Tensor& shift, const Tensor& scale_given,
    const Tensor& statistics_given, const std::string& norm) {
  const Call call("gated_residual_ada_layer_norm_backward", x_given);
  const Gradients grads(x_given);
  Tensor grad_residual = grads.of(stream_given), grad_x = grads.of(x_given);
  Tensor grad_gate = grads.of(gate_given), grad_shift = grads.of(shift);
  Tensor grad_scale = grads.of(scale_given);
  if (grads.none) return {grad_residual, grad_x, grad_gate, grad_shift, grad_scale};
  const Tensor grad = dense_columns(grad_normed), stream = dense_columns(stream_given);
  const Tensor x = dense_columns(x_given), gate = dense_columns(gate_given);
  const Tensor scale = dense_columns(scale_given), statistics = dense(statistics_given);
  const std::optional<Tensor> passed = dense_columns(grad_stream);
  auto problem = problem_for<ModulateBackward>(x);
  problem.grad = tokens_of(grad);
  problem.x = tokens_of(stream);
  problem.grad_x = tokens_of(grad_residual);
  if (passed) problem.passed = tokens_of(*passed);
  problem.branch = tokens_of(x);
  problem.grad_branch = tokens_of(grad_x);
  problem.gate = vectors_of(gate, x);
  problem.scale = vectors_of(scale, x);
  problem.centered = norm == "layer";
  problem.statistics = data<float>(statistics);
  problem.grad_gate = gradients_of(grad_gate, tokens_each(gate, x));
  problem.grad_shift = gradients_of(grad_shift, tokens_each(shift, x));
  problem.grad_scale = gradients_of(grad_scale, tokens_each(scale, x));
  modulate_backward(problem, call.context());
  call.finish();
  return {grad_residual, grad_x, grad_gate, grad_shift, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("ada_layer_norm", TORCH_BOX(&ada_layer_norm_op));
  m.impl("ada_layer_norm_backward", TORCH_BOX(&ada_layer_norm_backward_op));
  m.impl("gated_residual", TORCH_BOX(&gated_residual_op));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_op));
  m.impl("gated_residual_ada_layer_norm", TORCH_BOX(&gated_residual_ada_layer_norm_op));
  m.impl("gated_residual_ada_layer_norm_backward",
         TORCH_BOX(&gated_residual_ada_layer_norm_backward_op));
}

}  // namespace
}  // namespace vqkernels::cuda
