// Launchers with explicit choices and the device's ceiling, for measurements: vqkernels/cuda.py.
#include <stdexcept>

#include "../peak.h"
#include "tensors.h"

namespace vqkernels::cuda {
namespace {

Tensor nearest_code_as(const Tensor& x, const Tensor& codebook, const std::string& metric,
                       int64_t splits, int64_t block_rows, int64_t stages, int64_t warpgroups) {
  const Call call("nearest_code_as", x);
  Tensor indices = empty(leading_sizes(x, x.dim() - 1), ScalarType::Long, x);
  if (indices.numel() == 0) return indices;
  const Grid grid = row_grid({x}, codebook.dim() == 3);
  NearestCode problem;
  problem.x = grid.rows[0];
  problem.codebook = codes_of(codebook);
  problem.metric = parse_metric(metric);
  problem.labels = grid.labels;
  problem.indices = data<int64_t>(indices);
  problem.splits = int(splits);
  problem.block_rows = int(block_rows);
  problem.stages = int(stages);
  problem.warpgroups = int(warpgroups);
  nearest_code(problem, call.context());
  call.finish();
  return indices;
}

int64_t tensor_core_peak_op(const Tensor& like, int64_t repeats) {
  const Call call("tensor_core_peak", like);
  const Tensor sink = empty({peak_sink(call.context().device)}, ScalarType::Float, like);
  const DType dtype = like.scalar_type() == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  const int64_t products = tensor_core_peak(dtype, int(repeats), data<float>(sink), call.context());
  call.finish();
  return products;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("nearest_code_as", TORCH_BOX(&nearest_code_as));
  m.impl("tensor_core_peak", TORCH_BOX(&tensor_core_peak_op));
}

}  // namespace
}  // namespace vqkernels::cuda
