// Normal noise keyed by seed, sample, step, stream and element: Box-Muller on the words of
// common/philox.h. Every operation is one of IEEE 754, so that a GPU and the emulation give the
// same bits; they are within 1e-6 of the exact transform.
#pragma once

#include "../common/philox.h"
#include "language.h"

namespace vqkernels::cuda {

// sqrt(-2 log((word + 1) / 2^32)).
__device__ __forceinline__ float normal_radius(uint32_t word) {
  // Where the logarithm is near 0, the distance from 1 has the digits: a float of word + 1 has not.
  const bool near_one = word >= 0xC0000000u;
  const uint32_t bits = __float_as_uint(float(word + 1u));
  const int exponent = int(bits - 0x3f3504f3u) >> 23;  // puts the rest into [sqrt(1/2), sqrt(2))
  const float rest = __uint_as_float(bits - (uint32_t(exponent) << 23)) - 1.0f;
  const float f = near_one ? float(~word) * -0x1p-32f : rest;
  const float e = near_one ? 0.0f : float(exponent - 32);
  float p = 0.0867211893f;
  p = fmaf(p, f, -0.143790036f);
  p = fmaf(p, f, 0.149780124f);
  p = fmaf(p, f, -0.165644258f);
  p = fmaf(p, f, 0.199548736f);
  p = fmaf(p, f, -0.250016987f);
  p = fmaf(p, f, 0.333341658f);
  const float square = f * f;
  const float logarithm = fmaf(square * f, p, fmaf(square, -0.5f, f));
  return sqrtf(-2.0f * fmaf(e, 0.693147182f, logarithm));
}

// Cosine and sine of 2 pi word / 2^32. The nearest quarter of a turn is taken off as an integer;
// what is left fits a float.
__device__ __forceinline__ void turned(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarters = (word + 0x20000000u) >> 30;
  const float t = float(int32_t(word - (quarters << 30))) * 0x1p-32f;  // turns, at most 1/8
  const float square = t * t;
  float s = fmaf(square, -75.2400665f, 81.5881271f);
  s = fmaf(s, square, -41.3416290f);
  s = fmaf(s, square, 6.28318501f) * t;
  float c = fmaf(square, 59.2459602f, -85.4437408f);
  c = fmaf(c, square, 64.9393234f);
  c = fmaf(c, square, -19.7392082f);
  c = fmaf(c, square, 1.0f);
  const bool swapped = quarters & 1;
  cosine = swapped ? s : c;
  sine = swapped ? c : s;
  if ((quarters + 1) & 2) cosine = -cosine;
  if (quarters & 2) sine = -sine;
}

// The normals of one sample at one step.
struct Normals {
  uint64_t seed;
  uint32_t sample, step, stream;

  // Elements 4 * quad to 4 * quad + 3.
  __device__ __forceinline__ void four(uint32_t quad, float (&normals)[4]) const {
    uint32_t words[4] = {quad, sample, step, stream};
    philox4x32(words, seed);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float radius = normal_radius(words[i]);
      turned(words[i + 1], normals[i], normals[i + 1]);
      normals[i] *= radius;
      normals[i + 1] *= radius;
    }
  }

  // Elements from `first` on: a multiple of 4, or any one element.
  template <int kCount>
  __device__ __forceinline__ void from(int64_t first, float (&normals)[kCount]) const {
    static_assert(kCount == 1 || kCount % 4 == 0);
    float quad[4];
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      four(uint32_t((first + e) / 4), quad);
      if constexpr (kCount == 1) {
        const int at = int(first % 4);
        normals[0] = at < 2 ? (at == 0 ? quad[0] : quad[1]) : (at == 2 ? quad[2] : quad[3]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) normals[e + k] = quad[k];
      }
    }
  }
};

}  // namespace vqkernels::cuda
