// One vector of floats and one of 32-bit integers, as wide as the instruction set this file is
// compiled for. GCC's and Clang's vector types carry the arithmetic; only what they cannot say
// (fused multiply-add, minimum) is spelled out. Everything is in an anonymous namespace, since
// every instruction set compiles it again.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(VQKERNELS_NEON)
#include <arm_neon.h>
#endif

namespace vqkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline vi load(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof(v)); }

inline vf splat(float value) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(value);
#else
  return vf{value, value, value, value};
#endif
}

inline vi splat(int32_t value) {
#if defined(__AVX512F__)
  return (vi)_mm512_set1_epi32(value);
#elif defined(__AVX2__)
  return (vi)_mm256_set1_epi32(value);
#else
  return vi{value, value, value, value};
#endif
}

// a * b + c. Fused where the instruction set has it; two roundings on the portable path. Kernels
// call this, never `a * b + c`, so that one sum gives the same bits wherever it is computed.
inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(VQKERNELS_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return c + a * b;
#endif
}

inline vf minimum(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(VQKERNELS_NEON)
  return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a < b ? a : b;
#endif
}

// Where a < least: least = a and label = value.
inline void keep_smaller(vf a, vi value, vf& least, vi& label) {
#if defined(__AVX512F__)
  const __mmask16 smaller = _mm512_cmp_ps_mask((__m512)a, (__m512)least, _CMP_LT_OQ);
  label = (vi)_mm512_mask_mov_epi32((__m512i)label, smaller, (__m512i)value);
#else
  const vi smaller = a < least;
  label = (smaller & value) | (~smaller & label);
#endif
  least = minimum(a, least);
}

}  // namespace
}  // namespace vqkernels
