// The CUDA launcher of attention on the emulation, for tests that call it through ctypes. Tensors
// arrive as their address and the strides of their dimensions.
#include "../cuda/attention.h"
#include "cuda_emulation_core.h"

namespace vqkernels::cuda {
namespace {

Heads heads_from(const int64_t* fields) {
  return {reinterpret_cast<void*>(fields[0]), fields[1], fields[2], fields[3]};
}

}  // namespace
}  // namespace vqkernels::cuda

namespace cuda = vqkernels::cuda;

// `sizes`: B, H, key heads, N, M, d. `mask` may be null.
EMULATION_EXPORT const char* emulated_attention(const int64_t* q, const int64_t* k,
                                                const int64_t* v, const int64_t* out, float* lse,
                                                const int64_t* mask, int mask_kind, int dtype,
                                                const int64_t* sizes, float scale, int causal) {
  return emulation::caught([&] {
    cuda::Attention problem;
    problem.q = cuda::heads_from(q);
    problem.k = cuda::heads_from(k);
    problem.v = cuda::heads_from(v);
    problem.out = cuda::heads_from(out);
    problem.lse = lse;
    if (mask != nullptr) {
      problem.mask = cuda::heads_from(mask);
      problem.mask_column_stride = mask[4];
    }
    problem.mask_kind = cuda::MaskKind(mask_kind);
    problem.dtype = vqkernels::DType(dtype);
    problem.batches = int(sizes[0]);
    problem.heads = int(sizes[1]);
    problem.key_heads = int(sizes[2]);
    problem.queries = int(sizes[3]);
    problem.keys = int(sizes[4]);
    problem.dim = int(sizes[5]);
    problem.scale = scale;
    problem.causal = causal != 0;
    cuda::attention(problem, cuda::Context());
  });
}
