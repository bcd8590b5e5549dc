#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "code_statistics.h"
#include "nearest_code.h"

namespace vqkernels {
namespace {

// Losses are summed per chunk of this many rows, and the chunks in order: the same bits whatever
// the number of threads.
constexpr int64_t kChunkRows = 256;

int64_t rows_with_code(Labels<int64_t>& labels, int64_t groups) {
  int64_t found = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t* indices = labels.of(group);
    for (int64_t row = 0; row < labels.rows(); ++row) found += indices[row] >= 0;
  }
  return found;
}

template <typename F>
void parallel_chunks(int64_t rows, int64_t dim, const F& f) {
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (kChunkRows * dim));
  parallel(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk, chunk * kChunkRows, std::min(rows, (chunk + 1) * kChunkRows));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& x, const Tensor& codebook,
                                                            const std::string& metric,
                                                            const std::optional<Tensor>& mask,
                                                            const std::string& /*gradient*/,
                                                            const std::optional<Tensor>& packed) {
  const bool grouped = codebook.dim() == 3;
  const int64_t books = book_count(codebook), dim = x.size(x.dim() - 1);
  const int64_t codebook_size = codebook.size(codebook.dim() - 2);
  const auto sizes = x.sizes(), book_sizes = codebook.sizes();
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), ScalarType::Long, x);
  Tensor counts =
      empty(std::vector<int64_t>(book_sizes.begin(), book_sizes.end() - 1), ScalarType::Float, x);

  Labels<int64_t> labels(indices, books);
  std::optional<Labels<bool>> kept;
  if (mask) kept.emplace(*mask, books);
  search(x, codebook, parse_metric(metric), packed, labels);

  double total = 0;
  for (int64_t group = 0; group < books; ++group) {
    const Rows rows = grouped ? rows_of(x, group) : rows_of(x);
    const Rows out = grouped ? rows_of(quantized, group) : rows_of(quantized);
    const Rows codes = codes_of(codebook, group);
    int64_t* index = labels.of(group);
    const bool* keep = kept ? kept->of(group) : nullptr;
    for (int64_t row = 0; keep != nullptr && row < rows.count; ++row) {
      if (!keep[row]) index[row] = -1;
    }
    std::vector<double> sums((rows.count + kChunkRows - 1) / kChunkRows);
    parallel_chunks(rows.count, dim, [&](int64_t chunk, int64_t begin, int64_t end) {
      sums[chunk] = kernels().quantize_rows(rows, codes, index, keep, out, begin, end);
    });
    for (double sum : sums) total += sum;
    kernels().code_counts(index, nullptr, rows.count, codebook_size,
                          data<float>(counts) + group * codebook_size);
  }
  const int64_t elements = std::max<int64_t>(1, rows_with_code(labels, books) * dim);
  labels.scatter();
  Tensor commitment_loss = empty({}, ScalarType::Float, x);
  Tensor codebook_loss = empty({}, ScalarType::Float, x);
  *data<float>(commitment_loss) = *data<float>(codebook_loss) = float(total / double(elements));
  return {quantized, indices, commitment_loss, codebook_loss, counts};
}

float loss_scale(const Tensor& grad, Labels<int64_t>& labels, int64_t books, int64_t dim) {
  const int64_t elements = std::max<int64_t>(1, rows_with_code(labels, books) * dim);
  return float(double(*data<float>(grad)) * 2 / double(elements));
}

Tensor quantize_backward_x(const std::optional<Tensor>& grad_quantized,
                           const std::optional<Tensor>& grad_commitment, const Tensor& x,
                           const Tensor& codebook, const Tensor& indices,
                           const std::string& gradient) {
  const bool grouped = codebook.dim() == 3;
  const int64_t books = book_count(codebook), dim = x.size(x.dim() - 1);
  Tensor grad_x = torch::stable::empty_like(x);
  Labels<int64_t> labels(indices, books);
  const float scale = grad_commitment ? loss_scale(*grad_commitment, labels, books, dim) : 0.0f;
  const Gradient way = gradient == "straight_through" ? Gradient::straight_through
                       : gradient == "rotation"       ? Gradient::rotation
                                                      : Gradient::none;
  for (int64_t group = 0; group < books; ++group) {
    const auto rows = [&](const Tensor& t) { return grouped ? rows_of(t, group) : rows_of(t); };
    const Rows x_rows = rows(x), out = rows(grad_x), codes = codes_of(codebook, group);
    const Rows passed = grad_quantized ? rows(*grad_quantized) : Rows{};
    parallel_chunks(x_rows.count, dim, [&](int64_t, int64_t begin, int64_t end) {
      kernels().quantize_backward_x(x_rows, codes, labels.of(group),
                                    grad_quantized ? &passed : nullptr, way, scale, out, begin,
                                    end);
    });
  }
  return grad_x;
}

Tensor quantize_backward_codebook(const Tensor& grad_codebook_loss, const Tensor& x,
                                  const Tensor& codebook, const Tensor& indices) {
  const bool grouped = codebook.dim() == 3;
  const int64_t books = book_count(codebook), dim = x.size(x.dim() - 1);
  const int64_t codebook_size = codebook.size(codebook.dim() - 2);
  Tensor sums = empty(codebook.sizes(), ScalarType::Float, codebook);
  std::memset(sums.data_ptr(), 0, sizeof(float) * sums.numel());
  Labels<int64_t> labels(indices, books);
  for (int64_t group = 0; group < books; ++group) {
    const Rows rows = grouped ? rows_of(x, group) : rows_of(x);
    const Rows codes = codes_of(codebook, group);
    sum_by_code(rows, labels.of(group), nullptr, &codes, codebook_size,
                data<float>(sums) + group * codebook_size * dim);
  }
  const float scale = loss_scale(grad_codebook_loss, labels, books, dim);
  for (int64_t i = 0; i < sums.numel(); ++i) data<float>(sums)[i] *= scale;
  if (codebook.scalar_type() == ScalarType::Float) return sums;
  return torch::stable::to(sums, codebook.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_backward_x", TORCH_BOX(&quantize_backward_x));
  m.impl("quantize_backward_codebook", TORCH_BOX(&quantize_backward_codebook));
}

}  // namespace
}  // namespace vqkernels
