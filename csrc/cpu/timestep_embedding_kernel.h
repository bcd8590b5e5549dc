// Sinusoidal embedding. B x D / 2 pairs of sine and cosine; written so that the compiler
// vectorizes.
#pragma once

#include <cmath>

#include "kernel_table.h"

namespace vqkernels {
namespace {

// Quarter turns are removed in float64 (a rounding trick: adding 1.5 * 2^52 leaves the nearest
// integer in the low bits), which holds up to 2^50 of them; the rest lies within pi / 4, where ten
// terms of the series leave 2e-9.
inline void sine_cosine(double angle, float* sine, float* cosine) {
  constexpr double kRound = 0x1.8p52, kTwoOverPi = 0.63661977236758134308;
  constexpr double kHigh = 0x1.921fb54442d18p0, kLow = 0x1.1a62633145c07p-54;  // pi / 2
  const double shifted = angle * kTwoOverPi + kRound;
  const double turns = shifted - kRound;
  const uint64_t quadrant = bit_cast<uint64_t>(shifted);
  const double r = (angle - turns * kHigh) - turns * kLow, r2 = r * r;
  const double s =
      r + r * r2 * (-1 / 6.0 + r2 * (1 / 120.0 + r2 * (-1 / 5040.0 + r2 * (1 / 362880.0))));
  const double c = 1 + r2 * (-1 / 2.0 + r2 * (1 / 24.0 + r2 * (-1 / 720.0 + r2 * (1 / 40320.0))));
  // Odd quadrants swap the two, and bit 1 of the quadrant (of the next one for the cosine) negates.
  const uint64_t swap = 0 - (quadrant & 1), s_bits = bit_cast<uint64_t>(s);
  const uint64_t c_bits = bit_cast<uint64_t>(c), change = (s_bits ^ c_bits) & swap;
  *sine = float(bit_cast<double>(s_bits ^ change ^ ((quadrant & 2) << 62)));
  *cosine = float(bit_cast<double>(c_bits ^ change ^ (((quadrant + 1) & 2) << 62)));
}

// Rows [begin, end) of out [B, dim]: cosines, sines, and a zero if dim is odd.
inline void timestep_embedding(const float* t, const double* frequencies, int64_t dim,
                               int64_t begin, int64_t end, float* out) {
  const int64_t half = dim / 2;
  for (int64_t b = begin; b < end; ++b) {
    float* __restrict cosines = out + b * dim;
    float* __restrict sines = cosines + half;
    for (int64_t i = 0; i < half; ++i) {
      sine_cosine(double(t[b]) * frequencies[i], sines + i, cosines + i);
    }
    if (dim % 2 != 0) cosines[dim - 1] = 0;
    if (std::fabs(t[b]) > 0x1p49f) {
      for (int64_t i = 0; i < half; ++i) {
        cosines[i] = float(std::cos(double(t[b]) * frequencies[i]));
        sines[i] = float(std::sin(double(t[b]) * frequencies[i]));
      }
    }
  }
}

}  // namespace
}  // namespace vqkernels
