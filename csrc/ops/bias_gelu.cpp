#include <tuple>

#include "row_sums.h"

namespace vqkernels {
namespace {

Tensor bias_gelu(const Tensor& x_given, const std::optional<Tensor>& bias_given,
                 const std::string& approximate) {
  const Tensor x = dense_rows(x_given);
  const std::optional<Tensor> bias = as_floats(bias_given);
  Tensor out = empty(x.sizes(), x.scalar_type(), x);
  BiasGelu task;
  task.x = rows_of(x);
  task.out = rows_of(out);
  if (bias) task.bias = data<float>(*bias);
  task.tanh = approximate == "tanh";
  parallel(task.x.count, grain(task.x.width),
           [&](int64_t begin, int64_t end) { kernels().bias_gelu(task, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_given, const Tensor& x_given,
                                              const std::optional<Tensor>& bias_given,
                                              const std::string& approximate) {
  const Tensor x = dense_rows(x_given), grad = dense_rows(grad_given);
  const std::optional<Tensor> bias = as_floats(bias_given);
  Tensor grad_x = empty(x.sizes(), x.scalar_type(), x), grad_bias = zeros(bias, x);
  BiasGeluBackward task;
  task.x = rows_of(x);
  task.grad = rows_of(grad);
  task.grad_x = rows_of(grad_x);
  if (bias) task.bias = data<float>(*bias);
  task.tanh = approximate == "tanh";
  task.chunks = {task.x.count, task.x.count};
  ChunkSums sums(task.chunks, task.x.width, bias ? 1 : 0);
  if (bias) task.bias_sums = sums.of(0);
  each_chunk(task.chunks, task.x.width,
             [&](int64_t begin, int64_t end) { kernels().bias_gelu_backward(task, begin, end); });
  if (!bias) return {grad_x, grad_bias};

  ModulationSums all;
  all.chunks = task.chunks;
  all.width = task.x.width;
  all.gate_sums = task.bias_sums;
  all.gate_rows_each = std::max<int64_t>(1, task.x.count);
  all.gate = data<float>(grad_bias);
  collect(all);
  return {grad_x, as(grad_bias, *bias_given)};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

}  // namespace
}  // namespace vqkernels
