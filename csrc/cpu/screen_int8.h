// The int8 screen: scores from 8-bit integers, four products a lane and instruction.
//
// A code is held as gamma q with q in [-127, 127], a row as xi u likewise, each with its own scale.
// With the errors e_c = c' - gamma q and e_x = x' - xi u, Cauchy and Schwarz bound what the integer
// product misses: |x'.c' - xi gamma u.q| <= |xi u| |e_c| + |e_x| |c'|, all norms measured.
// Codes are stored as q + 128, since the instruction multiplies unsigned by signed; the sum
// starts at -128 sum(u) to take that back.
#pragma once

#include "candidates.h"

#if defined(__AVX512VNNI__)

namespace vqkernels {
namespace {

constexpr bool kInt8Screen = true;
constexpr int kInt8TileRows = 14;

// A panel: starts, scales gamma, then four bytes a code for every four elements.
inline int64_t int8_panel_words(int64_t dim) { return kPanelWidth * (round_up(dim, 4) / 4 + 2); }

// What the screen knows of a row beside its bytes.
struct Int8Row {
  float scale;    // xi
  int32_t start;  // -128 sum(u)
};

// A vector as bytes: round(v * inverse), with the sums that the row and its bound need.
struct Quantizer {
  __m512 inverse, scale, squares = _mm512_setzero_ps(), errors = _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();

  __m128i bytes(__m512 v) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
    const __m512 held = _mm512_mul_ps(_mm512_cvtepi32_ps(q), scale);
    const __m512 error = _mm512_sub_ps(v, held);
    squares = _mm512_fmadd_ps(held, held, squares);
    errors = _mm512_fmadd_ps(error, error, errors);
    sum = _mm512_add_epi32(sum, q);
    return _mm512_cvtepi32_epi8(q);
  }
};

// Quantizes one framed row, padded with zeros to whole vectors, into every `step`-th word of
// `tile`. norm and error bound |xi u| and |x' - xi u| from above. A row that is not finite gives
// zeros; the caller does not use its scores.
inline Int8Row quantize_row(const float* row, int64_t dim, int64_t step, uint32_t* tile,
                            float* norm, float* error) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += kLanes) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(row + d)));
  }
  const float most = _mm512_reduce_max_ps(largest);
  const bool usable = most > 0 && most < kInfinity;
  const float scale = usable ? most / 127 : 0;
  Quantizer quantizer{_mm512_set1_ps(usable ? 127 / most : 0), _mm512_set1_ps(scale)};
  const int64_t words = round_up(dim, 4) / 4;
  for (int64_t d = 0; d < dim; d += kLanes) {
    alignas(16) uint32_t four[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(four), quantizer.bytes(_mm512_loadu_ps(row + d)));
    for (int64_t w = d / 4; w < std::min(words, d / 4 + 4); ++w) tile[w * step] = four[w - d / 4];
  }
  *norm = std::sqrt(_mm512_reduce_add_ps(quantizer.squares)) * (1 + 1e-5f);
  *error = std::sqrt(_mm512_reduce_add_ps(quantizer.errors)) * (1 + 1e-5f) + *norm * 1e-6f;
  return {scale, -128 * _mm512_reduce_add_epi32(quantizer.sum)};
}

inline void pack_int8(const Codebook& book, const float* frame, int64_t begin, int64_t end,
                      float* panels, const PanelBounds& bounds) {
  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t dim = book.codes.width, words = round_up(dim, 4) / 4;
    auto row = std::make_unique<float[]>(round_up(dim, kLanes));
    auto bytes = std::make_unique<uint32_t[]>(words);
    for (int64_t panel = begin; panel < end; ++panel) {
      float* out = panels + (panel - begin) * int8_panel_words(dim);
      auto* codes = reinterpret_cast<uint32_t*>(out + 2 * kPanelWidth);
      float largest_code = 0, largest_error = 0;
      for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
        float norm, held, error;
        out[lane] = read_code<T>(book, *reinterpret_cast<const Frame*>(frame),
                                 panel * kPanelWidth + lane, row.get(), &norm);
        out[kPanelWidth + lane] = quantize_row(row.get(), dim, 1, bytes.get(), &held, &error).scale;
        largest_code = std::max(largest_code, norm);
        largest_error = std::max(largest_error, error);
        for (int64_t w = 0; w < words; ++w) {
          codes[w * kPanelWidth + lane] = bytes[w] ^ 0x80808080u;  // q + 128
        }
      }
      bounds.code[panel - begin] = largest_code;
      bounds.error[panel - begin] = largest_error;
    }
  });
}

// GCC 12 copies registers around the intrinsic of this instruction; spelled out it does not.
inline __m512i dot_bytes(__m512i sum, __m512i codes, __m512i row) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(row));
  return sum;
}

template <int R>
void score_int8(const uint32_t* tile, const Int8Row* rows, const float* panels, int64_t dim,
                int64_t count, float* least) {
  const int64_t steps = round_up(dim, 4) / 4;
  for (int64_t panel = 0; panel < count; ++panel) {
    const float* from = panels + panel * int8_panel_words(dim);
    const auto* code = reinterpret_cast<const uint32_t*>(from + 2 * kPanelWidth);
    __m512i sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_set1_epi32(rows[r].start);
    const uint32_t* row = tile;
    for (int64_t step = 0; step < steps; ++step, code += kPanelWidth, row += R) {
      const __m512i first = _mm512_loadu_si512(code), second = _mm512_loadu_si512(code + kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_set1_epi32(int32_t(row[r]));
        sums[r][0] = dot_bytes(sums[r][0], first, x);
        sums[r][1] = dot_bytes(sums[r][1], second, x);
      }
    }
    const __m512 start0 = _mm512_loadu_ps(from), start1 = _mm512_loadu_ps(from + kLanes);
    const __m512 scale0 = _mm512_loadu_ps(from + kPanelWidth);
    const __m512 scale1 = _mm512_loadu_ps(from + kPanelWidth + kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512 xi = _mm512_set1_ps(rows[r].scale);
      const __m512 product0 = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][0]), scale0);
      const __m512 product1 = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][1]), scale1);
      const __m512 score0 = _mm512_fnmadd_ps(xi, product0, start0);
      const __m512 score1 = _mm512_fnmadd_ps(xi, product1, start1);
      _mm512_storeu_ps(least + (panel * R + r) * kLanes, _mm512_min_ps(score0, score1));
    }
  }
}

using ScoreInt8 = void (*)(const uint32_t*, const Int8Row*, const float*, int64_t, int64_t, float*);

struct Int8Shape {
  int rows;
  ScoreInt8 score;
};

inline Int8Shape int8_shape(int64_t rows) {
  if (rows == 1) return {1, score_int8<1>};
  if (rows <= 4) return {4, score_int8<4>};
  if (rows <= 8) return {8, score_int8<8>};
  return {kInt8TileRows, score_int8<kInt8TileRows>};
}

}  // namespace
}  // namespace vqkernels

#else

namespace vqkernels {
namespace {
constexpr bool kInt8Screen = false;
}
}  // namespace vqkernels

#endif
