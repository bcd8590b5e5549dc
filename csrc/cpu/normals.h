// Normal numbers keyed by what they are for: Philox4x32-10, then Box-Muller to within 2e-6.
#pragma once

#include "../common/philox.h"
#include "noise_task.h"
#include "vectors.h"

namespace vqkernels {
namespace {

// Words of Philox, each in the low half of a lane: what a multiplication reads. High halves hold
// whatever was left there.
constexpr int kWideLanes = kLanes / 2;
typedef uint64_t vw __attribute__((vector_size(kWideLanes * 8)));

inline vw splat_word(uint32_t word) { return vw{} + uint64_t(word); }

inline vw low_halves_times(vw words, uint32_t factor) {
#if defined(__AVX512F__)
  return (vw)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#elif defined(VQKERNELS_NEON)
  return (vw)vmull_n_u32(vmovn_u64((uint64x2_t)words), factor);
#else
  return (words & 0xffffffffu) * uint64_t(factor);
#endif
}

// Groups of counters that are worked on in turns: one alone waits for its own results.
constexpr int kGroups = 4;

struct WideWords {
  vw group[kGroups];
};

// The keys of Philox's rounds, in every lane.
struct RoundKeys {
  explicit RoundKeys(uint64_t seed) {
    uint32_t first = uint32_t(seed), second = uint32_t(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys[2 * round] = splat_word(first);
      keys[2 * round + 1] = splat_word(second);
      first += kPhiloxKeyStep0;
      second += kPhiloxKeyStep1;
    }
  }

  vw keys[2 * kPhiloxRounds];
};

// Low halves of two vectors, in turns.
inline vu in_turns(vw first, vw second) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)first, 0xaaaa, (__m512i)second, _MM_PERM_CCAA);
#else
  return (vu)((first & 0xffffffffu) | (second << 32));
#endif
}

inline vu high_halves_in_turns(vw first, vw second) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)second, 0x5555, (__m512i)first, _MM_PERM_DDBB);
#else
  return (vu)((first >> 32) | (second & 0xffffffff00000000u));
#endif
}

// Two words of each counter in turns: the first and the third, from which radii are made, and the
// second and the fourth, from which angles are.
struct DrawnWords {
  vu radius[kGroups], angle[kGroups];
};

// Philox4x32-10 as in ../common/philox.h. The last round leaves its words where they are wanted.
inline DrawnWords philox_in_turns(WideWords (&c)[4], const RoundKeys& key) {
  WideWords low0, low2;
  const auto multiply = [&]() VQKERNELS_INLINE {
    for (int g = 0; g < kGroups; ++g) {
      low0.group[g] = low_halves_times(c[0].group[g], kPhiloxMultiplier0);
    }
    for (int g = 0; g < kGroups; ++g) {
      low2.group[g] = low_halves_times(c[2].group[g], kPhiloxMultiplier1);
    }
  };
#pragma GCC unroll 9
  for (int round = 0; round + 1 < kPhiloxRounds; ++round) {
    multiply();
    for (int g = 0; g < kGroups; ++g) {
      c[0].group[g] = (low2.group[g] >> 32) ^ c[1].group[g] ^ key.keys[2 * round];
      c[2].group[g] = (low0.group[g] >> 32) ^ c[3].group[g] ^ key.keys[2 * round + 1];
    }
    c[1] = low2;
    c[3] = low0;
  }
  multiply();
  const vu last = in_turns(key.keys[2 * kPhiloxRounds - 2], key.keys[2 * kPhiloxRounds - 1]);
  DrawnWords words;
  for (int g = 0; g < kGroups; ++g) {
    words.radius[g] = high_halves_in_turns(low2.group[g], low0.group[g]) ^
                      in_turns(c[1].group[g], c[3].group[g]) ^ last;
    words.angle[g] = in_turns(low2.group[g], low0.group[g]);
  }
  return words;
}

inline vf as_float(vu words) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)words);
#else
  return __builtin_convertvector(words, vf);
#endif
}

inline vf as_float(vi numbers) { return __builtin_convertvector(numbers, vf); }

inline vf square_root(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#elif defined(VQKERNELS_NEON)
  return (vf)vsqrtq_f32((float32x4_t)v);
#else
  vf root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(v[lane]);
  return root;
#endif
}

#if defined(__AVX512F__)
// For each of 32 stretches of [0.7, 1.4) the number near its middle that reciprocals are of, and
// -2 log of it. The stretch around 1 has 1 itself, so that log keeps its digits there.
struct LogTable {
  alignas(64) float reciprocal[32], log[32];  // the reciprocal of 2^32 times the number

  LogTable() {
    for (int i = 0; i < 32; ++i) {
      const uint32_t start = 0x3f330000u + (uint32_t(i) << 18), end = start + (1u << 18);
      const double middle = (double(bit_cast<float>(start)) + bit_cast<float>(end)) / 2;
      const bool has_one = bit_cast<float>(start) <= 1 && 1 < bit_cast<float>(end);
      const float inverse = has_one ? 1.0f : float(1 / middle);
      reciprocal[i] = inverse * 0x1p-32f;
      log[i] = float(2 * __builtin_log(double(inverse)));
    }
  }
};

inline const LogTable& log_table() {
  static const LogTable table;
  return table;
}

inline vf from_table(const float* table, __m512i index) {
  return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}
#else
struct LogTable {};

inline LogTable log_table() { return {}; }
#endif

// The start of the stretch [0.7, 1.4), in bits, times 2^32.
constexpr int32_t kLogStart = 0x3f330000 + (32 << 23);
constexpr double kLog2 = 0.693147180559945309;

// 1 + f = (w + 1) / 2^32 * 2^k / c for the 32-bit number w, where log = -2 log(c / 2^k). Near 1 the
// logarithm needs digits that a float of w + 1 loses: f is made of what is missing to 2^32.
struct LogParts {
  vf f, log;
};

inline LogParts log_parts(vu w, [[maybe_unused]] const LogTable& table) {
  const vf per_exponent = splat(float(-2 * kLog2 * 0x1p-23));
#if defined(__AVX512F__)
  const __m512i next = _mm512_add_epi32((__m512i)w, _mm512_set1_epi32(1));
  // From 1 - 2^-8 on, in the table's stretch around 1.
  const __mmask16 near_one = _mm512_cmpge_epu32_mask((__m512i)w, _mm512_set1_epi32(-(1 << 24)));
  const vf whole = (vf)_mm512_mask_cvtepu32_ps(_mm512_set1_ps(0x1p32f), ~near_one, next);
  const vi offset = (vi)whole - kLogStart;
  const __m512i stretch = (__m512i)(offset >> 18);
  const vi exponent = offset & int32_t(0xff800000);
  const vf scale = (vf)((vi)from_table(table.reciprocal, stretch) - exponent);
  const vf f = multiply_add(whole, scale, splat(-1.0f));
  const __m512 missing = _mm512_cvtepi32_ps(next);
  return {(vf)_mm512_mask_mul_ps((__m512)f, near_one, missing, _mm512_set1_ps(0x1p-32f)),
          multiply_add(as_float(exponent), per_exponent, from_table(table.log, stretch))};
#else
  const vu large = (vu)((w >> 24) != 0u), low = w & large & 0xffu;
  const vf whole = as_float(w - low + (~large & 1u));
  const vf rest = as_float((vi)((low + 1) & large));
  const vi offset = (vi)whole - kLogStart;
  const vi exponent = offset & int32_t(0xff800000);
  const vf scale = (vf)(((127 - 32) << 23) - exponent);
  return {multiply_add(rest, scale, whole * scale - splat(1.0f)),
          as_float(exponent) * per_exponent};
#endif
}

// -2 log((w + 1) / 2^32), by minimax polynomials of log(1 + f) / f.
inline vf minus_two_log(LogParts parts) {
  const vf f = parts.f;
#if defined(__AVX512F__)
  vf y = multiply_add(f, splat(-2.0f / 3), splat(1.0f));
  y = multiply_add(y, f, splat(-2.0f));
  return multiply_add(f, y, parts.log);
#else
  vf y = multiply_add(splat(8.84889013e-2f), f, splat(-1.473171953e-1f));
  y = multiply_add(y, f, splat(1.507916193e-1f));
  y = multiply_add(y, f, splat(-1.651051615e-1f));
  y = multiply_add(y, f, splat(1.993538293e-1f));
  y = multiply_add(y, f, splat(-2.500427976e-1f));
  y = multiply_add(y, f, splat(3.333514405e-1f));
  y = multiply_add(y, f, splat(-4.999995974e-1f));
  y = multiply_add(y, f, splat(9.999998730e-1f));
  return multiply_add(f * splat(-2.0f), y, parts.log);
#endif
}

// Cosine and sine of 2 pi w / 2^32: w is a whole number of quarter turns, rounded, and a rest of at
// most an eighth.
struct Direction {
  vf x, y;
};

inline Direction direction(vu w) {
  const vf rest = as_float((vi)(w << 2)) * splat(float(1.57079632679489662 * 0x1p-32));
  const vf square = rest * rest;
  // Minimax up to an eighth of a turn: within 2e-9 and 3e-8.
  vf sine = multiply_add(splat(-1.94621170e-4f), square, splat(8.33158461e-3f));
  vf cosine = multiply_add(splat(-1.35858865e-3f), square, splat(4.16550278e-2f));
  sine = multiply_add(sine, square, splat(-1.66666368e-1f));
  cosine = multiply_add(cosine, square, splat(-4.99998565e-1f));
  sine = multiply_add(sine, square, splat(9.99999986e-1f)) * rest;
  cosine = multiply_add(cosine, square, splat(9.9999997e-1f));

  const vu quarter = w + 0x20000000u, opposite = w + 0x60000000u;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)quarter, _mm512_set1_epi32(0x40000000));
  const vu x = (vu)_mm512_mask_blend_ps(odd, (__m512)cosine, (__m512)sine);
  const vu y = (vu)_mm512_mask_blend_ps(odd, (__m512)sine, (__m512)cosine);
#else
  const vu change = ((vu)sine ^ (vu)cosine) & (vu)((vi)(quarter << 1) >> 31);
  const vu x = (vu)cosine ^ change, y = (vu)sine ^ change;
#endif
  return {(vf)(x ^ (opposite & 0x80000000u)), (vf)(y ^ (quarter & 0x80000000u))};
}

// Lanes of two vectors in turns, as two vectors.
struct InTurns {
  vf first, second;
};

inline InTurns in_turns(vf first, vf second) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {(vf)_mm512_permutex2var_ps((__m512)first, low, (__m512)second),
          (vf)_mm512_permutex2var_ps((__m512)first, high, (__m512)second)};
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)first, (__m256)second);
  const __m256 high = _mm256_unpackhi_ps((__m256)first, (__m256)second);
  return {(vf)_mm256_permute2f128_ps(low, high, 0x20), (vf)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  float lanes[2 * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[2 * lane] = first[lane];
    lanes[2 * lane + 1] = second[lane];
  }
  return {load(lanes), load(lanes + kLanes)};
#endif
}

// Counters whose normals are made at a time.
constexpr int64_t kQuads = kGroups * kWideLanes;

// Calls take(at, normals) for the vectors of a sample's normals from element 4 * quad on: `at`
// counts from there, and the last ones may lie beyond those asked for.
template <typename F>
__attribute__((noinline)) void draw_normals(const KeyedNoise& key, uint32_t sample_id,
                                            uint32_t step, int64_t quad, int64_t quads,
                                            const F& take) {
  const LogTable& table = log_table();
  const RoundKeys keys(key.seed);
  const vw id = splat_word(sample_id), at_step = splat_word(step), stream = splat_word(key.stream);
  vw lanes;
  for (int lane = 0; lane < kWideLanes; ++lane) lanes[lane] = uint64_t(quad + lane);
  for (int64_t done = 0; done < quads; done += kQuads) {
    WideWords words[4];
    for (int g = 0; g < kGroups; ++g) {
      words[0].group[g] = lanes + uint64_t(done + g * kWideLanes);
      words[1].group[g] = id;
      words[2].group[g] = at_step;
      words[3].group[g] = stream;
    }
    const DrawnWords drawn = philox_in_turns(words, keys);
    LogParts parts[kGroups];
    Direction to[kGroups];
    vf radius[kGroups];
    for (int g = 0; g < kGroups; ++g) parts[g] = log_parts(drawn.radius[g], table);
    for (int g = 0; g < kGroups; ++g) radius[g] = square_root(minus_two_log(parts[g]));
    for (int g = 0; g < kGroups; ++g) to[g] = direction(drawn.angle[g]);
    for (int g = 0; g < kGroups; ++g) {
      const InTurns normals = in_turns(radius[g] * to[g].x, radius[g] * to[g].y);
      take(4 * done + 2 * kLanes * g, normals.first);
      take(4 * done + 2 * kLanes * g + kLanes, normals.second);
    }
  }
}

// Room that `fill_normals` may write beyond the normals asked for.
constexpr int64_t kNormalsBeyond = 4 + 4 * kQuads;

// Draws elements [begin, begin + count) of a sample; returns where in `room` the first one lies.
inline const float* fill_normals(const KeyedNoise& key, uint32_t sample_id, uint32_t step,
                                 int64_t begin, int64_t count, float* room) {
  const int64_t quad = begin / 4, quads = (begin + count + 3) / 4 - quad;
  draw_normals(key, sample_id, step, quad, quads,
               [&](int64_t at, vf normals) VQKERNELS_INLINE { store(room + at, normals); });
  return room + begin % 4;
}

}  // namespace
}  // namespace vqkernels
