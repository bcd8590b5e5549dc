// What the modulation kernels share: groups of rows taken together, and vectors made ready for
// them.
#pragma once

#include <type_traits>

#include "modulation_task.h"
#include "scratch.h"
#include "vectors.h"

namespace vqkernels {
namespace {

// Rows whose chains of additions overlap.
constexpr int kTogether = 4;

// Two running sums for each of kRows rows. Cleared one by one: GCC calls a slow memset for `{}`.
template <int kRows>
struct Sums {
  vf parts[kRows][2];

  VQKERNELS_INLINE Sums() {
    for (int r = 0; r < kRows; ++r) parts[r][0] = parts[r][1] = vf{};
  }
  VQKERNELS_INLINE float of(int row) const { return sum_of(parts[row][0] + parts[row][1]); }
};

template <typename T>
inline T* row_at(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + rows.offset(row);
}

// As `each_vector`, with f(column, count, part) told in which of two parts to sum: neighbours
// differ, so that their additions overlap. What is summed where depends on `columns` alone.
template <typename F>
VQKERNELS_INLINE inline void each_vector_in_two(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    f(column, int64_t(kLanes), 0);
    f(column + kLanes, int64_t(kLanes), 1);
  }
  each_vector(columns - column,
              [&](int64_t more, int64_t count) VQKERNELS_INLINE { f(column + more, count, 0); });
}

// A row as floats: in place, or in `buffer`.
inline const float* widened(const Rows& rows, int64_t row, float* buffer) {
  if (rows.dtype == DType::f32) return row_at<const float>(rows, row);
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = row_at<const T>(rows, row);
    each_vector(rows.width, [&](int64_t column, int64_t count) {
      store_at(buffer, column, count, load_at(from, column, count));
    });
  });
  return buffer;
}

inline void narrow(const float* values, const Rows& rows, int64_t row) {
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = row_at<T>(rows, row);
    each_vector(rows.width, [&](int64_t column, int64_t count) {
      store_at(to, column, count, load_at(values, column, count));
    });
  });
}

inline const float* vector_for(const Modulation& modulation, int64_t row, float* buffer) {
  return widened(modulation.vectors, row / modulation.rows_each, buffer);
}

// factor = weight * (1 + scale); with `addend`, also bias * (1 + scale) + shift there.
inline void factor_for(const Modulation& scale, const float* weight, int64_t row, float* factor,
                       const Modulation* shift = nullptr, const float* bias = nullptr,
                       float* addend = nullptr) {
  const float* scales = vector_for(scale, row, factor);
  const float* shifts = shift != nullptr ? vector_for(*shift, row, addend) : nullptr;
  each_vector(scale.vectors.width, [&](int64_t column, int64_t count) {
    vf value = load_at(scales, column, count) + splat(1.0f);
    if (shifts != nullptr) {
      vf sum = load_at(shifts, column, count);
      if (bias != nullptr) sum = multiply_add(load_at(bias, column, count), value, sum);
      store_at(addend, column, count, sum);
    }
    if (weight != nullptr) value *= load_at(weight, column, count);
    store_at(factor, column, count, value);
  });
}

// Calls f(row, integral_constant of how many) for groups of rows [begin, end), none of which
// crosses a multiple of `rows_each`; `enter(row)` comes before the first group behind one.
template <typename Enter, typename F>
inline void each_group(int64_t begin, int64_t end, int64_t rows_each, const Enter& enter,
                       const F& f) {
  for (int64_t row = begin; row < end;) {
    const int64_t stop = std::min(end, (row / rows_each + 1) * rows_each);
    enter(row);
    for (; row + kTogether <= stop; row += kTogether) {
      f(row, std::integral_constant<int, kTogether>());
    }
    for (; row < stop; ++row) f(row, std::integral_constant<int, 1>());
  }
}

// Calls f with null pointers of two element types: the stream's, and the one to read the branch as,
// which is the same where that is its dtype and else float, through a buffer.
template <typename F>
inline void dispatch_branch(DType stream, DType branch, const F& f) {
  dispatch(stream, [&](auto* type) {
    if (branch == stream) {
      f(type, type);
    } else {
      f(type, static_cast<float*>(nullptr));
    }
  });
}

template <typename X>
inline const X* branch_row(const Rows& branch, int64_t row, float* buffer) {
  if constexpr (std::is_same_v<X, float>) {
    return widened(branch, row, buffer);
  } else {
    return row_at<const X>(branch, row);
  }
}

// Adds what kRows numbers of each column give to a sum in memory, in a fixed order.
template <int kRows>
VQKERNELS_INLINE inline void add_to(float* sums, int64_t column, int64_t count,
                                    const vf (&terms)[kRows]) {
  vf sum = terms[0];
  if constexpr (kRows == kTogether) sum = (terms[0] + terms[1]) + (terms[2] + terms[3]);
  store_at(sums, column, count, load_at(sums, column, count) + sum);
}

inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace
}  // namespace vqkernels
