// What the search knows of rows and codes besides their half-precision form, and how sure it is.
//
// A search maximizes, for a row x and the codes c of its book,
//
//   l2      x'.c' - |c'|^2 / 2    with x' = x - m, c' = c - m for any m (the mean of some codes)
//   dot     x.c
//   cosine  x.c / |c|
//
// which differs from the metric by what is the same for every code. It sees half-precision forms
// x^ of 2^-e x' and c^ of 2^-f c', where 2^e and 2^f bring the largest entry of the row, and of the
// tile of codes, into [1, 2): no form overflows, and what underflows is counted as error. With
//
//   |x' 2^-e - x^| <= dx,   |c' 2^-f - c^| <= E,   |x' 2^-e| <= X,   |c^| <= C,
//
// Cauchy and Schwarz give |x'.c' 2^-(e+f) - x^.c^| <= dx C + X E. The bias B = |c'|^2 / 2 2^(-2f)
// goes through the products too, since a subtraction for each score costs more than one more
// tensor-core step: -B is the sum of parts times multipliers, the parts stand beside the code's
// form, the multipliers times w = 2^(f-e) beside the row's. What the parts leave of B is R.
//
// The tensor core adds its products in blocks of 8, aligned to the largest and cut off at 24 bits
// (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): 9 terms and
// one result, each off by at most 2^-23 of the largest sum, twice in each step of 16. That is X C,
// in the last step, the bias', X C + w B. So a score in units of 2^(e+f),
//
//   s = x^.c^ - B w,
//
// is off by at most  (dx + kPerStep (steps + 1) X) C + X E + w (kPerStep B + R) + kTiny. The
// measured norms are rounded up by kUp. Forms of three terms (few dimensions) follow in prepare.h.
// Half-precision inputs that are searched as they are have e = f = m = 0, dx = E = 0.
#pragma once

#include <type_traits>

#include "rows.h"

namespace vqkernels::cuda {

constexpr int kTileCodes = 128;  // codes of a tile
constexpr int kStep = 16;        // columns of one tensor-core step
constexpr int kChunk = 64;       // columns that lie together in shared memory
constexpr int kPiece = 8;        // columns of 16 bytes

constexpr float kPerStep = 21.0f / 8388608.0f;  // 20 of 2^-23, and the bound's own rounding
constexpr float kUp = 1.0f + 0x1p-10f;
constexpr float kTiny = 0x1p-118f;       // products below the range of fp32
constexpr float kLargestNorm = 0x1p60f;  // beyond it a sum of products may overflow

struct alignas(16) RowTerms {
  float scale;  // 2^-e; NaN for a row that is not finite
  float error;  // dx + kPerStep (steps + 1) X; +inf: not to be decided by the search
  float norm;   // X, at least 2^-100
  float unused;
};

// Terms of a half-precision row that is searched as it is, from its sum of squares.
__device__ __forceinline__ RowTerms terms_of_halves(float squares, bool finite, bool zero,
                                                    int steps) {
  const float norm = sqrtf(squares) * kUp;
  // The sum of squares has left the range: nothing is known of the norm.
  const bool known = norm < kLargestNorm && (norm > 0x1p-60f || zero);
  const float error = kPerStep * float(steps + 1) * norm;
  return {finite ? 1.0f : NAN, known ? error : INFINITY, fmaxf(norm, 0x1p-100f), 0};
}

// What the uncertainty of a score follows from: kPerStep B + R, C and E of a code; an error of +inf
// is not to be decided by the search.
struct alignas(16) CodeTerms {
  float bias;
  float norm;
  float error;
  float unused;
};

// The largest of these in a tile, over its finite codes. `mixed`: one is so much larger than the
// others that it must not speak for them.
struct alignas(16) TileTerms {
  CodeTerms most;
  float scale;  // 2^f
  int32_t mixed;
  int32_t unused[2];
};

// What is multiplied with a tile besides its codes, 16 columns for each: parts of the bias. Eight
// codes' first 8 columns lie together, then their last 8 (`bias_at`). A code that is not finite,
// and the padding of the last tile, have a bias of +inf.
struct alignas(16) Tile {
  uint16_t bias[kTileCodes * kStep];
  TileTerms all;
};

__host__ __device__ constexpr int bias_at(int code, int column) {
  return code / 8 * 8 * kStep + column / 8 * 64 + code % 8 * 8 + column % 8;
}

// Multipliers of a bias' parts: for a row that is searched as it is, of its dtype, and for forms,
// with w. Range and precision of three halves, and of four bfloat16, reach 2^-32 of any bias that
// can be (2^-37 at least); one that is larger has an error of +inf.
constexpr int kBiasParts = 4;
template <typename Half, bool kScreened>
__host__ __device__ constexpr float bias_multiplier(int part) {
  if (std::is_same_v<Half, __nv_bfloat16>) return 1.0f;
  if (kScreened) return part == 0 ? 1.0f : part == 1 ? 0x1p-10f : part == 2 ? 0x1p-20f : 0.0f;
  return part == 0 ? 0x1p12f : part == 1 ? 1.0f : part == 2 ? 0x1p-12f : 0.0f;
}

constexpr float kLeastWeight = 0x1p-24f, kMostWeight = 0x1p15f;  // what halves hold

// A row's multipliers as one thread holds them in a tensor-core step, columns 2t and 2t + 1.
template <typename Half, bool kScreened>
__device__ __forceinline__ uint32_t bias_pair(float weight) {
  const int first = threadIdx.x % 4 * 2;
  if (first >= kBiasParts) return 0;
  weight = fminf(weight, kMostWeight);
  const float low =
      first == 0 ? bias_multiplier<Half, kScreened>(0) : bias_multiplier<Half, kScreened>(2);
  const float high =
      first == 0 ? bias_multiplier<Half, kScreened>(1) : bias_multiplier<Half, kScreened>(3);
  return bits_of(rounded<Half>(low * weight)) | uint32_t(bits_of(rounded<Half>(high * weight)))
                                                    << 16;
}

// What is lost of a bias, as a share of it, where halves do not hold w times its multipliers.
__device__ __forceinline__ float bias_lost(float weight) {
  if (weight >= kLeastWeight * 0x1p20f) return 0;
  return weight >= kLeastWeight * 0x1p10f ? 0x1p-20f : weight >= kLeastWeight ? 0x1p-10f : 1.0f;
}

// w of a row and a tile of forms, a power of two; 0 where the search must not decide. Halves hold
// it from kLeastWeight on; below, the bias is left out, and is all error. Above kMostWeight a
// search with biases must not decide: rows' units are chosen so that it does not come to that
// (prepare.h).
__device__ __forceinline__ float bias_weight(const RowTerms& row, const TileTerms& tile) {
  const float weight = row.scale * tile.scale;
  const bool held = weight <= kMostWeight || tile.most.bias == 0;
  return weight >= 0x1p-100f && weight <= 0x1p100f && held ? weight : 0.0f;
}

// Slot s of a tile holds the codes s / 4 * 64 + n * 8 + s % 4 * 2 + j  with n < 8 and j < 2: a
// thread of the search sees one slot, or s and s + 4.
constexpr int kSlots = 8;
constexpr int kSlotCodes = kTileCodes / kSlots;

// What one search of a part of the codes leaves of a row: a lower bound on its best score, upper
// bounds of candidates that may be the best, and the slots that may hold another one, with the
// largest upper bound there.
constexpr int kCandidates = 4;
struct alignas(16) Record {
  float lower;
  float open;
  int32_t count;
  uint32_t open_slots;
  int32_t index[kCandidates];
  float upper[kCandidates];
};

// 2^f of the power of two at or below `largest`, within what has an inverse in fp32.
__device__ __forceinline__ float power_below(float largest) {
  const unsigned exponent = (__float_as_uint(largest) >> 23) & 0xff;
  return __uint_as_float(min(max(exponent, 1u), 252u) << 23);
}

}  // namespace vqkernels::cuda
