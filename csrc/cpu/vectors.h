// Vectors of floats read from and written to every floating format, and 2^x.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/dtypes.h"
#include "simd.h"

#define VQKERNELS_INLINE __attribute__((always_inline))

namespace vqkernels {
namespace {

typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

inline vu load_halves(const void* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#endif
  vu16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, vu);
}

inline void store_halves(void* p, vu bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
  return;
#endif
  const vu16 narrow = __builtin_convertvector(bits, vu16);
  std::memcpy(p, &narrow, sizeof(narrow));
}

inline vf load(const bfloat16_t* p) { return (vf)(load_halves(p) << 16); }

// As `to_float` in dtypes.h does it.
inline vf load(const half_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  const vu bits = load_halves(p), magnitude = (bits & 0x7fff) << 13;
  const vu scaled = (vu)((vf)magnitude * 0x1p112f);
  const vu special = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (vf)(scaled | special | (bits & 0x8000) << 16);
#endif
}

inline void store(bfloat16_t* p, vf v) {
#if defined(__AVX512BF16__)
  // One instruction, which takes numbers below 2^-126 for zeros.
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &narrow, sizeof(narrow));
  return;
#endif
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu is_nan = (vu)((bits & 0x7fffffff) > 0x7f800000);
  store_halves(p, (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan));
}

inline void store(half_t* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = from_float<half_t>(v[lane]);
#endif
}

// Two vectors next to each other.
template <typename T>
inline void store_two(T* p, vf first, vf second) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(p, &both, sizeof(both));
    return;
  }
#endif
  store(p, first);
  store(p + kLanes, second);
}

// The first `count` lanes, zeros behind them.
template <typename T>
inline vf load_some(const T* p, int64_t count) {
  T padded[kLanes] = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 some = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(some, p);
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(some, p);
    std::memcpy(padded, &bits, sizeof(padded));
    return load(padded);
  }
#endif
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store_some(T* p, vf v, int64_t count) {
  T padded[kLanes];
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 some = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, some, (__m512)v);
  if constexpr (sizeof(T) == 2) {
    store(padded, v);
    __m256i bits;
    std::memcpy(&bits, padded, sizeof(bits));
    return _mm256_mask_storeu_epi16(p, some, bits);
  }
#endif
  store(padded, v);
  std::memcpy(p, padded, size_t(count) * sizeof(T));
}

// Zeros from lane `count` on.
inline vf first_lanes(vf v, int64_t count) {
  if (count == kLanes) return v;
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t lane = count; lane < kLanes; ++lane) lanes[lane] = 0;
  return load(lanes);
}

// Calls f(column, how many) for the vectors of a row; the last one may be short.
template <typename F>
inline __attribute__((always_inline)) void each_vector(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) f(column, int64_t(kLanes));
  if (column < columns) f(column, columns - column);
}

template <typename T>
inline vf load_at(const T* row, int64_t column, int64_t count) {
  return count == kLanes ? load(row + column) : load_some(row + column, count);
}

template <typename T>
inline void store_at(T* row, int64_t column, int64_t count, vf v) {
  if (count == kLanes) {
    store(row + column, v);
  } else {
    store_some(row + column, v, count);
  }
}

// Halves are added to halves, so that the order is the same wherever lanes are as many.
inline float sum_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) v[lane] += v[lane + width];
  }
  return v[0];
}

// Rows become columns: 32-bit words of kLanes vectors.
inline void transpose(vu (&rows)[kLanes]) {
#if defined(__AVX512F__)
  // Pairs of 32, of 64, then of 128 bits change places, each time between rows further apart.
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = (__m512i)rows[i];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    rows[j] = (vu)_mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    rows[j + 8] = (vu)_mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
  }
#else
  uint32_t words[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) words[j][i] = rows[i][j];
  }
  std::memcpy(rows, words, sizeof(words));
#endif
}

inline float largest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

// 2^f for |f| <= 1/2. The relative error is 7.5e-8 with five terms and 7.5e-5 with three (minimax),
// and that of fp32 itself.
template <int kTerms>
inline vf exp2_of_fraction(vf f) {
  static_assert(kTerms == 3 || kTerms == 5);
  vf y;
  if constexpr (kTerms == 5) {
    y = multiply_add(splat(0x1.5c08e6p-10f), f, splat(0x1.3d0c52p-7f));
    y = multiply_add(y, f, splat(0x1.c6b6e4p-5f));
    y = multiply_add(y, f, splat(0x1.ebf918p-3f));
    y = multiply_add(y, f, splat(0x1.62e428p-1f));
    return multiply_add(y, f, splat(1.0f));
  } else {
    y = multiply_add(splat(0x1.c3f760p-5f), f, splat(0x1.f0de1ap-3f));
    y = multiply_add(y, f, splat(0x1.62f31ap-1f));
    return multiply_add(y, f, splat(0x1.fff692p-1f));
  }
}

// What brings the nearest integer into a float's low bits when added to it.
constexpr float kToInteger = 0x1.8p23f;

// 2^x for x <= 127; 0 below -126. `kBounded` says that x is no less than -200.
template <int kTerms, bool kBounded = false>
inline vf exp2(vf x) {
  const vf clamped = kBounded ? x : maximum(splat(-200.0f), x);  // also -inf; a NaN stays
#if defined(__AVX512F__)
  const vf whole = (vf)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT);
  const vf y = exp2_of_fraction<kTerms>(clamped - whole);
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  const vf shifted = clamped + kToInteger;
  const vf y = exp2_of_fraction<kTerms>(clamped - (shifted - kToInteger));
  const vu scaled = (vu)y + ((vu)shifted << 23);
  return (vf)(scaled & ~(vu)(clamped < -126.0f));
#endif
}

// 2^(x * factor - whole) for an integer `whole`, where that is surely within 2^-120 and 2^120.
template <int kTerms>
inline vf exp2_within(vf x, vf factor, float whole) {
  const vf start = splat(kToInteger - whole);
  const vf shifted = multiply_add(x, factor, start);
  const vf f = multiply_add(x, factor, start - shifted);
  return (vf)((vu)exp2_of_fraction<kTerms>(f) + ((vu)shifted << 23));
}

}  // namespace
}  // namespace vqkernels
