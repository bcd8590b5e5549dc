// The CUDA launchers on the emulation, for tests that call them through ctypes. Each function
// returns null, or what went wrong. Rows arrive as the fields of `Rows` in order, 12 numbers;
// labels as 4; the device as those of `Device`.
#include <exception>
#include <string>

#include "../cuda/peak.h"
#include "../cuda/quantize.h"
#include "cuda_emulation_core.h"

namespace vqkernels::cuda {
namespace {

Rows rows_from(const int64_t* fields) {
  Rows rows;
  if (fields == nullptr) return rows;
  rows.data = reinterpret_cast<void*>(fields[0]);
  rows.dtype = DType(fields[1]);
  rows.books = fields[2];
  rows.count = fields[3];
  rows.width = fields[4];
  rows.middle = fields[5];
  rows.inner = fields[6];
  for (int i = 0; i < 3; ++i) rows.strides[i] = fields[7 + i];
  rows.book_stride = fields[10];
  rows.col_stride = fields[11];
  return rows;
}

Labels labels_from(const int64_t* fields) { return {{fields[0], fields[1], fields[2]}, fields[3]}; }

NearestCode search_from(const int64_t* x, const int64_t* codebook, int metric,
                        const int64_t* labels, int64_t* indices) {
  return {rows_from(x), rows_from(codebook), Metric(metric), labels_from(labels), indices};
}

int64_t scratch_bytes = 0;  // of the last call

template <typename F>
const char* run(const int64_t* device, const F& launch) {
  static thread_local std::string problem;
  emulation::Arena arena;
  Context context;
  context.device = {int(device[0]), int(device[1]), int(device[2]), int(device[3])};
  scratch_bytes = 0;
  context.allocate = [&](int64_t bytes) {
    scratch_bytes += bytes;
    return arena.allocate(bytes);
  };
  try {
    launch(context);
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}

}  // namespace
}  // namespace vqkernels::cuda

#define VQKERNELS_EXPORT extern "C" __attribute__((visibility("default"))) const char*

namespace cuda = vqkernels::cuda;

extern "C" __attribute__((visibility("default"))) int64_t emulated_scratch_bytes() {
  return cuda::scratch_bytes;
}

VQKERNELS_EXPORT emulated_nearest_code(const int64_t* device, const int64_t* x,
                                       const int64_t* codebook, int metric, const int64_t* labels,
                                       int64_t* indices, int32_t* weighed, int splits,
                                       int warpgroups) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::NearestCode problem = cuda::search_from(x, codebook, metric, labels, indices);
    problem.weighed = weighed;
    problem.splits = splits;
    problem.warpgroups = warpgroups;
    cuda::nearest_code(problem, context);
  });
}

VQKERNELS_EXPORT emulated_quantize(const int64_t* device, const int64_t* x, const int64_t* codebook,
                                   int metric, const int64_t* labels, int64_t* indices,
                                   const uint8_t* mask, const int64_t* quantized, float* counts,
                                   float* losses) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::Quantize problem;
    problem.search = cuda::search_from(x, codebook, metric, labels, indices);
    problem.mask = mask;
    problem.quantized = cuda::rows_from(quantized);
    problem.counts = counts;
    problem.commitment_loss = losses;
    problem.codebook_loss = losses + 1;
    cuda::quantize(problem, context);
  });
}

VQKERNELS_EXPORT emulated_quantize_backward_x(const int64_t* device, const int64_t* x,
                                              const int64_t* codebook, const int64_t* labels,
                                              const int64_t* indices, int gradient,
                                              const int64_t* grad_quantized,
                                              const float* grad_commitment, const int64_t* grad_x) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::QuantizeBackwardX problem;
    problem.x = cuda::rows_from(x);
    problem.codebook = cuda::rows_from(codebook);
    problem.grad_quantized = cuda::rows_from(grad_quantized);
    problem.grad_commitment = grad_commitment;
    problem.labels = cuda::labels_from(labels);
    problem.indices = indices;
    problem.gradient = cuda::Gradient(gradient);
    problem.grad_x = cuda::rows_from(grad_x);
    cuda::quantize_backward_x(problem, context);
  });
}

VQKERNELS_EXPORT emulated_code_keys(const int64_t* device, const int64_t* x, const int64_t* labels,
                                    const int64_t* indices, int64_t codebook_size, int32_t* keys) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::code_keys(cuda::rows_from(x), cuda::labels_from(labels), indices, codebook_size, keys,
                    context);
  });
}

VQKERNELS_EXPORT emulated_quantize_backward_codebook(const int64_t* device, const int64_t* x,
                                                     const int64_t* codebook, const float* loss,
                                                     const int32_t* keys, const int64_t* order,
                                                     const int64_t* grad_codebook) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::QuantizeBackwardCodebook problem;
    problem.x = cuda::rows_from(x);
    problem.codebook = cuda::rows_from(codebook);
    problem.grad_codebook_loss = loss;
    problem.keys = keys;
    problem.order = order;
    problem.grad_codebook = cuda::rows_from(grad_codebook);
    cuda::quantize_backward_codebook(problem, context);
  });
}

// Also gives how many multiply-adds ran.
VQKERNELS_EXPORT emulated_tensor_core_peak(const int64_t* device, int dtype, int repeats,
                                           float* sink, int64_t* products) {
  return cuda::run(device, [&](const cuda::Context& context) {
    *products = cuda::tensor_core_peak(vqkernels::DType(dtype), repeats, sink, context);
  });
}
