#include "code_statistics.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace vqkernels {

void sum_by_code(const Rows& x, const int64_t* indices, const float* weights,
                 const Rows* subtract_from, int64_t codebook_size, float* sums) {
  constexpr int64_t kColumns = 64, kSerialElements = 1 << 15;
  const int64_t columns = x.count * x.width <= kSerialElements ? x.width : kColumns;
  const int64_t slices = (x.width + columns - 1) / columns;
  parallel(slices, 1, [&](int64_t begin, int64_t end) {
    kernels().code_sums(x, indices, weights, subtract_from, codebook_size, begin * columns,
                        std::min(x.width, end * columns), sums);
  });
}

namespace {

std::tuple<Tensor, Tensor> code_statistics(const Tensor& x, const Tensor& indices,
                                           int64_t codebook_size,
                                           const std::optional<Tensor>& weights, int64_t books) {
  const int64_t groups = std::max<int64_t>(books, 1), dim = x.size(x.dim() - 1);
  std::vector<int64_t> shape{codebook_size};
  if (books > 0) shape.insert(shape.begin(), books);
  Tensor counts = empty(shape, ScalarType::Float, x);
  shape.push_back(dim);
  Tensor sums = empty(shape, ScalarType::Float, x);
  std::memset(sums.data_ptr(), 0, sizeof(float) * sums.numel());

  Labels<int64_t> labels(indices, groups);
  std::optional<Labels<float>> weight;
  if (weights) weight.emplace(*weights, groups);
  int64_t outside = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const Rows rows = books > 0 ? rows_of(x, group) : rows_of(x);
    const float* row_weights = weight ? weight->of(group) : nullptr;
    outside += kernels().code_counts(labels.of(group), row_weights, rows.count, codebook_size,
                                     data<float>(counts) + group * codebook_size);
    sum_by_code(rows, labels.of(group), row_weights, nullptr, codebook_size,
                data<float>(sums) + group * codebook_size * dim);
  }
  if (outside > 0) {
    throw std::out_of_range("indices must lie in [-1, " + std::to_string(codebook_size - 1) +
                            "], got " + std::to_string(outside) + " outside");
  }
  return {counts, sums};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
}

}  // namespace
}  // namespace vqkernels
