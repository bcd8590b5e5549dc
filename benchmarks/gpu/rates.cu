// What one GPU can do at best, measured by loops that touch registers only:
//
//   kind 0   flop/s of mma.sync m16n8k16, fp16 with fp32 sums
//   kind 1   scores/s of an argmin epilogue: one subtraction and one minimum each
//   kind 2   flop/s of fp32 multiply-adds
//
// `vqkernels_rate(kind)` gives the best of several launches on the current device, or a negative
// CUDA error number.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kLaunches = 12;

__global__ void mma_rate(float* out, int iterations) {
  constexpr int kSums = 8;
  float sum[kSums][4] = {};
  const uint32_t a[4] = {threadIdx.x, threadIdx.x + 1, threadIdx.x + 2, threadIdx.x + 3};
  const uint32_t b[2] = {threadIdx.x + 4, threadIdx.x + 5};
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[s][0]), "+f"(sum[s][1]), "+f"(sum[s][2]), "+f"(sum[s][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
  float total = 0;
  for (int s = 0; s < kSums; ++s) {
    total += sum[s][0] + sum[s][1] + sum[s][2] + sum[s][3];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

constexpr int kChains = 16;

__global__ void epilogue_rate(float* out, int iterations) {
  float least[kChains], product[kChains];
  for (int s = 0; s < kChains; ++s) {
    least[s] = 1e30f;
    product[s] = out[threadIdx.x + s];
  }
  float bias = out[threadIdx.x];
  const float step = out[threadIdx.x + kChains];
  for (int i = 0; i < iterations; ++i) {
    bias += step;
#pragma unroll
    for (int s = 0; s < kChains; ++s) {
      least[s] = fminf(least[s], bias - product[s]);
    }
  }
  float total = 0;
  for (int s = 0; s < kChains; ++s) {
    total += least[s];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

__global__ void fma_rate(float* out, int iterations) {
  float sum[kChains];
  for (int s = 0; s < kChains; ++s) {
    sum[s] = out[threadIdx.x + s];
  }
  const float factor = out[threadIdx.x], term = out[threadIdx.x + kChains];
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int s = 0; s < kChains; ++s) {
      sum[s] = fmaf(sum[s], factor, term);
    }
  }
  float total = 0;
  for (int s = 0; s < kChains; ++s) {
    total += sum[s];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

struct Loop {
  void (*kernel)(float*, int);
  int iterations;
  double work;  // of one iteration of one thread
};

// An mma of 2 * 16 * 8 * 16 flop is shared by the 32 threads of a warp.
constexpr Loop kLoops[] = {
    {mma_rate, 4096, 8 * 4096.0 / 32},
    {epilogue_rate, 8192, double(kChains)},
    {fma_rate, 8192, 2.0 * kChains},
};

}  // namespace

extern "C" double vqkernels_rate(int kind) {
  if (kind < 0 || kind > 2) return -double(cudaErrorInvalidValue);
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return -double(error);
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  const size_t bytes = sizeof(float) * size_t(blocks) * kThreads;
  float* out = nullptr;
  error = cudaMalloc(&out, bytes);
  if (error != cudaSuccess) return -double(error);
  cudaMemset(out, 0, bytes);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  const Loop loop = kLoops[kind];
  double best = 0;
  for (int launch = 0; launch < kLaunches; ++launch) {
    cudaEventRecord(begin);
    loop.kernel<<<blocks, kThreads>>>(out, loop.iterations);
    cudaEventRecord(end);
    error = cudaEventSynchronize(end);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    const double work = loop.work * loop.iterations * double(blocks) * kThreads;
    if (milliseconds > 0 && work / (1e-3 * milliseconds) > best) {
      best = work / (1e-3 * milliseconds);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaFree(out);
  return error == cudaSuccess ? best : -double(error);
}
