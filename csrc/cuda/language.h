// CUDA C++ as the kernels here use it. nvcc takes it from the CUDA headers; any other compiler
// takes it from the emulation, which runs the same source on the CPU for tests.
//
//   VQKERNELS_LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...);
//   VQKERNELS_LAUNCH((kernel<float, 64>), ...)(...)   a comma in the name needs parentheses
//   VQKERNELS_DYNAMIC_SHARED(type, name);             in a kernel: type* name, aligned to 16 bytes
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#else

#include "../testing/cuda_emulation.h"

#endif

#include <stdexcept>
#include <string>

namespace vqkernels::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace vqkernels::cuda

#ifdef __CUDACC__

namespace vqkernels::cuda {

template <typename... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;

  void operator()(Parameters... arguments) const {
    if (shared_bytes > (48u << 10)) {  // more than every device gives needs to be asked for
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            name);
    }
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), name);
  }
};

template <typename... Parameters>
Launch<Parameters...> launch(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream) {
  return {kernel, name, grid, block, shared_bytes, stream};
}

}  // namespace vqkernels::cuda

#define VQKERNELS_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::vqkernels::cuda::launch(kernel, #kernel, grid, block, shared_bytes, stream)

#define VQKERNELS_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char vqkernels_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(vqkernels_shared_bytes)

#else

#define VQKERNELS_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::emulation::prepare(kernel, #kernel, grid, block, shared_bytes, stream)

#define VQKERNELS_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emulation::dynamic_shared())

#endif
