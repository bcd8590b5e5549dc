// A strided set of rows: what a tensor `[..., D]` is to a kernel. Torch-free, plain data.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace vqkernels {

struct Rows {
  static constexpr int kMaxRank = 64;  // torch's own limit

  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t count = 0;       // rows
  int64_t width = 0;       // elements of a row
  int64_t col_stride = 1;  // in elements, as all strides here
  int rank = 0;            // levels of the row index, outermost first
  int64_t sizes[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};

  int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int level = rank - 1; level > 0; --level) {
      offset += row % sizes[level] * strides[level];
      row /= sizes[level];
    }
    return rank > 0 ? offset + row * strides[0] : 0;
  }
};

}  // namespace vqkernels
