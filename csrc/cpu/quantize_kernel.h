// Forward and backward of a vector quantizer once each row's index is known.
// Bytes: rows x width read (x, and the gradient) and written once; codes stay in cache.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernel_table.h"

namespace vqkernels {
namespace {

// Calls f(d, r) for every element of a block of rows, along whichever of the two is contiguous.
constexpr int64_t kRowsAtOnce = 64;

template <typename F>
inline void for_each_element(int64_t width, int64_t rows, bool row_major, const F& f) {
  if (row_major) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < width; ++d) f(r, d);
    }
  } else {
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t r = 0; r < rows; ++r) f(r, d);
    }
  }
}

template <typename T>
inline T* element_pointer(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + rows.offset(row);
}

template <typename X, typename C>
double quantize_block(const Rows& x, const Rows& codes, const int64_t* indices, const bool* kept,
                      const Rows& out, int64_t begin, int64_t count) {
  double sum = 0;
  const bool row_major = x.col_stride == 1 && out.col_stride == 1 && codes.col_stride == 1;
  if (row_major) {
    for (int64_t r = begin; r < begin + count; ++r) {
      const X* from = element_pointer<const X>(x, r);
      X* to = element_pointer<X>(out, r);
      if (indices[r] < 0) {
        const bool hidden = kept != nullptr && !kept[r];
        const float blank = hidden ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::fill(to, to + x.width, from_float<X>(blank));
        continue;
      }
      const C* code = element_pointer<const C>(codes, indices[r]);
      constexpr int kParts = 16;
      float parts[kParts] = {};
      int64_t d = 0;
      for (; d + kParts <= x.width; d += kParts) {
        for (int i = 0; i < kParts; ++i) {
          const float value = to_float(code[d + i]), difference = to_float(from[d + i]) - value;
          to[d + i] = from_float<X>(value);
          parts[i] += difference * difference;
        }
      }
      for (; d < x.width; ++d) {
        const float value = to_float(code[d]), difference = to_float(from[d]) - value;
        to[d] = from_float<X>(value);
        parts[0] += difference * difference;
      }
      double row_sum = 0;
      for (float part : parts) row_sum += part;
      sum += row_sum;
    }
    return sum;
  }
  const X* from[kRowsAtOnce];
  X* to[kRowsAtOnce];
  const C* code[kRowsAtOnce];
  float blank[kRowsAtOnce];
  double sums[kRowsAtOnce] = {};
  for (int64_t r = 0; r < count; ++r) {
    from[r] = element_pointer<const X>(x, begin + r);
    to[r] = element_pointer<X>(out, begin + r);
    const int64_t index = indices[begin + r];
    code[r] = index < 0 ? nullptr : element_pointer<const C>(codes, index);
    const bool hidden = kept != nullptr && !kept[begin + r];
    blank[r] = hidden ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for_each_element(x.width, count, false, [&](int64_t r, int64_t d) {
    if (code[r] == nullptr) {
      to[r][d * out.col_stride] = from_float<X>(blank[r]);
      return;
    }
    const float value = to_float(code[r][d * codes.col_stride]);
    const float difference = to_float(from[r][d * x.col_stride]) - value;
    to[r][d * out.col_stride] = from_float<X>(value);
    sums[r] += double(difference) * difference;
  });
  for (int64_t r = 0; r < count; ++r) sum += sums[r];
  return sum;
}

inline double quantize_rows(const Rows& x, const Rows& codes, const int64_t* indices,
                            const bool* kept, const Rows& out, int64_t row_begin,
                            int64_t row_end) {
  double sum = 0;
  dispatch(x.dtype, [&](auto* x_type) {
    dispatch(codes.dtype, [&](auto* code_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using C = std::remove_pointer_t<decltype(code_type)>;
      for (int64_t begin = row_begin; begin < row_end; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, row_end - begin);
        sum += quantize_block<X, C>(x, codes, indices, kept, out, begin, count);
      }
    });
  });
  return sum;
}

template <typename X, typename C>
void backward_block(const Rows& x, const Rows& codes, const int64_t* indices,
                    const Rows* grad_quantized, float loss_scale, const Rows& grad_x,
                    int64_t begin, int64_t count) {
  const X* from[kRowsAtOnce];
  const X* passed[kRowsAtOnce];
  const C* code[kRowsAtOnce];
  X* to[kRowsAtOnce];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t index = indices[begin + r];
    from[r] = element_pointer<const X>(x, begin + r);
    to[r] = element_pointer<X>(grad_x, begin + r);
    passed[r] = grad_quantized ? element_pointer<const X>(*grad_quantized, begin + r) : nullptr;
    code[r] = index < 0 ? nullptr : element_pointer<const C>(codes, index);
  }
  const int64_t passed_stride = grad_quantized ? grad_quantized->col_stride : 0;
  for_each_element(x.width, count, x.col_stride == 1, [&](int64_t r, int64_t d) {
    float grad = 0;
    if (code[r] != nullptr) {
      if (passed[r] != nullptr) grad = to_float(passed[r][d * passed_stride]);
      if (loss_scale != 0) {
        const float value = to_float(code[r][d * codes.col_stride]);
        grad += loss_scale * (to_float(from[r][d * x.col_stride]) - value);
      }
    }
    to[r][d * grad_x.col_stride] = from_float<X>(grad);
  });
}

inline void quantize_backward_x(const Rows& x, const Rows& codes, const int64_t* indices,
                                const Rows* grad_quantized, float loss_scale, const Rows& grad_x,
                                int64_t row_begin, int64_t row_end) {
  dispatch(x.dtype, [&](auto* x_type) {
    dispatch(codes.dtype, [&](auto* code_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using C = std::remove_pointer_t<decltype(code_type)>;
      for (int64_t begin = row_begin; begin < row_end; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, row_end - begin);
        backward_block<X, C>(x, codes, indices, grad_quantized, loss_scale, grad_x, begin, count);
      }
    });
  });
}

}  // namespace
}  // namespace vqkernels
