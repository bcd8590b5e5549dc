// The ceiling that the search's tensor-core instruction reaches on a device.
#pragma once

#include "problem.h"

namespace vqkernels::cuda {

constexpr int kPeakThreads = 256;
constexpr int kPeakProducts = 16;  // independent mma.sync m16n8k16 a warp and repeat

// How many numbers `sink` holds.
inline int64_t peak_sink(const Device& device) {
  return int64_t(device.multiprocessors) * kPeakThreads;
}

// Runs nothing but mma.sync on every multiprocessor; returns how many multiply-adds that are.
int64_t tensor_core_peak(DType dtype, int repeats, float* sink, const Context& context);

}  // namespace vqkernels::cuda
