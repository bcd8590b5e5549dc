// Forward and backward of a vector quantizer once each row's index is known.
// Bytes: rows x width read (x, and the gradient) and written once; codes stay in cache.
#pragma once

#include <cmath>
#include <limits>

#include "kernel_table.h"
#include "row_access.h"
#include "scratch.h"

namespace vqkernels {
namespace {

// Sums in sixteen interleaved parts: vectorizes, and loses less than one long sum.
struct Parts {
  static constexpr int kCount = 16;
  float values[kCount] = {};
  float total() const {
    float sum = 0;
    for (float value : values) sum += value;
    return sum;
  }
};

template <typename F>
inline Parts sum_over(int64_t width, const F& term) {
  Parts parts;
  int64_t d = 0;
  for (; d + Parts::kCount <= width; d += Parts::kCount) {
    for (int i = 0; i < Parts::kCount; ++i) parts.values[i] += term(d + i);
  }
  for (; d < width; ++d) parts.values[0] += term(d);
  return parts;
}

inline double quantize_rows(const Rows& x, const Rows& codes, const int64_t* indices,
                            const bool* kept, const Rows& out, int64_t row_begin, int64_t row_end) {
  const int64_t width = x.width;
  Scratch scratch(3 * width);
  float* x_buffer = scratch.take<float>(width);
  float* code_buffer = scratch.take<float>(width);
  float* out_buffer = scratch.take<float>(width);
  double sum = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* to = row_target(out, row, out_buffer);
    if (indices[row] < 0) {
      const bool hidden = kept != nullptr && !kept[row];
      std::fill(to, to + width, hidden ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    } else {
      const float* from = read_row(x, row, x_buffer);
      const float* code = read_row(codes, indices[row], code_buffer);
      std::copy(code, code + width, to);
      sum += sum_over(width, [&](int64_t d) {
               const float difference = from[d] - code[d];
               return difference * difference;
             }).total();
    }
    write_row(out, row, to);
  }
  return sum;
}

// grad = pass * g + on_x * x + on_code * code, before the loss's share.
struct GradientMix {
  float pass, on_x, on_code;
};

// The rotation trick (Fifty et al., arXiv:2410.06424): the code counts as lambda R x, where R turns
// x's direction u into the code's v and lambda is the ratio of their lengths, both constant:
// grad = lambda (g - 2 w (w.g) + 2 u (v.g)) with w = (u + v) / |u + v|.
inline GradientMix rotation_mix(const float* g, const float* x, const float* code, int64_t width) {
  constexpr double kEps = 1e-6;
  double xx = 0, cc = 0, cg = 0;
  for (int64_t d = 0; d < width; ++d) {
    xx += double(x[d]) * x[d];
    cc += double(code[d]) * code[d];
    cg += double(code[d]) * g[d];
  }
  const double norm_x = std::max(std::sqrt(xx), kEps), size = std::sqrt(cc);
  const double norm_c = std::max(size, kEps);
  // u + v cancels where x and the code are nearly opposite, so it is summed element by element.
  const double inverse_x = 1 / norm_x, inverse_c = 1 / norm_c;
  double w_square = 0, w_dot_g = 0;
  for (int64_t d = 0; d < width; ++d) {
    const double w = x[d] * inverse_x + code[d] * inverse_c;
    w_square += w * w;
    w_dot_g += w * g[d];
  }
  const double w_g = w_dot_g / std::max(w_square, kEps * kEps), v_g = cg / norm_c;
  const double lambda = size / norm_x;
  return {float(lambda), float(lambda * 2 * (v_g - w_g) / norm_x),
          float(lambda * -2 * w_g / norm_c)};
}

inline void quantize_backward_x(const Rows& x, const Rows& codes, const int64_t* indices,
                                const Rows* grad_quantized, Gradient gradient, float loss_scale,
                                const Rows& grad_x, int64_t row_begin, int64_t row_end) {
  const int64_t width = x.width;
  Scratch scratch(4 * width);
  float* x_buffer = scratch.take<float>(width);
  float* code_buffer = scratch.take<float>(width);
  float* grad_buffer = scratch.take<float>(width);
  float* out_buffer = scratch.take<float>(width);
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* to = row_target(grad_x, row, out_buffer);
    if (indices[row] < 0) {
      std::fill(to, to + width, 0.0f);
      write_row(grad_x, row, to);
      continue;
    }
    const float* from = read_row(x, row, x_buffer);
    const float* code = read_row(codes, indices[row], code_buffer);
    if (grad_quantized == nullptr || gradient == Gradient::none) {
      for (int64_t d = 0; d < width; ++d) to[d] = loss_scale * (from[d] - code[d]);
    } else {
      const float* g = read_row(*grad_quantized, row, grad_buffer);
      if (gradient == Gradient::straight_through) {
        for (int64_t d = 0; d < width; ++d) to[d] = g[d] + loss_scale * (from[d] - code[d]);
      } else {
        const GradientMix mix = rotation_mix(g, from, code, width);
        for (int64_t d = 0; d < width; ++d) {
          to[d] = mix.pass * g[d] + mix.on_x * from[d] + mix.on_code * code[d] +
                  loss_scale * (from[d] - code[d]);
        }
      }
    }
    write_row(grad_x, row, to);
  }
}

}  // namespace
}  // namespace vqkernels
