#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors.h"

namespace vqkernels {
namespace {

Tensor timestep_embedding(const Tensor& t, int64_t dim, double max_period) {
  const int64_t count = t.size(0), half = dim / 2;
  Tensor out = empty({count, dim}, ScalarType::Float, t);
  std::vector<double> frequencies(half);
  for (int64_t i = 0; i < half; ++i) {
    frequencies[i] = std::exp(-std::log(max_period) * (double(i) / double(half)));
  }
  const Tensor steps = dense(torch::stable::to(t, ScalarType::Float));
  parallel(count, std::max<int64_t>(1, (1 << 13) / dim), [&](int64_t begin, int64_t end) {
    kernels().timestep_embedding(data<float>(steps), frequencies.data(), dim, begin, end,
                                 data<float>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("timestep_embedding", TORCH_BOX(&timestep_embedding));
}

}  // namespace
}  // namespace vqkernels
