// GELU of a biased row and its gradients.
// Bytes: x (and the gradient) read once, the result written once; about 20 vector operations a
// vector and one division, two under the error function.
#pragma once

#include "modulation_rows.h"

namespace vqkernels {
namespace {

// Beyond these GELU is u itself, or less than 1e-27; within them all powers are finite. A NaN stays
// one: `minimum` and `maximum` give their second argument where one is no number.
constexpr float kTanhEnd = 9, kErfEnd = 13;

inline vf clamped(vf u, float end) { return minimum(splat(end), maximum(splat(-end), u)); }

// What is rounded to bf16 needs no more than 14 bits.
template <typename T>
constexpr int kTerms = std::is_same_v<T, bfloat16_t> ? 3 : 5;

// 1 / v for v from 1 to 2^120: to an ulp, or with a relative error of 2^-14.
template <typename T>
inline vf reciprocal(vf v) {
#if defined(__AVX512F__)
  const vf near = (vf)_mm512_rcp14_ps((__m512)v);
  if constexpr (kTerms<T> == 3) return near;
  return near * multiply_add(-v, near, splat(2.0f));
#else
  return splat(1.0f) / v;
#endif
}

// gelu(u) = u / (1 + exp(-p)) with p = 2 sqrt(2 / pi) (u + 0.044715 u^3).
template <typename T>
struct TanhGelu {
  static constexpr float kSlope = 1.59576912160573f, kCube = 0.044715f;
  static constexpr float kLog2E = 1.44269504088896341f;

  // exp(-p), which lies between 2^-96 and 2^96.
  static vf power(vf v, vf square) {
    const vf inner = multiply_add(square, splat(-kSlope * kCube * kLog2E), splat(-kSlope * kLog2E));
    return exp2<kTerms<T>, true>(v * inner);
  }

  static vf value(vf u) {
    const vf above = maximum(splat(-kTanhEnd), u), v = minimum(splat(kTanhEnd), above);
    return above * reciprocal<T>(splat(1.0f) + power(v, v * v));
  }

  static vf slope(vf u) {
    const vf v = clamped(u, kTanhEnd), square = v * v, e = power(v, square);
    const vf s = reciprocal<T>(splat(1.0f) + e);
    const vf inner = multiply_add(square, splat(3 * kSlope * kCube), splat(kSlope));
    return multiply_add(v * inner, e * s * s, s);  // e s is 1 - s, without the cancellation
  }
};

// gelu(u) = max(u, 0) - z q(z) with z = |u| and q(z) = erfc(z / sqrt(2)) / 2.
template <typename T>
struct ErfGelu {
  static constexpr float kLog2E = 1.44269504088896341f, kDensity = 0.398942280401433f;

  // exp(-z^2 / 2)
  static vf bell(vf z) { return exp2<kTerms<T>, true>(z * z * splat(-0.5f * kLog2E)); }

  // q(z) exp(z^2 / 2): minimax in 1 / (1 + 0.32 z) on [0, 14], within 1.1e-9 where q matters.
  static vf tail(vf z) {
    const vf t = reciprocal<T>(multiply_add(z, splat(0x1.47ae14p-2f), splat(1.0f)));
    vf y = multiply_add(splat(0x1.85c3b2p-5f), t, splat(-0x1.00cb72p-2f));
    y = multiply_add(y, t, splat(0x1.b9fc24p-2f));
    y = multiply_add(y, t, splat(-0x1.91eb52p-3f));
    y = multiply_add(y, t, splat(0x1.ee5a18p-3f));
    y = multiply_add(y, t, splat(0x1.824464p-4f));
    y = multiply_add(y, t, splat(0x1.0f2f3ep-3f));
    return multiply_add(y, t, splat(-0x1.250afcp-12f));
  }

  static vf size(vf v) { return (vf)((vi)v & splat(int32_t(0x7fffffff))); }

  static vf value(vf u) {
    const vf z = size(clamped(u, kErfEnd));
    return maximum(splat(0.0f), u) - z * (bell(z) * tail(z));
  }

  static vf slope(vf u) {
    const vf v = clamped(u, kErfEnd), z = size(v), power = bell(z), q = power * tail(z);
    const vi negative = u < splat(0.0f);
    const vf phi = (vf)(((vi)q & negative) | ((vi)(splat(1.0f) - q) & ~negative));
    return multiply_add(v * splat(kDensity), power, phi);
  }
};

template <typename Gelu, typename T>
inline void bias_gelu_rows(const BiasGelu& task, int64_t begin, int64_t end) {
  const float* bias = task.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_at<const T>(task.x, row);
    T* out = row_at<T>(task.out, row);
    const auto value = [&](int64_t column, int64_t count) VQKERNELS_INLINE {
      vf u = load_at(x, column, count);
      if (bias != nullptr) u += load_at(bias, column, count);
      return Gelu::value(u);
    };
    const int64_t in_twos = task.x.width / (2 * kLanes) * (2 * kLanes);
    for (int64_t column = 0; column < in_twos; column += 2 * kLanes) {
      store_two(out + column, value(column, kLanes), value(column + kLanes, kLanes));
    }
    each_vector(task.x.width - in_twos, [&](int64_t more, int64_t count) VQKERNELS_INLINE {
      store_at(out, in_twos + more, count, value(in_twos + more, count));
    });
  }
}

inline void bias_gelu(const BiasGelu& task, int64_t begin, int64_t end) {
  dispatch(task.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (task.tanh) {
      bias_gelu_rows<TanhGelu<T>, T>(task, begin, end);
    } else {
      bias_gelu_rows<ErfGelu<T>, T>(task, begin, end);
    }
  });
}

template <typename Gelu, typename T, int kRows>
inline void bias_gelu_backward_group(const BiasGeluBackward& task, int64_t row, float* sums) {
  const T *x[kRows], *grad[kRows];
  T* grad_x[kRows];
  const float* bias = task.bias;
  for (int r = 0; r < kRows; ++r) {
    x[r] = row_at<const T>(task.x, row + r);
    grad[r] = row_at<const T>(task.grad, row + r);
    grad_x[r] = row_at<T>(task.grad_x, row + r);
  }
  each_vector(task.x.width, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
    const vf added = bias != nullptr ? load_at(bias, column, count) : vf{};
    vf terms[kRows];
    for (int r = 0; r < kRows; ++r) {
      const vf slope = Gelu::slope(load_at(x[r], column, count) + added);
      terms[r] = load_at(grad[r], column, count) * slope;
      store_at(grad_x[r], column, count, terms[r]);
    }
    if (sums != nullptr) add_to(sums, column, count, terms);
  });
}

template <typename Gelu, typename T>
inline void bias_gelu_backward_chunks(const BiasGeluBackward& task, int64_t chunk_begin,
                                      int64_t chunk_end) {
  const int64_t width = task.x.width;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    float* sums = task.bias_sums != nullptr ? task.bias_sums + chunk * width : nullptr;
    if (sums != nullptr) std::fill(sums, sums + width, 0.0f);
    each_group(
        task.chunks.begin(chunk), task.chunks.end(chunk), task.chunks.rows_each, [](int64_t) {},
        [&](int64_t row, auto rows) {
          bias_gelu_backward_group<Gelu, T, decltype(rows)::value>(task, row, sums);
        });
  }
}

inline void bias_gelu_backward(const BiasGeluBackward& task, int64_t chunk_begin,
                               int64_t chunk_end) {
  dispatch(task.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (task.tanh) {
      bias_gelu_backward_chunks<TanhGelu<T>, T>(task, chunk_begin, chunk_end);
    } else {
      bias_gelu_backward_chunks<ErfGelu<T>, T>(task, chunk_begin, chunk_end);
    }
  });
}

}  // namespace
}  // namespace vqkernels
