// Products of small tiles: rows of words on the left, each broadcast, vectors on the right.
//
//   out[r][column] = sum over steps of left[r][step] * right[step][column]
//
// A word holds one fp32 number, or two bf16 numbers that are neighbours along the sum; vdpbf16ps
// multiplies and adds both. The right operand is packed into panels: for each step, kColumns
// vectors of words one after another. What the loop needs: one load a vector and step, one
// broadcast a row and step, and as many multiply-adds as accumulators.
#pragma once

#include "vectors.h"

namespace vqkernels {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Products = true;
#else
constexpr bool kHasBf16Products = false;
#endif

// Rows and vectors whose sums stay in registers.
constexpr int kProductRows = 6;
#if defined(__AVX512F__) || defined(VQKERNELS_NEON)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif

struct Fp32Words {
  using Word = float;
  static constexpr int kNumbers = 1;  // of a word
  static constexpr int kExpTerms = 5;

  static vf add(vf sum, Word left, vf right) { return multiply_add(splat(left), right, sum); }
};

#if defined(__AVX512BF16__)
struct Bf16Words {
  using Word = uint32_t;
  static constexpr int kNumbers = 2;
  static constexpr int kExpTerms = 3;

  static vf add(vf sum, Word left, vf right) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)),
                                (__m512bh)right);
  }
};
#endif

// One block of rows and vectors. `right` has `vectors` vectors a step, of which this block takes
// kVectors from the first one it points to.
template <typename Words, int kRows, int kVectors, typename Store>
inline __attribute__((always_inline)) void multiply_block(const typename Words::Word* left,
                                                          int64_t left_stride, const float* right,
                                                          int64_t right_stride, int64_t steps,
                                                          const Store& put) {
  vf sums[kRows][kVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    vf b[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) b[c] = load(right + step * right_stride + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto a = left[r * left_stride + step];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sums[r][c] = Words::add(sums[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) put(r, c, sums[r][c]);
  }
}

// put(row, vector, sum) for `rows` rows and kVectors vectors of a panel.
template <typename Words, int kVectors, typename Store>
inline void multiply_rows(const typename Words::Word* left, int64_t left_stride, int64_t rows,
                          const float* right, int64_t right_stride, int64_t steps,
                          const Store& put) {
  int64_t row = 0;
  const auto shifted = [&](int r, int c, vf sum) { put(row + r, c, sum); };
  for (; row + kProductRows <= rows; row += kProductRows) {
    multiply_block<Words, kProductRows, kVectors>(left + row * left_stride, left_stride, right,
                                                  right_stride, steps, shifted);
  }
  if (row + 4 <= rows) {
    multiply_block<Words, 4, kVectors>(left + row * left_stride, left_stride, right, right_stride,
                                       steps, shifted);
    row += 4;
  }
  if (row + 2 <= rows) {
    multiply_block<Words, 2, kVectors>(left + row * left_stride, left_stride, right, right_stride,
                                       steps, shifted);
    row += 2;
  }
  if (row < rows) {
    multiply_block<Words, 1, kVectors>(left + row * left_stride, left_stride, right, right_stride,
                                       steps, shifted);
  }
}

// The right operand: `columns` numbers wide, padded to whole vectors with zeros; `steps` words
// long. Panels of equal width (the last may be narrower) lie one after another.
struct Panels {
  float* data;
  int64_t vectors, steps, widest;  // vectors in all, words, vectors of a panel

  static int64_t vectors_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
  static int64_t floats(int64_t columns, int64_t steps) {
    return vectors_of(columns) * kLanes * steps;
  }

  Panels(float* data, int64_t columns, int64_t steps)
      : data(data), vectors(vectors_of(columns)), steps(steps) {
    const int64_t panels = (vectors + kProductVectors - 1) / kProductVectors;
    widest = panels == 0 ? 1 : (vectors + panels - 1) / panels;
  }

  int64_t width_of_panel(int64_t first) const { return std::min(widest, vectors - first); }
  float* panel(int64_t first) const { return data + first * kLanes * steps; }
  // Where vector `vector` of step `step` lies.
  float* at(int64_t vector, int64_t step) const {
    const int64_t first = vector / widest * widest;
    return panel(first) + (step * width_of_panel(first) + vector - first) * kLanes;
  }
};

// put(row, vector, sum) for all vectors of the panels.
template <typename Words, typename Store>
inline void multiply(const typename Words::Word* left, int64_t left_stride, int64_t rows,
                     const Panels& right, const Store& put) {
  for (int64_t first = 0; first < right.vectors; first += right.widest) {
    const int64_t width = right.width_of_panel(first), stride = width * kLanes;
    const float* panel = right.panel(first);
    const auto shifted = [&](int64_t r, int c, vf sum) { put(r, first + c, sum); };
    switch (width) {
      case 1:
        multiply_rows<Words, 1>(left, left_stride, rows, panel, stride, right.steps, shifted);
        break;
      case 2:
        multiply_rows<Words, 2>(left, left_stride, rows, panel, stride, right.steps, shifted);
        break;
#if defined(__AVX512F__) || defined(VQKERNELS_NEON)
      case 3:
        multiply_rows<Words, 3>(left, left_stride, rows, panel, stride, right.steps, shifted);
        break;
      default:
        multiply_rows<Words, 4>(left, left_stride, rows, panel, stride, right.steps, shifted);
#endif
    }
  }
}

}  // namespace
}  // namespace vqkernels
