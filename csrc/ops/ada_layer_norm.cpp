// The modulation ops: normalization with a shift and a scale, a gated sum, and both in one pass.
#include <numeric>
#include <tuple>

#include "row_sums.h"

namespace vqkernels {
namespace {

// Vectors `[B, D]` or `[B, F, D]` for the rows of x `[B, N, D]`.
Modulation modulation_of(const Tensor& vectors, const Tensor& x) {
  const int64_t frames = vectors.dim() == 2 ? 1 : vectors.size(1);
  return {rows_of(vectors), x.size(1) / frames};
}

// How many rows pass before any vector changes.
int64_t rows_between(std::initializer_list<const Modulation*> modulations) {
  int64_t rows = 0;
  for (const Modulation* modulation : modulations) rows = std::gcd(rows, modulation->rows_each);
  return rows;
}

std::tuple<Tensor, Tensor> ada_layer_norm(const Tensor& x_given, const Tensor& shift_given,
                                          const Tensor& scale_given,
                                          const std::optional<Tensor>& weight_given,
                                          const std::optional<Tensor>& bias_given, double eps,
                                          const std::string& norm) {
  const Tensor x = dense_rows(x_given), shift = dense_rows(shift_given);
  const Tensor scale = dense_rows(scale_given);
  const std::optional<Tensor> weight = as_floats(weight_given), bias = as_floats(bias_given);
  Tensor out = empty(x.sizes(), x.scalar_type(), x);
  Tensor statistics = empty({x.size(0), x.size(1), 2}, ScalarType::Float, x);
  ModulatedNorm task;
  task.x = rows_of(x);
  task.out = rows_of(out);
  task.shift = modulation_of(shift, x);
  task.scale = modulation_of(scale, x);
  if (weight) task.weight = data<float>(*weight);
  if (bias) task.bias = data<float>(*bias);
  task.eps = float(eps);
  task.centered = norm == "layer";
  task.rows_each = rows_between({&task.shift, &task.scale});
  task.statistics = data<float>(statistics);
  parallel(task.x.count, grain(task.x.width),
           [&](int64_t begin, int64_t end) { kernels().ada_layer_norm(task, begin, end); });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ada_layer_norm_backward(
    const Tensor& grad_given, const Tensor& x_given, const Tensor& shift, const Tensor& scale_given,
    const std::optional<Tensor>& weight_given, const std::optional<Tensor>& bias_given,
    const Tensor& statistics, const std::string& norm) {
  const Tensor x = dense_rows(x_given), grad = dense_rows(grad_given);
  const Tensor scale = dense_rows(scale_given), dense_statistics = dense(statistics);
  const std::optional<Tensor> weight = as_floats(weight_given), bias = as_floats(bias_given);
  Tensor grad_x = empty(x.sizes(), x.scalar_type(), x);
  const Modulation shifts = modulation_of(shift, x);
  ModulatedNormBackward task;
  task.x = rows_of(x);
  task.grad = rows_of(grad);
  task.grad_x = rows_of(grad_x);
  task.scale = modulation_of(scale, x);
  if (weight) task.weight = data<float>(*weight);
  task.centered = norm == "layer";
  task.statistics = data<float>(dense_statistics);
  task.chunks = {rows_between({&shifts, &task.scale}), task.x.count};
  ChunkSums sums(task.chunks, task.x.width, 2);
  task.grad_sums = sums.of(0);
  task.normed_sums = sums.of(1);
  each_chunk(task.chunks, task.x.width, [&](int64_t begin, int64_t end) {
    kernels().ada_layer_norm_backward(task, begin, end);
  });

  Tensor grad_shift = zeros(shift), grad_scale = zeros(scale);
  Tensor grad_weight = zeros(weight, x), grad_bias = zeros(bias, x);
  ModulationSums all;
  all.chunks = task.chunks;
  all.width = task.x.width;
  all.grad_sums = task.grad_sums;
  all.normed_sums = task.normed_sums;
  all.scale = task.scale;
  all.weight = task.weight;
  all.shift_rows_each = shifts.rows_each;
  all.shift = data<float>(grad_shift);
  all.scales = data<float>(grad_scale);
  if (weight) all.weights = data<float>(grad_weight);
  if (bias) all.bias = data<float>(*bias);
  if (bias) all.biases = data<float>(grad_bias);
  collect(all);
  return {grad_x, as(grad_shift, shift), as(grad_scale, scale),
          weight ? as(grad_weight, *weight_given) : grad_weight,
          bias ? as(grad_bias, *bias_given) : grad_bias};
}

Tensor gated_residual(const Tensor& residual_given, const Tensor& x_given,
                      const Tensor& gate_given) {
  const Tensor residual = dense_rows(residual_given), x = dense_rows(x_given);
  const Tensor gate = dense_rows(gate_given);
  Tensor out = empty(residual.sizes(), residual.scalar_type(), residual);
  const GatedResidual task = {rows_of(residual), rows_of(x), rows_of(out), modulation_of(gate, x)};
  parallel(task.out.count, grain(task.out.width),
           [&](int64_t begin, int64_t end) { kernels().gated_residual(task, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad_given, const Tensor& x_given,
                                                   const Tensor& gate_given) {
  const Tensor grad = dense_rows(grad_given), x = dense_rows(x_given);
  const Tensor gate = dense_rows(gate_given);
  Tensor grad_x = empty(x.sizes(), x.scalar_type(), x), grad_gate = zeros(gate);
  GatedResidualBackward task;
  task.grad = rows_of(grad);
  task.branch = rows_of(x);
  task.grad_branch = rows_of(grad_x);
  task.gate = modulation_of(gate, x);
  task.chunks = {task.gate.rows_each, task.grad.count};
  ChunkSums sums(task.chunks, task.grad.width, 1);
  task.gate_sums = sums.of(0);
  each_chunk(task.chunks, task.grad.width, [&](int64_t begin, int64_t end) {
    kernels().gated_residual_backward(task, begin, end);
  });
  ModulationSums all;
  all.chunks = task.chunks;
  all.width = task.grad.width;
  all.gate_sums = task.gate_sums;
  all.gate_rows_each = task.gate.rows_each;
  all.gate = data<float>(grad_gate);
  collect(all);
  return {grad_x, as(grad_gate, gate)};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm(
    const Tensor& residual_given, const Tensor& x_given, const Tensor& gate_given,
    const Tensor& shift_given, const Tensor& scale_given, double eps, const std::string& norm) {
  const Tensor residual = dense_rows(residual_given), x = dense_rows(x_given);
  const Tensor gate = dense_rows(gate_given), shift = dense_rows(shift_given);
  const Tensor scale = dense_rows(scale_given);
  Tensor stream = empty(residual.sizes(), residual.scalar_type(), residual);
  Tensor normed = empty(residual.sizes(), residual.scalar_type(), residual);
  Tensor statistics = empty({x.size(0), x.size(1), 2}, ScalarType::Float, x);
  ModulatedNorm task;
  task.x = rows_of(stream);
  task.out = rows_of(normed);
  task.gated = {rows_of(residual), rows_of(x), task.x, modulation_of(gate, x)};
  task.shift = modulation_of(shift, x);
  task.scale = modulation_of(scale, x);
  task.eps = float(eps);
  task.centered = norm == "layer";
  task.rows_each = rows_between({&task.gated.gate, &task.shift, &task.scale});
  task.statistics = data<float>(statistics);
  parallel(task.x.count, grain(task.x.width),
           [&](int64_t begin, int64_t end) { kernels().ada_layer_norm(task, begin, end); });
  return {normed, stream, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_stream, const Tensor& stream_given,
    const Tensor& x_given, const Tensor& gate_given, const Tensor& shift, const Tensor& scale_given,
    const Tensor& statistics, const std::string& norm) {
  const Tensor grad = dense_rows(grad_normed), stream = dense_rows(stream_given);
  const Tensor x = dense_rows(x_given), gate = dense_rows(gate_given);
  const Tensor scale = dense_rows(scale_given), dense_statistics = dense(statistics);
  std::optional<Tensor> passed;
  if (grad_stream) passed = dense_rows(*grad_stream);
  Tensor grad_residual = empty(stream.sizes(), stream.scalar_type(), stream);
  Tensor grad_x = empty(x.sizes(), x.scalar_type(), x);
  const Modulation shifts = modulation_of(shift, x);
  ModulatedNormBackward task;
  task.x = rows_of(stream);
  task.grad = rows_of(grad);
  task.grad_x = rows_of(grad_residual);
  if (passed) task.passed = rows_of(*passed);
  task.scale = modulation_of(scale, x);
  task.gated.grad = task.grad_x;
  task.gated.branch = rows_of(x);
  task.gated.grad_branch = rows_of(grad_x);
  task.gated.gate = modulation_of(gate, x);
  task.centered = norm == "layer";
  task.statistics = data<float>(dense_statistics);
  task.chunks = {rows_between({&task.gated.gate, &shifts, &task.scale}), task.x.count};
  ChunkSums sums(task.chunks, task.x.width, 3);
  task.grad_sums = sums.of(0);
  task.normed_sums = sums.of(1);
  task.gated.gate_sums = sums.of(2);
  each_chunk(task.chunks, task.x.width, [&](int64_t begin, int64_t end) {
    kernels().ada_layer_norm_backward(task, begin, end);
  });

  Tensor grad_gate = zeros(gate), grad_shift = zeros(shift), grad_scale = zeros(scale);
  ModulationSums all;
  all.chunks = task.chunks;
  all.width = task.x.width;
  all.grad_sums = task.grad_sums;
  all.normed_sums = task.normed_sums;
  all.gate_sums = task.gated.gate_sums;
  all.scale = task.scale;
  all.shift_rows_each = shifts.rows_each;
  all.gate_rows_each = task.gated.gate.rows_each;
  all.shift = data<float>(grad_shift);
  all.scales = data<float>(grad_scale);
  all.gate = data<float>(grad_gate);
  collect(all);
  return {grad_residual, grad_x, as(grad_gate, gate), as(grad_shift, shift), as(grad_scale, scale)};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("ada_layer_norm", TORCH_BOX(&ada_layer_norm));
  m.impl("ada_layer_norm_backward", TORCH_BOX(&ada_layer_norm_backward));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("gated_residual_ada_layer_norm", TORCH_BOX(&gated_residual_ada_layer_norm));
  m.impl("gated_residual_ada_layer_norm_backward",
         TORCH_BOX(&gated_residual_ada_layer_norm_backward));
}

}  // namespace
}  // namespace vqkernels
