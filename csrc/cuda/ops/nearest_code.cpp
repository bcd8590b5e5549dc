#include "tensors.h"

namespace vqkernels::cuda {
namespace {

Tensor nearest_code_op(const Tensor& x, const Tensor& codebook, const std::string& metric,
                       const std::string& /*precision*/, const std::optional<Tensor>& /*packed*/) {
  const Call call("nearest_code", x);
  Tensor indices = empty(leading_sizes(x, x.dim() - 1), ScalarType::Long, x);
  if (indices.numel() == 0) return indices;
  const Grid grid = row_grid({x}, codebook.dim() == 3);
  NearestCode problem;
  problem.x = grid.rows[0];
  problem.codebook = codes_of(codebook);
  problem.metric = parse_metric(metric);
  problem.labels = grid.labels;
  problem.indices = data<int64_t>(indices);
  nearest_code(problem, call.context());
  call.finish();
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code_op));
}

}  // namespace
}  // namespace vqkernels::cuda
