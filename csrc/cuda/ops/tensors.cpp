#include "tensors.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

namespace vqkernels::cuda {
namespace {

constexpr int64_t kRowLimit = int64_t(1) << 31;

// Neighbouring dimensions as one: its size, and each tensor's stride.
struct Level {
  int64_t size;
  std::vector<int64_t> strides;
};

std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// The levels of all dimensions but the last and `group_dim`; the labels' stride comes last.
std::vector<Level> merged(const std::vector<Tensor>& tensors,
                          const std::vector<int64_t>& label_strides, int64_t group_dim) {
  std::vector<Level> levels;
  for (int64_t dim = 0; dim < tensors[0].dim() - 1; ++dim) {
    const int64_t size = tensors[0].size(dim);
    if (dim == group_dim || size == 1) continue;
    Level level{size, {}};
    for (const Tensor& tensor : tensors) level.strides.push_back(tensor.stride(dim));
    level.strides.push_back(label_strides[dim]);
    bool even = !levels.empty();
    for (size_t i = 0; even && i < level.strides.size(); ++i) {
      even = levels.back().strides[i] == size * level.strides[i];
    }
    if (even) {
      level.size *= levels.back().size;
      levels.pop_back();
    }
    levels.push_back(std::move(level));
  }
  return levels;
}

Device read_device(int32_t index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
    if (error != cudaSuccess) {
      throw std::runtime_error("cuda:" + std::to_string(index) + ": " + cudaGetErrorString(error));
    }
    return value;
  };
  Device device;
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                      attribute(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_total = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return device;
}

Device device_facts(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second
                              : known.emplace(index, read_device(index)).first->second;
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw std::invalid_argument("CUDA kernels take float32, float16 and bfloat16 tensors");
  }
}

Grid row_grid(std::vector<Tensor> tensors, bool grouped) {
  const Tensor first = tensors[0];
  const int64_t dims = first.dim(), width = first.size(dims - 1);
  const int64_t group_dim = grouped ? dims - 3 : -1;
  std::vector<int64_t> label_strides(dims, 1);
  for (int64_t dim = dims - 3; dim >= 0; --dim) {
    label_strides[dim] = label_strides[dim + 1] * first.size(dim + 1);
  }

  std::vector<Level> levels = merged(tensors, label_strides, group_dim);
  if (levels.size() > 3) {
    for (Tensor& tensor : tensors) tensor = dense(tensor);
    levels = merged(tensors, label_strides, group_dim);
  }
  levels.resize(3, Level{1, std::vector<int64_t>(tensors.size() + 1)});

  Grid grid;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Rows rows;
    rows.data = tensors[i].data_ptr();
    rows.dtype = dtype_of(tensors[i]);
    rows.books = grouped ? first.size(group_dim) : 1;
    rows.count = levels[0].size * levels[1].size * levels[2].size;
    rows.width = width;
    rows.middle = levels[1].size;
    rows.inner = levels[2].size;
    for (int level = 0; level < 3; ++level) rows.strides[level] = levels[level].strides[i];
    rows.book_stride = grouped ? tensors[i].stride(group_dim) : 0;
    rows.col_stride = tensors[i].stride(dims - 1);
    grid.rows.push_back(rows);
  }
  for (int level = 0; level < 3; ++level) {
    grid.labels.strides[level] = levels[level].strides.back();
  }
  grid.labels.book_stride = grouped ? label_strides[group_dim] : 0;
  grid.tensors = std::move(tensors);
  return grid;
}

Tensor filled(const Tensor& result, const Grid& grid, size_t position) {
  const Tensor& written = grid.tensors[position];
  if (written.get() == result.get()) return result;
  Tensor target = result;
  return torch::stable::copy_(target, written);
}

Rows codes_of(const Tensor& codebook) {
  const int64_t dims = codebook.dim();
  Rows codes;
  codes.data = codebook.data_ptr();
  codes.dtype = dtype_of(codebook);
  codes.books = dims == 3 ? codebook.size(0) : 1;
  codes.count = codebook_size(codebook);
  codes.width = codebook.size(dims - 1);
  codes.strides[0] = codebook.stride(dims - 2);
  codes.book_stride = dims == 3 ? codebook.stride(0) : 0;
  codes.col_stride = codebook.stride(dims - 1);
  return codes;
}

Metric parse_metric(const std::string& name) {
  if (name == "l2") return Metric::l2;
  return name == "dot" ? Metric::dot : Metric::cosine;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

Call::Call(const char* op, const Tensor& x, bool numbers_rows)
    : op_(op), device_(x.get_device_index()), guard_(device_) {
  const int64_t width = x.dim() == 0 ? 1 : x.size(x.dim() - 1);
  if (numbers_rows && x.numel() / std::max<int64_t>(width, 1) >= kRowLimit) {
    throw std::invalid_argument("x must have fewer than 2^31 rows, got shape " + shape_of(x));
  }
  context_.device = device_facts(device_);
  context_.stream = current_stream(device_);
  context_.allocate = [this, x](int64_t bytes) {
    scratch_.push_back(empty({bytes}, ScalarType::Byte, x));
    return scratch_.back().data_ptr();
  };
}

void Call::finish() const {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("vqkernels." + op_ + " on cuda:" + std::to_string(device_) + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace vqkernels::cuda
