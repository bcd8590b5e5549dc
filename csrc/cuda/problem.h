// What the ops layer hands to a launcher: raw pointers, sizes, the device. Torch-free.
#pragma once

#include <cstdint>
#include <functional>

#include "../common/dtypes.h"

struct CUstream_st;  // cudaStream_t points to it; host code needs no CUDA header for that

namespace vqkernels::cuda {

enum class Metric : int32_t { l2 = 0, dot = 1, cosine = 2 };

// Rows of one or more books: row r of book g lies at `data` plus, in elements,
//
//   (r / (inner * middle)) * strides[0] + (r / inner % middle) * strides[1]
//     + (r % inner) * strides[2] + g * book_stride
//
// and its columns `col_stride` apart. Rows that lie evenly in memory have middle = inner = 1.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t books = 1, count = 0, width = 0;  // count: rows of one book, below 2^31
  int64_t middle = 1, inner = 1;
  int64_t strides[3] = {};
  int64_t book_stride = 0, col_stride = 1;
};

// One label a row, at the row's place in the grid of its `Rows`; strides as there.
struct Labels {
  int64_t strides[3] = {};
  int64_t book_stride = 0;
};

// What a launcher needs to know of the GPU.
struct Device {
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 1;
  int shared_block = 48 << 10;  // bytes of shared memory that one block may opt in to
  int shared_total = 48 << 10;  // bytes that the blocks of one multiprocessor share
};

// One call: where it runs, and scratch memory that lives until the launcher returns (its kernels
// use it in stream order). `allocate` gives memory aligned to 256 bytes, not initialized.
struct Context {
  Device device;
  CUstream_st* stream = nullptr;
  std::function<void*(int64_t bytes)> allocate;

  template <typename T>
  T* array(int64_t count) const {
    return static_cast<T*>(allocate(count * int64_t(sizeof(T))));
  }
};

}  // namespace vqkernels::cuda
