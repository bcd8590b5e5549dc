#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> ema_update(const Tensor& codebook, const Tensor& cluster_size,
                                              const Tensor& embed_sum, const Tensor& counts,
                                              const Tensor& sums, const Tensor& decay, double eps) {
  const Tensor sizes = dense(cluster_size), before = dense(embed_sum);
  const Tensor fresh_counts = dense(counts), fresh_sums = dense(sums);
  Tensor new_codebook = empty(codebook.sizes(), ScalarType::Float, codebook);
  Tensor new_sizes = empty(cluster_size.sizes(), ScalarType::Float, codebook);
  Tensor new_sums = empty(codebook.sizes(), ScalarType::Float, codebook);

  const int64_t codes = codebook.size(codebook.dim() - 2),
                width = codebook.size(codebook.dim() - 1);
  for (int64_t book = 0; book < book_count(codebook); ++book) {
    EmaStep step;
    step.cluster_size = data<float>(sizes) + book * codes;
    step.embed_sum = data<float>(before) + book * codes * width;
    step.counts = data<float>(fresh_counts) + book * codes;
    step.sums = data<float>(fresh_sums) + book * codes * width;
    step.new_codebook = data<float>(new_codebook) + book * codes * width;
    step.new_cluster_size = data<float>(new_sizes) + book * codes;
    step.new_embed_sum = data<float>(new_sums) + book * codes * width;
    step.codebook_size = codes;
    step.width = width;
    step.decay = *data<float>(decay);
    step.eps = eps;
    const double total = kernels().ema_sizes(step, 0, codes);
    parallel(codes, std::max<int64_t>(1, (1 << 15) / width),
             [&](int64_t begin, int64_t end) { kernels().ema_codes(step, total, begin, end); });
  }
  if (codebook.scalar_type() != ScalarType::Float) {
    new_codebook = torch::stable::to(new_codebook, codebook.scalar_type());
  }
  return {new_codebook, new_sizes, new_sums};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) { m.impl("ema_update", TORCH_BOX(&ema_update)); }

}  // namespace
}  // namespace vqkernels
