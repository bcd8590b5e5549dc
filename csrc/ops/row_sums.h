// Sums down the columns that come out the same whatever the number of threads, and tensors whose
// columns lie next to each other, for the ops over rows of modulated tokens.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "tensors.h"

namespace vqkernels {
namespace {

// Elements a thread takes at least.
constexpr int64_t kGrain = 1 << 15;

inline int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
}

// As the kernels of modulation_task.h read rows.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) < 2 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_floats(const std::optional<Tensor>& row) {
  if (!row) return std::nullopt;
  return dense(torch::stable::to(*row, ScalarType::Float));
}

inline Tensor zeros(const Tensor& like) {
  Tensor sums = empty(like.sizes(), ScalarType::Float, like);
  std::memset(sums.data_ptr(), 0, sizeof(float) * size_t(sums.numel()));
  return sums;
}

// Zeros for the sums of a vector that may be missing; without it no elements.
inline Tensor zeros(const std::optional<Tensor>& like, const Tensor& x) {
  return like ? zeros(*like) : empty({0}, x.scalar_type(), x);
}

inline Tensor as(const Tensor& sums, const Tensor& like) {
  if (like.scalar_type() == ScalarType::Float) return sums;
  return torch::stable::to(sums, like.scalar_type());
}

// Sums of rows, `[chunks, D]`.
struct ChunkSums {
  ChunkSums(const Chunks& chunks, int64_t width, int kinds)
      : each(chunks.count() * width), memory(new float[size_t(each * kinds)]) {}
  float* of(int kind) { return memory.get() + kind * each; }

  int64_t each;
  std::unique_ptr<float[]> memory;
};

template <typename F>
void each_chunk(const Chunks& chunks, int64_t width, const F& f) {
  const int64_t rows = std::min(chunks.rows_each, Chunks::kRows);
  parallel(chunks.count(), grain(rows * width), f);
}

inline void collect(const ModulationSums& sums) {
  const int64_t per_column = sums.chunks.count() * 2;
  parallel(sums.width, std::max<int64_t>(64, grain(per_column)),
           [&](int64_t begin, int64_t end) { kernels().modulation_sums(sums, begin, end); });
}

}  // namespace
}  // namespace vqkernels
