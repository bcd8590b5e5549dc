// Which weights of attention are dropped: a function of seed, head, query and key alone, so that
// backward finds it again. One counter (key / 8, query, head, stream) serves eight keys, each of
// its words two of them, the low half first.
#pragma once

#include <type_traits>

#include "../common/philox.h"
#include "attention_task.h"
#include "vectors.h"

namespace vqkernels {
namespace {

constexpr uint32_t kDropoutStream = 0x6174746e;
constexpr int64_t kKeysOfCounter = 8;

struct WideProducts {
  void operator()(uint32_t factor, vu words, vu& high, vu& low) const {
    typedef uint64_t Wide __attribute__((vector_size(kLanes * 8)));
    const Wide product = __builtin_convertvector(words, Wide) * uint64_t(factor);
    high = __builtin_convertvector(product >> 32, vu);
    low = words * factor;
  }
};

inline vu lanes_from(uint32_t first) {
  vu lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = first + uint32_t(lane);
  return lanes;
}

// All ones in each half of a word whose number is kept.
inline vu kept_halves(vu words, uint32_t drop_below) {
  const vu low = (vu)((words & 0xffffu) >= drop_below) & 0xffffu;
  const vu high = (vu)((words >> 16) >= drop_below) << 16;
  return low | high;
}

// Zeros where a query drops the keys from `key` on, a multiple of eight: `count` weights, as floats
// or as pairs of halves.
template <typename Word>
__attribute__((noinline)) void drop_keys(const AttentionTask& task, int64_t query, int64_t key,
                                         int64_t count, Word* weights) {
  for (int64_t at = 0; at < count; at += kLanes * kKeysOfCounter) {
    vu words[4] = {lanes_from(uint32_t((key + at) / kKeysOfCounter)), vu{} + uint32_t(query),
                   vu{} + task.head_number, vu{} + kDropoutStream};
    philox4x32(words, task.seed, WideProducts());
    uint32_t kept[kLanes * 4];  // of pairs of keys
    for (int pair = 0; pair < 4; ++pair) {
      const vu halves = kept_halves(words[pair], task.drop_below);
      for (int lane = 0; lane < kLanes; ++lane) kept[lane * 4 + pair] = halves[lane];
    }
    const int64_t here = std::min<int64_t>(count - at, kLanes * kKeysOfCounter);
    for (int64_t i = 0; i < (here + 1) / 2; ++i) {
      if constexpr (std::is_same_v<Word, float>) {
        if (!(kept[i] & 0xffffu)) weights[at + 2 * i] = 0;
        if (2 * i + 1 < here && !(kept[i] >> 16)) weights[at + 2 * i + 1] = 0;
      } else {
        weights[at / 2 + i] &= kept[i];
      }
    }
  }
}

// Calls f(number of the key, factor) for the eight keys from `key` on, a multiple of eight, and a
// vector of queries: 0 for a dropped weight, else what makes up for those.
template <typename F>
inline void each_dropped(const AttentionTask& task, int64_t query, int64_t key, const F& f) {
  vu words[4] = {vu{} + uint32_t(key / kKeysOfCounter), lanes_from(uint32_t(query)),
                 vu{} + task.head_number, vu{} + kDropoutStream};
  philox4x32(words, task.seed, WideProducts());
  for (int i = 0; i < kKeysOfCounter; ++i) {
    const vu number = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
    f(i, (vf)((vu)splat(task.kept_factor) & (vu)(number >= task.drop_below)));
  }
}

}  // namespace
}  // namespace vqkernels
