#include "peak.h"
#include "rows.h"
#include "tensor_core.h"

namespace vqkernels::cuda {
namespace {

// Operands that differ from lane to lane: zeros would draw less power, and clock higher.
template <typename Half>
__global__ void __launch_bounds__(kPeakThreads) products(int repeats, float* sink) {
  float sums[kPeakProducts][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = 0x2c003800u + (threadIdx.x * 77 + i * 13) % 512;
  for (int i = 0; i < 2; ++i) b[i] = 0x30003400u + (threadIdx.x * 55 + i * 29) % 512;
  for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma unroll
    for (int i = 0; i < kPeakProducts; ++i) mma_16816<Half>(sums[i], a, b, sums[i]);
  }
  float sum = 0;
  for (int i = 0; i < kPeakProducts; ++i) sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
  sink[blockIdx.x * kPeakThreads + threadIdx.x] = sum;
}

}  // namespace

int64_t tensor_core_peak(DType dtype, int repeats, float* sink, const Context& context) {
  const int blocks = context.device.multiprocessors;
  if (dtype == DType::bf16) {
    VQKERNELS_LAUNCH(products<__nv_bfloat16>, dim3(blocks), dim3(kPeakThreads), 0, context.stream)
    (repeats, sink);
  } else {
    VQKERNELS_LAUNCH(products<__half>, dim3(blocks), dim3(kPeakThreads), 0, context.stream)
    (repeats, sink);
  }
  return int64_t(blocks) * (kPeakThreads / kWarp) * kPeakProducts * repeats * 16 * 8 * 16;
}

}  // namespace vqkernels::cuda
