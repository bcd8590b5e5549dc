// Sums of the rows assigned to each code.
//
// Rows are added in ascending order with a compensation beside every sum (Neumaier), so a sum of a
// million rows is as good as one of ten, and the result does not depend on how columns are shared
// among threads. Bytes: rows x width read once, two sums read and written for each.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernel_table.h"
#include "scratch.h"

namespace vqkernels {
namespace {

constexpr int64_t kColumnsAtOnce = 64;

inline int64_t code_counts(const int64_t* indices, const float* weights, int64_t rows,
                           int64_t codebook_size, float* counts) {
  auto totals = std::make_unique<double[]>(codebook_size);
  int64_t outside = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = indices[row];
    if (index >= 0 && index < codebook_size) {
      totals[index] += weights ? weights[row] : 1.0;
    } else {
      outside += index != -1;
    }
  }
  for (int64_t code = 0; code < codebook_size; ++code) counts[code] = float(totals[code]);
  return outside;
}

inline void add_compensated(const float* values, int64_t count, float* sum, float* lost) {
  for (int64_t d = 0; d < count; ++d) {
    const float before = sum[d], value = values[d];
    const float after = before + value;
    const float back = after - before;
    lost[d] += (before - (after - back)) + (value - back);
    sum[d] = after;
  }
}

template <typename X, typename C>
void add_rows(const Rows& x, const int64_t* indices, const float* weights,
              const Rows* subtract_from, int64_t codebook_size, int64_t col_begin, int64_t col_end,
              float* sums) {
  const int64_t width = x.width;
  for (int64_t begin = col_begin; begin < col_end; begin += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, col_end - begin);
    Scratch scratch(codebook_size * count);
    float* lost = scratch.take<float>(codebook_size * count);
    std::fill(lost, lost + codebook_size * count, 0.0f);
    for (int64_t row = 0; row < x.count; ++row) {
      const int64_t index = indices[row];
      if (index < 0 || index >= codebook_size) continue;
      float values[kColumnsAtOnce];
      const X* from = static_cast<const X*>(x.data) + x.offset(row) + begin * x.col_stride;
      if (x.col_stride == 1) {
        for (int64_t d = 0; d < count; ++d) values[d] = to_float(from[d]);
      } else {
        for (int64_t d = 0; d < count; ++d) values[d] = to_float(from[d * x.col_stride]);
      }
      if (subtract_from != nullptr) {
        const int64_t stride = subtract_from->col_stride;
        const C* code = static_cast<const C*>(subtract_from->data) + subtract_from->offset(index) +
                        begin * stride;
        for (int64_t d = 0; d < count; ++d) values[d] = to_float(code[d * stride]) - values[d];
      }
      if (weights != nullptr) {
        for (int64_t d = 0; d < count; ++d) values[d] *= weights[row];
      }
      add_compensated(values, count, sums + index * width + begin, lost + index * count);
    }
    for (int64_t code = 0; code < codebook_size; ++code) {
      for (int64_t d = 0; d < count; ++d) {
        const float rest = lost[code * count + d];
        if (std::isfinite(rest)) sums[code * width + begin + d] += rest;
      }
    }
  }
}

// `sums` starts at zero.
inline void code_sums(const Rows& x, const int64_t* indices, const float* weights,
                      const Rows* subtract_from, int64_t codebook_size, int64_t col_begin,
                      int64_t col_end, float* sums) {
  const DType code_dtype = subtract_from != nullptr ? subtract_from->dtype : x.dtype;
  dispatch(x.dtype, [&](auto* x_type) {
    dispatch(code_dtype, [&](auto* code_type) {
      add_rows<std::remove_pointer_t<decltype(x_type)>, std::remove_pointer_t<decltype(code_type)>>(
          x, indices, weights, subtract_from, codebook_size, col_begin, col_end, sums);
    });
  });
}

}  // namespace
}  // namespace vqkernels
