// The modulation launchers on the emulation, for tests that call them through ctypes. Each function
// returns null, or what went wrong. Tokens and vectors arrive as the fields of their structs in
// order, five numbers each; gradients of vectors as three; the device as those of `Device`.
#include "../cuda/modulation.h"
#include "cuda_emulation_core.h"

namespace vqkernels::cuda {
namespace {

Tokens tokens_from(const int64_t* fields) {
  if (fields == nullptr) return {};
  return {reinterpret_cast<void*>(fields[0]), DType(fields[1]), {fields[2], fields[3]}};
}

Vectors vectors_from(const int64_t* fields) {
  if (fields == nullptr) return {};
  return {reinterpret_cast<const void*>(fields[0]),
          DType(fields[1]),
          {fields[2], fields[3]},
          fields[4]};
}

VectorGradients gradients_from(const int64_t* fields) {
  if (fields == nullptr) return {};
  return {reinterpret_cast<void*>(fields[0]), DType(fields[1]), fields[2]};
}

template <typename F>
const char* run(const int64_t* device, const F& launch) {
  return emulation::caught([&] {
    emulation::Arena arena;
    Context context;
    context.device = {int(device[0]), int(device[1]), int(device[2]), int(device[3])};
    context.allocate = [&](int64_t bytes) { return arena.allocate(bytes); };
    launch(context);
  });
}

}  // namespace
}  // namespace vqkernels::cuda

namespace cuda = vqkernels::cuda;

// `tokens`: x, branch, stream, out; `vectors`: gate, shift, scale, weight, bias.
EMULATION_EXPORT const char* emulated_modulate(const int64_t* device, const int64_t* sizes,
                                               const int64_t* const* tokens,
                                               const int64_t* const* vectors, double eps,
                                               int centered, float* statistics) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::Modulate problem;
    problem.batch = sizes[0];
    problem.tokens = sizes[1];
    problem.width = sizes[2];
    problem.x = cuda::tokens_from(tokens[0]);
    problem.branch = cuda::tokens_from(tokens[1]);
    problem.stream = cuda::tokens_from(tokens[2]);
    problem.out = cuda::tokens_from(tokens[3]);
    problem.gate = cuda::vectors_from(vectors[0]);
    problem.shift = cuda::vectors_from(vectors[1]);
    problem.scale = cuda::vectors_from(vectors[2]);
    problem.weight = cuda::vectors_from(vectors[3]);
    problem.bias = cuda::vectors_from(vectors[4]);
    problem.eps = float(eps);
    problem.centered = centered != 0;
    problem.statistics = statistics;
    cuda::modulate(problem, context);
  });
}

// `tokens`: grad, x, grad_x, passed, branch, grad_branch; `vectors`: gate, scale, weight, bias;
// `grads`: of gate, shift, scale, weight, bias.
EMULATION_EXPORT const char* emulated_modulate_backward(const int64_t* device, const int64_t* sizes,
                                                        const int64_t* const* tokens,
                                                        const int64_t* const* vectors, int centered,
                                                        const float* statistics,
                                                        const int64_t* const* grads) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::ModulateBackward problem;
    problem.batch = sizes[0];
    problem.tokens = sizes[1];
    problem.width = sizes[2];
    problem.grad = cuda::tokens_from(tokens[0]);
    problem.x = cuda::tokens_from(tokens[1]);
    problem.grad_x = cuda::tokens_from(tokens[2]);
    problem.passed = cuda::tokens_from(tokens[3]);
    problem.branch = cuda::tokens_from(tokens[4]);
    problem.grad_branch = cuda::tokens_from(tokens[5]);
    problem.gate = cuda::vectors_from(vectors[0]);
    problem.scale = cuda::vectors_from(vectors[1]);
    problem.weight = cuda::vectors_from(vectors[2]);
    problem.bias = cuda::vectors_from(vectors[3]);
    problem.centered = centered != 0;
    problem.statistics = statistics;
    problem.grad_gate = cuda::gradients_from(grads[0]);
    problem.grad_shift = cuda::gradients_from(grads[1]);
    problem.grad_scale = cuda::gradients_from(grads[2]);
    problem.grad_weight = cuda::gradients_from(grads[3]);
    problem.grad_bias = cuda::gradients_from(grads[4]);
    cuda::modulate_backward(problem, context);
  });
}
