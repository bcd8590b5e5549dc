#include <algorithm>
#include <atomic>
#include <vector>

#include "tensors.h"

namespace vqkernels {
namespace {

Tensor gather_codes(const Tensor& codebook, const Tensor& indices) {
  const auto sizes = indices.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const int64_t dim = codebook.size(codebook.dim() - 1), books = book_count(codebook);
  shape.push_back(dim);
  Tensor out = empty(shape, codebook.scalar_type(), codebook);

  // With G books, `[..., G, N]` is a sequence of runs of N indices whose books take turns.
  const Tensor labels = dense(indices);
  const int64_t run = books > 1 ? sizes[sizes.size() - 1] : labels.numel();
  const int64_t runs = run == 0 ? 0 : labels.numel() / run;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / dim);
  std::atomic<int64_t> outside{0};
  for (int64_t r = 0; r < runs; ++r) {
    Rows rows = rows_of(out);
    rows.data = static_cast<char*>(out.data_ptr()) + r * run * dim * out.element_size();
    const Rows codes = codes_of(codebook, r % books);
    parallel(run, grain, [&](int64_t begin, int64_t end) {
      outside += kernels().gather_codes(codes, data<int64_t>(labels) + r * run, rows, begin, end);
    });
  }
  if (outside > 0) {
    throw std::out_of_range("indices must lie in [-1, " +
                            std::to_string(codebook.size(codebook.dim() - 2) - 1) + "], got " +
                            std::to_string(outside) + " outside");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("gather_codes", TORCH_BOX(&gather_codes));
}

}  // namespace
}  // namespace vqkernels
