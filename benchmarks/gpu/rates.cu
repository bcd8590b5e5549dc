// What one GPU can do at best, measured by loops that touch registers only:
//
//   kind 0   scores/s of an argmin epilogue: one subtraction and one minimum each
//   kind 1   flop/s of fp32 multiply-adds
//
// `vqkernels_rate(kind)` gives the best of several launches on the current device, or a negative
// CUDA error number.
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kLaunches = 12;

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

constexpr Loop kLoops[] = {
    {epilogue_rate, 8192, double(kChains)},
    {fma_rate, 8192, 2.0 * kChains},
};

}  // namespace

extern "C" double vqkernels_rate(int kind) {
  if (kind < 0 || kind > 1) return -double(cudaErrorInvalidValue);
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
