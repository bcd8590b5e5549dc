// From tensors on a CUDA device to the problems of the launchers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "../nearest_code.h"
#include "../problem.h"

// A test runs the ops on the CPU, over emulated kernels.
#if !defined(VQKERNELS_DISPATCH_KEY)
#define VQKERNELS_DISPATCH_KEY CUDA
#endif

namespace vqkernels::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws if kernels do not take the tensor's dtype.
DType dtype_of(const Tensor& tensor);

// The row grid that tensors of one shape share, and their labels with them.
struct Grid {
  std::vector<Tensor> tensors;  // contiguous copies where strides need more than three levels
  std::vector<Rows> rows;       // one each
  Labels labels;                // of a contiguous tensor of that shape without its last dimension
};

// Rows of `[..., N, D]`, or of `[..., G, N, D]` where `grouped`. Leading dimensions that lie evenly
// in every tensor and in the labels are one level.
Grid row_grid(std::vector<Tensor> tensors, bool grouped);

// `result`, after a launcher wrote the tensor that stands for it in the grid.
Tensor filled(const Tensor& result, const Grid& grid, size_t position);

// The codes of `[K, D]` or `[G, K, D]`.
Rows codes_of(const Tensor& codebook);

inline int64_t codebook_size(const Tensor& codebook) { return codebook.size(codebook.dim() - 2); }

Metric parse_metric(const std::string& name);

// Fresh tensors on the device of `like`.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);

// The first `dims` sizes.
inline std::vector<int64_t> leading_sizes(const Tensor& tensor, int64_t dims) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.begin() + dims};
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// One call of an op on rows x: while it lives, x's device is the current one and scratch memory
// stays allocated. Its kernels go to the current stream, in whose order the allocator hands memory
// out again. Throws if x has more rows than kernels can number, where they number rows.
class Call {
 public:
  Call(const char* op, const Tensor& x, bool numbers_rows = true);
  Call(const Call&) = delete;

  const Context& context() const { return context_; }

  // Throws what the device reported about this call's launches.
  void finish() const;

 private:
  std::string op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> scratch_;
  Context context_;
};

}  // namespace vqkernels::cuda
