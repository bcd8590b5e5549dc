// One vector of floats, as wide as the instruction set this file is compiled for. GCC's and Clang's
// vector types carry the arithmetic; only what they cannot say is spelled out. Everything is in an
// anonymous namespace, since every instruction set compiles it again.
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

// Roundings of one `multiply_add`.
#if defined(__AVX512F__) || defined(__AVX2__) || defined(VQKERNELS_NEON)
constexpr int kRoundings = 1;
#else
constexpr int kRoundings = 2;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

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

// a * b + c, fused where the instruction set has it. Kernels call this, never `a * b + c`, so that
// one sum gives the same bits wherever it is computed.
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

inline vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(VQKERNELS_NEON)
  return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

inline float smallest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)v);
#endif
  float least = v[0];
  for (int lane = 1; lane < kLanes; ++lane) least = v[lane] < least ? v[lane] : least;
  return least;
}

// Bit `lane` is set where a <= b; a NaN sets none.
inline uint32_t lanes_not_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#else
#if defined(VQKERNELS_NEON)
  if (vmaxvq_u32(vcleq_f32((float32x4_t)a, (float32x4_t)b)) == 0) return 0;
#endif
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t(a[lane] <= b[lane]) << lane;
  return mask;
#endif
}

}  // namespace
}  // namespace vqkernels
