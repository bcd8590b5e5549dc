// A codebook prepared for the search: centred, scaled by a power of two, in panels of kPanelWidth
// codes.
//
// A panel holds each code's start (|c'|^2 / 2 for l2, else 0), then -c' element by element, so that
// start + sum_d x'_d (-c'_d) is the score to minimise. A code that must never be found (a NaN, an
// infinity, a repetition, padding) starts at +infinity; a finite code too large for fp32 starts at
// -infinity, which sends every row to the full float64 search.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

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

constexpr int kVectors = kPanelWidth / kLanes;  // vectors a panel row
constexpr int32_t kMagic = 0x76716b31;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLargestSquare = 1e36;

// The header words of a packed book, and the frame in which x and codes are compared.
struct Frame {
  int32_t magic, version, panel_width, metric, codebook_size, dim;
  float scale;
  int32_t ordered;  // whether a tree ordered the panels; else they follow the book
  int32_t unused[kHeaderWords - 8];

  const float* centre() const { return reinterpret_cast<const float*>(this + 1); }
};
static_assert(sizeof(Frame) == kHeaderWords * sizeof(float));

// Norms that bound the errors of each panel's scores; see `candidates.h`.
struct PanelBounds {
  float* code;   // max |c'| over the panel
  float* error;  // max |c' - what the int8 screen holds of it|

  PanelBounds from(int64_t panel) const { return {code + panel, error + panel}; }
};

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

// Sum of squares in float64, in eight interleaved parts.
inline double sum_of_squares(const float* row, int64_t width) {
  double parts[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8) {
    for (int i = 0; i < 8; ++i) parts[i] += double(row[d + i]) * row[d + i];
  }
  for (; d < width; ++d) parts[0] += double(row[d]) * row[d];
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

// Centre: the mean of at most 512 codes, so that an offset common to all codes costs no accuracy.
// Scale: a power of two that brings the typical code to order 1, so that nothing underflows.
inline void choose_frame(const Codebook& book, float* out) {
  constexpr int64_t kSample = 512;
  const int64_t codes = book.codes.count, dim = book.codes.width;
  const int64_t stride = codes > kSample ? codes / kSample : 1;
  const int64_t sampled = std::min(codes, kSample);

  auto* frame = reinterpret_cast<Frame*>(out);
  float* centre = out + kHeaderWords;
  *frame = Frame{kMagic,
                 kKernelTableVersion,
                 kPanelWidth,
                 int32_t(book.metric),
                 int32_t(codes),
                 int32_t(dim),
                 1.0f,
                 0,
                 {}};
  std::memset(centre, 0, sizeof(float) * round_up(dim, 16));
  if (book.metric == Metric::cosine) return;

  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Scratch scratch(dim * 5);
    float* row = scratch.take<float>(dim);
    double* total = reinterpret_cast<double*>(scratch.take<float>(dim * 2));
    double* squares = reinterpret_cast<double*>(scratch.take<float>(dim * 2));
    std::fill(total, total + dim, 0.0);
    std::fill(squares, squares + dim, 0.0);
    int64_t used = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      load_row<T>(book.codes, i * stride, row);
      if (!all_finite(row, dim)) continue;
      ++used;
      for (int64_t d = 0; d < dim; ++d) total[d] += row[d];
      for (int64_t d = 0; d < dim; ++d) squares[d] += double(row[d]) * row[d];
    }
    if (used == 0) return;
    double spread = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double mean = book.metric == Metric::l2 ? total[d] / double(used) : 0.0;
      centre[d] = float(mean);
      spread += std::max(0.0, squares[d] / double(used) - mean * mean);
    }
    const double typical = std::sqrt(spread / double(dim));
    if (typical > 0) {
      frame->scale = std::ldexp(1.0f, std::clamp(-std::ilogb(typical), -120, 120));
    }
  });
}

// A code as the search sees it, in place: (c - centre) * scale, or c / |c| for cosine.
inline void frame_code(const Frame& frame, float* row) {
  if (Metric(frame.metric) == Metric::cosine) {
    const double square = sum_of_squares(row, frame.dim);
    const double factor = square > 0 ? 1 / std::sqrt(square) : 0;
    for (int64_t d = 0; d < frame.dim; ++d) row[d] = float(row[d] * factor);
  } else {
    const float* centre = frame.centre();
    for (int64_t d = 0; d < frame.dim; ++d) row[d] = (row[d] - centre[d]) * frame.scale;
  }
}

// Reads a code into `row`, framed and padded with zeros to a multiple of
// 16, and returns its start.
template <typename T>
inline float read_code(const Codebook& book, const Frame& frame, int64_t code, float* row,
                       float* norm) {
  const int64_t dim = book.codes.width;
  for (int64_t d = dim; d < round_up(dim, 16); ++d) row[d] = 0;
  *norm = 0;
  float start = kInfinity;
  if (code < book.codes.count) {
    load_row<T>(book.codes, code, row);
    if (all_finite(row, dim)) {
      frame_code(frame, row);
      const double square = sum_of_squares(row, dim);
      start = book.metric == Metric::l2 ? float(square * 0.5) : 0.0f;
      if (square <= kLargestSquare) {
        *norm = float(std::sqrt(square) * (1 + 1e-6));
        return start;
      }
      start = -kInfinity;
    }
  }
  std::memset(row, 0, sizeof(float) * dim);
  return start;
}

template <typename T>
inline void pack_panel(const Codebook& book, const Frame& frame, int64_t panel, float* row,
                       float* out, float* largest_code) {
  const int64_t dim = book.codes.width;
  *largest_code = 0;
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    float norm;
    out[lane] = read_code<T>(book, frame, panel * kPanelWidth + lane, row, &norm);
    *largest_code = std::max(*largest_code, norm);
    float* column = out + kPanelWidth + lane;
    for (int64_t d = 0; d < dim; ++d) column[d * kPanelWidth] = -row[d];
  }
}

// fp32 panels [begin, end) to `panels`, and their bounds.
inline void pack_fp32(const Codebook& book, const float* frame, int64_t begin, int64_t end,
                      float* panels, const PanelBounds& bounds) {
  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t dim = book.codes.width;
    auto row = std::make_unique<float[]>(round_up(dim, 16));
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel<T>(book, *reinterpret_cast<const Frame*>(frame), panel, row.get(),
                    panels + (panel - begin) * panel_words(dim), bounds.code + (panel - begin));
      bounds.error[panel - begin] = 0;
    }
  });
}

// ---- repeated codes ------------------------------------------------------------------------

template <typename T>
inline uint64_t hash_code(const Rows& codes, int64_t code) {
  constexpr int64_t kElements = 16;
  const T* from = static_cast<const T*>(codes.data) + codes.offset(code);
  const int64_t step = codes.width > kElements ? codes.width / kElements : 1;
  uint64_t hash = 0x9e3779b97f4a7c15;
  for (int64_t d = 0; d < codes.width; d += step) {
    uint64_t bits = 0;
    std::memcpy(&bits, &from[d * codes.col_stride], sizeof(T));
    hash = (hash ^ bits) * 0xff51afd7ed558ccd;
    hash ^= hash >> 32;
  }
  return hash;
}

template <typename T>
inline bool same_code(const Rows& codes, int64_t a, int64_t b) {
  const T* first = static_cast<const T*>(codes.data) + codes.offset(a);
  const T* second = static_cast<const T*>(codes.data) + codes.offset(b);
  for (int64_t d = 0; d < codes.width; ++d) {
    const int64_t at = d * codes.col_stride;
    if (std::memcmp(first + at, second + at, sizeof(T)) != 0) return false;
  }
  return true;
}

// Calls hide(code) for every code that equals an earlier one.
template <typename F>
inline void for_each_duplicate(const Rows& codes, const F& hide) {
  dispatch(codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    int64_t slots = 64;
    while (slots < codes.count * 2) slots *= 2;
    auto table = std::make_unique<int32_t[]>(slots);  // code + 1, or 0
    for (int64_t code = 0; code < codes.count; ++code) {
      int64_t slot = int64_t(hash_code<T>(codes, code) & uint64_t(slots - 1));
      for (;; slot = (slot + 1) & (slots - 1)) {
        if (table[slot] == 0) {
          table[slot] = int32_t(code + 1);
          break;
        }
        if (same_code<T>(codes, table[slot] - 1, code)) {
          hide(code);
          break;
        }
      }
    }
  });
}

}  // namespace
}  // namespace vqkernels
