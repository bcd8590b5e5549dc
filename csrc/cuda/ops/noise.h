// What the noise ops share: tensors as samples, levels, noise that is given or keyed, results.
#pragma once

#include <stdexcept>

#include "../noise.h"
#include "tensors.h"

namespace vqkernels::cuda {
namespace {

constexpr int64_t kMostElements = int64_t(1) << 34;  // of a sample: counters have 32 bits for four

// The tensor itself if each of its samples lies in one piece, else a copy.
inline Tensor whole_samples(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    const int64_t size = tensor.size(dim);
    if (size != 1 && tensor.stride(dim) != expected) return torch::stable::contiguous(tensor);
    expected *= size;
  }
  return tensor;
}

inline std::optional<Tensor> whole_samples(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(whole_samples(*tensor)) : std::nullopt;
}

inline Samples samples_of(const Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.stride(0)};
}

inline Samples samples_of(const std::optional<Tensor>& tensor) {
  return tensor ? samples_of(*tensor) : Samples();
}

// The samples of x; `level` has none or the first of its dimensions.
inline NoiseGrid grid_of(const Tensor& x, const std::optional<Tensor>& level = std::nullopt) {
  NoiseGrid grid;
  grid.batch = x.size(0);
  if (x.numel() == 0) return grid;
  grid.elements = x.numel() / grid.batch;
  if (level && level->dim() > 0) grid.levels = level->numel() / grid.batch;
  if (grid.elements >= kMostElements) {
    throw std::invalid_argument("a sample must have fewer than 2^34 elements, got " +
                                std::to_string(grid.elements));
  }
  return grid;
}

// Keeps the tensors that a launcher's noise points into.
class NoiseOf {
 public:
  NoiseOf(const std::optional<Tensor>& given, const std::optional<Tensor>& key,
          const std::optional<Tensor>& sample_ids)
      : given_(whole_samples(given)) {
    if (key) key_ = dense(*key);
    if (sample_ids) ids_ = dense(*sample_ids);
  }

  Noise noise() const {
    Noise noise;
    noise.given = samples_of(given_);
    if (key_) noise.key = data<int64_t>(*key_);
    if (ids_) noise.sample_ids = data<int64_t>(*ids_);
    return noise;
  }

 private:
  std::optional<Tensor> given_, key_, ids_;
};

inline Tensor result_like(const Tensor& x, const std::vector<Tensor>& out = {}, size_t which = 0) {
  return out.size() > which ? out[which] : empty(leading_sizes(x, x.dim()), x.scalar_type(), x);
}

}  // namespace
}  // namespace vqkernels::cuda
