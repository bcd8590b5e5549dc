// What a launcher of csrc/cuda launches, on a GPU that is not here: the launchers as nvcc compiled
// them, linked with a CUDA runtime that starts nothing and prints each launch.
//
//   cuda_launches OP CAPABILITY MULTIPROCESSORS SHARED_BLOCK SHARED_TOTAL X_DTYPE BOOK_DTYPE
//                 ROWS CODES DIM
//
// Of the modulation ops BOOK_DTYPE is the branch's; of the noise ops the model's, and ROWS samples
// have DIM elements each.
//
// A line a launch: the kernel's mangled name, its threads a block, its bytes of dynamic shared
// memory.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "attention.h"
#include "modulation.h"
#include "nearest_code.h"
#include "noise.h"
#include "peak.h"
#include "quantize.h"

namespace {

// Filled by the objects' initializers, so it has to be made on first use.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
} pushed;

cudaError_t print_launch(const void* kernel, dim3 block, size_t shared) {
  std::printf("%s %u %zu\n", names()[kernel].c_str(), block.x * block.y * block.z, shared);
  return cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

// Newer toolkits launch by a handle, older ones by the function's address.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3 block, void**, size_t shared,
                               cudaStream_t) {
  return print_launch(kernel, block, shared);
}

cudaError_t cudaLaunchKernel(const void* function, dim3, dim3 block, void**, size_t shared,
                             cudaStream_t) {
  return print_launch(function, block, shared);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "none"; }

}  // extern "C"

namespace vqkernels::cuda {
namespace {

// Where nothing is read or written.
constexpr uintptr_t kAddress = 1 << 20;

template <typename T>
T* nowhere() {
  return reinterpret_cast<T*>(kAddress);
}

Rows rows_of(DType dtype, int64_t count, int64_t width) {
  Rows rows;
  rows.data = nowhere<void>();
  rows.dtype = dtype;
  rows.count = count;
  rows.width = width;
  rows.strides[0] = width;
  rows.book_stride = count * width;
  return rows;
}

Tokens tokens_of(DType dtype, int64_t width) { return {nowhere<void>(), dtype, {0, width}}; }

Vectors vectors_of(int64_t tokens) { return {nowhere<void>(), DType::f32, {}, tokens}; }

VectorGradients gradients_of(int64_t tokens) { return {nowhere<void>(), DType::f32, tokens}; }

// Runs `op` if it is a modulation op: one sample, one vector of each kind.
bool run_modulation(const std::string& op, DType stream, DType branch, int64_t tokens,
                    int64_t width, const Context& context) {
  const bool gated = op.rfind("gated_residual", 0) == 0;
  const bool normalized = op.find("ada_layer_norm") != std::string::npos;
  if (!gated && !normalized) return false;
  const Tokens of_stream = tokens_of(stream, width), of_branch = tokens_of(branch, width);
  const auto sized = [&](auto problem) {
    problem.batch = 1;
    problem.tokens = tokens;
    problem.width = width;
    problem.statistics = nowhere<float>();
    return problem;
  };
  if (op.find("backward") == std::string::npos) {
    auto problem = sized(Modulate());
    problem.x = of_stream;
    if (gated) problem.branch = of_branch;
    if (gated) problem.stream = of_stream;
    if (gated) problem.gate = vectors_of(tokens);
    if (normalized) problem.out = of_stream;
    if (normalized) problem.shift = problem.scale = vectors_of(tokens);
    modulate(problem, context);
    return true;
  }
  auto problem = sized(ModulateBackward());
  problem.grad = of_stream;
  if (normalized) problem.x = problem.grad_x = of_stream;
  if (normalized) problem.scale = vectors_of(tokens);
  if (normalized) problem.grad_shift = problem.grad_scale = gradients_of(tokens);
  if (gated) problem.branch = problem.grad_branch = of_branch;
  if (gated) problem.gate = vectors_of(tokens);
  if (gated) problem.grad_gate = gradients_of(tokens);
  modulate_backward(problem, context);
  return true;
}

// Runs `op` if it is a noise op.
bool run_noise(const std::string& op, DType dtype, DType of_outputs, const NoiseGrid& grid,
               const Context& context) {
  const Samples samples{nowhere<void>(), dtype, grid.elements};
  const Samples outputs{nowhere<void>(), of_outputs, grid.elements};
  if (op == "normal_noise") {
    NormalNoise problem;
    problem.grid = grid;
    problem.out = samples;
    normal_noise(problem, context);
  } else if (op == "diffuse") {
    Diffuse problem;
    problem.grid = grid;
    problem.x0 = problem.x_t = problem.wanted = samples;
    diffuse(problem, context);
  } else if (op.rfind("denoise_step", 0) == 0) {
    DenoiseStep problem;
    problem.grid = grid;
    problem.sample = problem.prev_sample = samples;
    problem.model_output = outputs;
    if (op == "denoise_step_guided") problem.uncond_output = outputs;
    if (op == "denoise_step_dynamic") problem.threshold = Threshold::dynamic;
    denoise_step(problem, context);
  } else {
    return false;
  }
  return true;
}

int run(char** arguments) {
  const std::string op = arguments[1];
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const auto dtype = [&](int i) {
    const std::string name = arguments[i];
    return name == "fp16" ? DType::f16 : name == "bf16" ? DType::bf16 : DType::f32;
  };
  Context context;
  context.device = {int(number(2)), int(number(3)), int(number(4)), int(number(5))};
  context.allocate = [](int64_t) { return static_cast<void*>(nowhere<char>() + kAddress); };
  if (run_modulation(op, dtype(6), dtype(7), number(8), number(10), context)) return 0;
  if (run_noise(op, dtype(6), dtype(7), {number(8), number(10)}, context)) return 0;
  const Rows x = rows_of(dtype(6), number(8), number(10));
  const Rows codebook = rows_of(dtype(7), number(9), number(10));
  Labels labels;
  labels.strides[0] = 1;

  NearestCode search;
  search.x = x;
  search.codebook = codebook;
  search.labels = labels;
  search.indices = nowhere<int64_t>();
  if (op == "nearest_code") {
    nearest_code(search, context);
  } else if (op == "quantize") {
    Quantize problem;
    problem.search = search;
    problem.quantized = x;
    problem.counts = problem.commitment_loss = problem.codebook_loss = nowhere<float>();
    quantize(problem, context);
  } else if (op == "quantize_backward_x") {
    QuantizeBackwardX problem;
    problem.x = problem.grad_quantized = problem.grad_x = x;
    problem.codebook = codebook;
    problem.grad_commitment = nowhere<float>();
    problem.labels = labels;
    problem.indices = nowhere<int64_t>();
    quantize_backward_x(problem, context);
  } else if (op == "quantize_backward_codebook") {
    code_keys(x, labels, nowhere<int64_t>(), codebook.count, nowhere<int32_t>(), context);
    QuantizeBackwardCodebook problem;
    problem.x = x;
    problem.codebook = problem.grad_codebook = codebook;
    problem.grad_codebook_loss = nowhere<float>();
    problem.keys = nowhere<int32_t>();
    problem.order = nowhere<int64_t>();
    quantize_backward_codebook(problem, context);
  } else if (op == "attention" || op == "attention_masked") {
    Attention problem;
    problem.q = problem.k = problem.v = problem.out = {nowhere<void>()};
    problem.lse = nowhere<float>();
    problem.mask = {nowhere<void>()};
    problem.mask_kind = op == "attention" ? MaskKind::none : MaskKind::additive;
    problem.dtype = x.dtype;
    problem.batches = problem.heads = problem.key_heads = 1;
    problem.queries = int(x.count);
    problem.keys = int(codebook.count);
    problem.dim = int(x.width);
    attention(problem, context);
  } else if (op == "tensor_core_peak") {
    tensor_core_peak(x.dtype, 1, nowhere<float>(), context);
  } else {
    std::fprintf(stderr, "no op %s\n", op.c_str());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace vqkernels::cuda

int main(int count, char** arguments) { return count == 11 ? vqkernels::cuda::run(arguments) : 1; }
