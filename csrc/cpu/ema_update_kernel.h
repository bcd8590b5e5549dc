// The EMA step of a codebook. Bytes: two [K, D] tensors read and two written, once.
#pragma once

#include "kernel_table.h"

namespace vqkernels {
namespace {

// New cluster sizes of codes [begin, end), and their sum, which smoothing needs.
inline double ema_sizes(const EmaStep& step, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t code = begin; code < end; ++code) {
    const float fresh = step.counts[code];
    step.new_cluster_size[code] = fresh + step.decay * (step.cluster_size[code] - fresh);
    total += step.new_cluster_size[code];
  }
  return total;
}

inline void ema_codes(const EmaStep& step, double total, int64_t begin, int64_t end) {
  for (int64_t code = begin; code < end; ++code) {
    const double smoothed = (step.new_cluster_size[code] + step.eps) /
                            (total + double(step.codebook_size) * step.eps) * total;
    const float inverse = float(1 / smoothed);
    const float* before = step.embed_sum + code * step.width;
    const float* fresh = step.sums + code * step.width;
    float* after = step.new_embed_sum + code * step.width;
    float* row = step.new_codebook + code * step.width;
    for (int64_t d = 0; d < step.width; ++d) {
      after[d] = fresh[d] + step.decay * (before[d] - fresh[d]);
      row[d] = after[d] * inverse;
    }
  }
}

}  // namespace
}  // namespace vqkernels
