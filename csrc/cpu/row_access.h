// Rows as contiguous floats: in place where they are that already, else through a buffer.
#pragma once

#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace vqkernels {
namespace {

// `buffer` holds one row.
inline const float* read_row(const Rows& rows, int64_t row, float* buffer) {
  const int64_t offset = rows.offset(row), stride = rows.col_stride;
  if (rows.dtype == DType::f32 && stride == 1) {
    return static_cast<const float*>(rows.data) + offset;
  }
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(rows.data) + offset;
    if (stride == 1) {
      for (int64_t d = 0; d < rows.width; ++d) buffer[d] = to_float(from[d]);
    } else {
      for (int64_t d = 0; d < rows.width; ++d) buffer[d] = to_float(from[d * stride]);
    }
  });
  return buffer;
}

// Where to compute a row that `write_row` then puts in place.
inline float* row_target(const Rows& rows, int64_t row, float* buffer) {
  if (rows.dtype == DType::f32 && rows.col_stride == 1) {
    return static_cast<float*>(rows.data) + rows.offset(row);
  }
  return buffer;
}

inline void write_row(const Rows& rows, int64_t row, const float* values) {
  const int64_t offset = rows.offset(row), stride = rows.col_stride;
  if (rows.dtype == DType::f32 && stride == 1) return;
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(rows.data) + offset;
    if (stride == 1) {
      for (int64_t d = 0; d < rows.width; ++d) to[d] = from_float<T>(values[d]);
    } else {
      for (int64_t d = 0; d < rows.width; ++d) to[d * stride] = from_float<T>(values[d]);
    }
  });
}

}  // namespace
}  // namespace vqkernels
