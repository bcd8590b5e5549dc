// A codebook prepared for the search: centred, scaled by a power of two, in panels.
//
// A panel holds kPanelWidth codes: first each code's start (|c'|^2 / 2 for l2, else 0), then -c'
// element by element, so that start + sum_d x'_d (-c'_d) is the score to minimise. A code with a
// NaN or an infinity starts at +infinity and is never found; a finite code too large for fp32
// starts at -infinity, which sends every row to float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernel_table.h"
#include "scratch.h"
#include "simd.h"

namespace vqkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kPanelWidth = 32;
#else
constexpr int kPanelWidth = 16;
#endif

constexpr int32_t kMagic = 0x76716b31;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLargestSquare = 1e36;

// The header words of a packed book, and the frame in which x and codes are compared.
struct Frame {
  int32_t magic, version, panel_width, metric, codebook_size, dim;
  float scale;
  int32_t unused[kHeaderWords - 7];
  const float* centre() const { return reinterpret_cast<const float*>(this + 1); }
};
static_assert(sizeof(Frame) == kHeaderWords * sizeof(float));

inline int64_t panel_words(int64_t dim) { return kPanelWidth * (dim + 1); }

template <typename T>
inline void load_row(const Rows& rows, int64_t row, float* out) {
  const T* from = static_cast<const T*>(rows.data) + rows.offset(row);
  if (rows.col_stride == 1) {
    for (int64_t d = 0; d < rows.width; ++d) out[d] = to_float(from[d]);
  } else {
    for (int64_t d = 0; d < rows.width; ++d) out[d] = to_float(from[d * rows.col_stride]);
  }
}

inline bool all_finite(const float* row, int64_t width) {
  int32_t finite = 1;
  for (int64_t d = 0; d < width; ++d) finite &= std::fabs(row[d]) < kInfinity;
  return finite != 0;
}

// Centre: the mean of at most 512 codes, so that an offset common to all codes costs no accuracy.
// Scale: a power of two that brings the typical code to order 1, so that nothing underflows.
inline void choose_frame(const Codebook& book, float* header_and_centre) {
  constexpr int64_t kSample = 512;
  const int64_t codes = book.codes.count, dim = book.codes.width;
  const int64_t stride = codes > kSample ? codes / kSample : 1;
  const int64_t sampled = codes < kSample ? codes : kSample;

  auto* frame = reinterpret_cast<Frame*>(header_and_centre);
  float* centre = header_and_centre + kHeaderWords;
  *frame = Frame{kMagic,         kKernelTableVersion, kPanelWidth, int32_t(book.metric),
                 int32_t(codes), int32_t(dim),        1.0f,        {}};
  std::memset(centre, 0, sizeof(float) * centre_words(dim));
  if (book.metric == Metric::cosine) return;

  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Scratch scratch(dim * 3);
    float* row = scratch.take<float>(dim);
    double* total = reinterpret_cast<double*>(scratch.take<float>(dim * 2));
    for (int64_t d = 0; d < dim; ++d) total[d] = 0;
    double squares = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      load_row<T>(book.codes, i * stride, row);
      if (!all_finite(row, dim)) continue;
      ++used;
      for (int64_t d = 0; d < dim; ++d) total[d] += row[d];
      for (int64_t d = 0; d < dim; ++d) squares += double(row[d]) * row[d];
    }
    if (used == 0) return;
    if (book.metric == Metric::l2) {
      for (int64_t d = 0; d < dim; ++d) centre[d] = float(total[d] / double(used));
      squares = 0;
      for (int64_t i = 0; i < sampled; ++i) {
        load_row<T>(book.codes, i * stride, row);
        if (!all_finite(row, dim)) continue;
        for (int64_t d = 0; d < dim; ++d) {
          squares += (double(row[d]) - centre[d]) * (double(row[d]) - centre[d]);
        }
      }
    }
    const double typical = std::sqrt(squares / double(used * dim));
    if (typical > 0) frame->scale = std::ldexp(1.0f, std::min(120, std::max(-120, -std::ilogb(typical))));
  });
}

template <typename T>
inline void pack_panel(const Codebook& book, const Frame& frame, int64_t panel, float* row,
                       float* out) {
  const int64_t dim = book.codes.width;
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    const int64_t code = panel * kPanelWidth + lane;
    float* column = out + kPanelWidth + lane;
    bool usable = code < book.codes.count;
    if (usable) {
      load_row<T>(book.codes, code, row);
      usable = all_finite(row, dim);
    }
    if (!usable) {
      out[lane] = kInfinity;
      for (int64_t d = 0; d < dim; ++d) column[d * kPanelWidth] = 0;
      continue;
    }
    if (book.metric == Metric::cosine) {
      double squares = 0;
      for (int64_t d = 0; d < dim; ++d) squares += double(row[d]) * row[d];
      const double factor = squares > 0 ? 1 / std::sqrt(squares) : 0;
      for (int64_t d = 0; d < dim; ++d) row[d] = float(row[d] * factor);
    } else {
      const float* centre = frame.centre();
      for (int64_t d = 0; d < dim; ++d) row[d] = (row[d] - centre[d]) * frame.scale;
    }
    double squares[8] = {};
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
      for (int i = 0; i < 8; ++i) squares[i] += double(row[d + i]) * row[d + i];
    }
    for (; d < dim; ++d) squares[0] += double(row[d]) * row[d];
    double square = 0;
    for (double part : squares) square += part;
    const float start = book.metric == Metric::l2 ? float(square * 0.5) : 0.0f;
    out[lane] = square <= kLargestSquare ? start : -kInfinity;
    const bool representable = square <= kLargestSquare;
    for (int64_t e = 0; e < dim; ++e) column[e * kPanelWidth] = representable ? -row[e] : 0.0f;
  }
}

inline void pack_panels(const Codebook& book, const float* frame, int64_t panel_begin,
                        int64_t panel_end, float* panels) {
  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t dim = book.codes.width;
    auto row = std::make_unique<float[]>(dim);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      pack_panel<T>(book, *reinterpret_cast<const Frame*>(frame), panel, row.get(),
                    panels + (panel - panel_begin) * panel_words(dim));
    }
  });
}

}  // namespace
}  // namespace vqkernels
