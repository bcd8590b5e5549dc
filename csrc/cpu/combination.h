// Sums of weighted operands, of one element type, several of them in one pass.
#pragma once

#include <algorithm>

#include "noise_blocks.h"

namespace vqkernels {
namespace {

// A sum of weighted operands. A weight of 0 leaves its operand out, also where it is infinite.
template <typename T>
struct Combination {
  static constexpr int kMost = 4 + DenoiseStep::kHistory;  // sample, prediction, output, noise

  void add(double weight, const T* operand) {
    if (float(weight) == 0) return;
    weights[count] = float(weight);
    operands[count++] = operand;
  }

  bool same_operands(const Combination& other) const {
    return count == other.count && std::equal(operands, operands + count, other.operands);
  }

  int count = 0;
  float weights[kMost];
  const T* operands[kMost];
};

// Several combinations of the same operands. An operand's numbers are read before those at its
// place are written.
template <typename T, int kOperands, int kSums>
inline void combine_all(const Combination<T>* sums, T* const* out, int64_t count, bool streaming) {
  vf weights[kSums][kOperands];
  for (int s = 0; s < kSums; ++s) {
    for (int i = 0; i < kOperands; ++i) weights[s][i] = splat(sums[s].weights[i]);
  }
  const T* operands[kOperands];
  for (int i = 0; i < kOperands; ++i) operands[i] = sums[0].operands[i];
  T* places[kSums];
  for (int s = 0; s < kSums; ++s) places[s] = out[s];
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf values[kOperands];
    for (int i = 0; i < kOperands; ++i) values[i] = load_at(operands[i], at, lanes);
    for (int s = 0; s < kSums; ++s) {
      vf sum = weights[s][0] * values[0];
      for (int i = 1; i < kOperands; ++i) sum = multiply_add(weights[s][i], values[i], sum);
      if constexpr (std::is_same_v<T, float>) {
        if (streaming && lanes == kLanes) {
          stream(places[s] + at, sum);
          continue;
        }
      }
      store_at(places[s], at, lanes, sum);
    }
  });
}

template <int kSums, typename T, int kOperands = Combination<T>::kMost>
inline void combine(const Combination<T>* sums, T* const* out, int64_t count, bool streaming) {
  if constexpr (kOperands == 0) {
    for (int s = 0; s < kSums; ++s) std::fill(out[s], out[s] + count, T{});
  } else if (sums[0].count == kOperands) {
    combine_all<T, kOperands, kSums>(sums, out, count, streaming);
  } else {
    combine<kSums, T, kOperands - 1>(sums, out, count, streaming);
  }
}

// Together if they have the same operands, which are read once then; else in this order.
template <typename T>
inline void combine(const Combination<T>* sums, T* const* out, int sum_count, int64_t count,
                    bool streaming) {
  bool same = true;
  for (int s = 1; s < sum_count; ++s) same = same && sums[s].same_operands(sums[0]);
  if (same && sum_count == 3) return combine<3>(sums, out, count, streaming);
  if (same && sum_count == 2) return combine<2>(sums, out, count, streaming);
  for (int s = 0; s < sum_count; ++s) combine<1>(sums + s, out + s, count, streaming);
}

}  // namespace
}  // namespace vqkernels
