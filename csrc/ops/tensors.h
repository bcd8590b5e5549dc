// What the ops need of a tensor: its rows for a kernel, and fresh outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "../cpu/kernel_table.h"

namespace vqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const KernelTable& kernels();

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw std::invalid_argument("CPU kernels take float32, float16 and bfloat16 tensors");
  }
}

// The rows of `[..., N, D]`, or of one group of `[..., G, N, D]`; levels that lie evenly in memory
// are merged, so that a contiguous tensor has one.
Rows rows_of(const Tensor& tensor, std::optional<int64_t> group = std::nullopt);

// The rows of one `[K, D]` book of `[K, D]` or `[G, K, D]`.
inline Rows codes_of(const Tensor& codebook, int64_t group) {
  if (codebook.dim() == 2) return rows_of(codebook);
  return rows_of(codebook, group);
}

inline int64_t book_count(const Tensor& codebook) {
  return codebook.dim() == 3 ? codebook.size(0) : 1;
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                    const Tensor& like) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// One int64 (or bool, or float) a row, dense and in row order of its group. Tensors of labels are
// `[..., N]` or `[..., G, N]`; with groups they are regrouped, which moves N numbers, not N x D.
template <typename T>
class Labels {
 public:
  Labels(const Tensor& labels, int64_t groups) : groups_(groups) {
    source_ = dense(labels);
    inner_ = groups > 1 ? source_.size(source_.dim() - 1) : source_.numel();
    outer_ = inner_ == 0 ? 0 : source_.numel() / (groups * inner_);
    if (groups > 1) values_ = std::make_unique<T[]>(source_.numel());
    if (groups > 1) each([&](int64_t from, int64_t to) { values_[to] = data<T>(source_)[from]; });
  }

  // Dense labels of one group, `rows` of them.
  T* of(int64_t group) { return (values_ ? values_.get() : data<T>(source_)) + group * rows(); }
  int64_t rows() const { return outer_ * inner_; }

  // Writes the labels back in the tensor's order, after a kernel filled `of(group)`.
  void scatter() {
    if (values_) each([&](int64_t to, int64_t from) { data<T>(source_)[to] = values_[from]; });
  }

 private:
  template <typename F>
  void each(const F& f) const {
    for (int64_t o = 0; o < outer_; ++o) {
      for (int64_t g = 0; g < groups_; ++g) {
        for (int64_t i = 0; i < inner_; ++i) {
          f((o * groups_ + g) * inner_ + i, (g * outer_ + o) * inner_ + i);
        }
      }
    }
  }

  int64_t groups_, inner_ = 0, outer_ = 0;
  Tensor source_;
  std::unique_ptr<T[]> values_;
};

// Runs f(begin, end) over [0, count) on the intra-op pool, at least `grain` items a thread.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace vqkernels
