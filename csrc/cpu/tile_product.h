// Products of small tiles: rows of words on the left, each broadcast, vectors on the right.
//
//   out[r][column] (+)= sum over steps of left[r][step] * right[step][column]
//
// A word holds one fp32 number, or two bf16 numbers that are neighbours along the sum; vdpbf16ps
// multiplies and adds both. The right operand is packed into panels: for each step, kColumns
// vectors of words one after another. What the loop needs: one load a vector and step, one
// broadcast a row and step, and as many multiply-adds as accumulators.
#pragma once

#include "vectors.h"

namespace vqkernels {
namespace {

// Rows and vectors whose sums stay in registers.
constexpr int kProductRows = 6;
#if defined(__AVX512F__) || defined(VQKERNELS_NEON)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif
// Where a head of 72 or 80 columns would waste half a vector of 16, half a vector is multiplied.
constexpr bool kHalves = kLanes == 16;
constexpr int kHalfRows = 2 * kProductRows;
typedef float vh __attribute__((vector_size(kLanes / 2 * 4)));

struct Fp32Words {
  using Word = float;
  static constexpr int kNumbers = 1;  // of a word
  static constexpr int kExpTerms = 5;

  static vf add(vf sum, Word left, vf right) { return multiply_add(splat(left), right, sum); }
  static vh add(vh sum, Word left, vh right) {
#if defined(__AVX512F__)
    return (vh)_mm256_fmadd_ps(_mm256_set1_ps(left), (__m256)right, (__m256)sum);
#endif
    return sum + left * right;
  }
  static vf add_squares(vf sum, vf words) { return multiply_add(words, words, sum); }
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
  static vh add(vh sum, Word left, vh right) {
    return (vh)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(int(left)),
                                (__m256bh)right);
  }
  static vf add_squares(vf sum, vf words) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)words);
  }
};
#endif

template <typename Words>
inline int64_t words_of(int64_t numbers) {
  return (numbers + Words::kNumbers - 1) / Words::kNumbers;
}

// The right operand: `columns` numbers wide, padded to whole vectors with zeros; `steps` words
// long. Panels of equal width (the last may be narrower) lie one after another; a last vector of
// which only half is used has a panel of its own.
struct Panels {
  float* data;
  int64_t vectors, steps;  // vectors in all, words
  bool half;               // whether the last vector is half used
  int64_t widest;          // vectors of a panel

  static int64_t vectors_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
  static int64_t floats(int64_t columns, int64_t steps) {
    return vectors_of(columns) * kLanes * steps;
  }

  Panels(float* data, int64_t columns, int64_t steps)
      : data(data), vectors(vectors_of(columns)), steps(steps) {
    const int64_t tail = columns % kLanes;
    half = kHalves && 0 < tail && tail <= kLanes / 2;
    const int64_t panels = (whole() + kProductVectors - 1) / kProductVectors;
    widest = panels == 0 ? 1 : (whole() + panels - 1) / panels;
  }

  int64_t whole() const { return vectors - half; }
  int64_t first_beside(int64_t vector) const {
    return vector < whole() ? vector / widest * widest : vector;
  }
  int64_t width_of_panel(int64_t first) const {
    return first < whole() ? std::min(widest, whole() - first) : 1;
  }
  float* panel(int64_t first) const { return data + first * kLanes * steps; }
  // Where vector `vector` of step 0 lies; the next step's is `apart(vector)` further.
  float* at(int64_t vector) const {
    const int64_t first = first_beside(vector);
    return panel(first) + (vector - first) * kLanes;
  }
  int64_t apart(int64_t vector) const { return width_of_panel(first_beside(vector)) * kLanes; }
};

// One left operand and where its products go. One function serves all products of a kind of words:
// what becomes of the sums is the next pass over a tile that lies in L1, so that the unrolled
// blocks are compiled once.
template <typename Words>
struct Product {
  const typename Words::Word* left;
  int64_t left_stride;
  float* out;
  int64_t out_stride;
  bool accumulate;  // adds to out

  Product from_row(int64_t row) const {
    return {left + row * left_stride, left_stride, out + row * out_stride, out_stride, accumulate};
  }
};

template <typename Words, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_block(const Product<Words>& product,
                                                          const float* right, int64_t steps) {
  vf sums[kRows][kVectors] = {};
  const auto* left = product.left;
  const int64_t left_stride = product.left_stride;
  for (int64_t step = 0; step < steps; ++step) {
    vf b[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) b[c] = load(right + (step * kVectors + c) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto a = left[r * left_stride + step];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sums[r][c] = Words::add(sums[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* out = product.out + r * product.out_stride;
    if (product.accumulate) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sums[r][c] += load(out + c * kLanes);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(out + c * kLanes, sums[r][c]);
  }
}

template <typename Words, int kVectors>
__attribute__((noinline)) void multiply_panel(const Product<Words>& product, int64_t rows,
                                              const float* right, int64_t steps) {
  int64_t row = 0;
  for (; row + kProductRows <= rows; row += kProductRows) {
    multiply_block<Words, kProductRows, kVectors>(product.from_row(row), right, steps);
  }
  for (; row + 4 <= rows; row += 4) {
    multiply_block<Words, 4, kVectors>(product.from_row(row), right, steps);
  }
  for (; row < rows; ++row) {
    multiply_block<Words, 1, kVectors>(product.from_row(row), right, steps);
  }
}

// Rows against half a vector; the other half of the sums is zero.
template <typename Words, int kRows>
inline __attribute__((always_inline)) void multiply_half_block(const Product<Words>& product,
                                                               const float* right, int64_t steps) {
  vh sums[kRows] = {};
  for (int64_t step = 0; step < steps; ++step, right += kLanes) {
    vh b;
    std::memcpy(&b, right, sizeof(b));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Words::add(sums[r], product.left[r * product.left_stride + step], b);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float* out = product.out + r * product.out_stride;
    vf sum = {};
    std::memcpy(&sum, &sums[r], sizeof(vh));
    store(out, product.accumulate ? sum + load(out) : sum);
  }
}

template <typename Words>
__attribute__((noinline)) void multiply_half_panel(const Product<Words>& product, int64_t rows,
                                                   const float* right, int64_t steps) {
  int64_t row = 0;
  for (; row + kHalfRows <= rows; row += kHalfRows) {
    multiply_half_block<Words, kHalfRows>(product.from_row(row), right, steps);
  }
  for (; row + 4 <= rows; row += 4) {
    multiply_half_block<Words, 4>(product.from_row(row), right, steps);
  }
  for (; row < rows; ++row) multiply_half_block<Words, 1>(product.from_row(row), right, steps);
}

template <typename Words>
inline void multiply(const Product<Words>& product, int64_t rows, const Panels& right) {
  for (int64_t first = 0; first < right.vectors; first += right.width_of_panel(first)) {
    Product<Words> part = product;
    part.out += first * kLanes;
    const float* panel = right.panel(first);
    if (kHalves && first == right.whole()) {
      multiply_half_panel<Words>(part, rows, panel, right.steps);
      return;
    }
    switch (right.width_of_panel(first)) {
      case 1:
        multiply_panel<Words, 1>(part, rows, panel, right.steps);
        break;
      case 2:
        multiply_panel<Words, 2>(part, rows, panel, right.steps);
        break;
#if defined(__AVX512F__) || defined(VQKERNELS_NEON)
      case 3:
        multiply_panel<Words, 3>(part, rows, panel, right.steps);
        break;
      default:
        multiply_panel<Words, 4>(part, rows, panel, right.steps);
#endif
    }
  }
}

}  // namespace
}  // namespace vqkernels
