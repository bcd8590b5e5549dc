// The modulation ops' work as kernels see it. Torch-free, plain data. Rows here have columns that
// lie next to each other.
#pragma once

#include "rows.h"

namespace vqkernels {

// Vectors `[D]`, each for `rows_each` consecutive rows.
struct Modulation {
  Rows vectors;
  int64_t rows_each = 1;
};

// out = residual + gate * branch, in residual's dtype.
struct GatedResidual {
  Rows residual, branch, out;
  Modulation gate;
};

// out = normed * (1 + scale) + shift with normed = (x - mean) / std * weight + bias.
struct ModulatedNorm {
  Rows x, out;          // of one dtype
  GatedResidual gated;  // with a branch, what makes x first: `gated.out` is x
  Modulation shift, scale;
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
  bool centered = true;         // false: the mean counts as zero, which is RMS normalization
  int64_t rows_each = 1;        // no vector changes within so many rows
  float* statistics = nullptr;  // `[rows, 2]`: mean, 1 / std
};

// Rows are summed in chunks that the shapes alone decide, and chunks in order, so that sums have
// the same bits whatever the number of threads. A chunk never crosses a multiple of `rows_each`.
struct Chunks {
  static constexpr int64_t kRows = 64;
  int64_t rows_each = 1, rows = 0;

  int64_t in_each() const { return (rows_each + kRows - 1) / kRows; }
  int64_t count() const { return rows_each == 0 ? 0 : rows / rows_each * in_each(); }
  int64_t begin(int64_t chunk) const {
    return chunk / in_each() * rows_each + chunk % in_each() * kRows;
  }
  int64_t end(int64_t chunk) const {
    const int64_t part = chunk % in_each();
    return part + 1 == in_each() ? (chunk / in_each() + 1) * rows_each : begin(chunk) + kRows;
  }
};

struct GatedResidualBackward {
  Rows grad, branch, grad_branch;
  Modulation gate;
  Chunks chunks;
  float* gate_sums = nullptr;  // `[chunks, D]`: of grad * branch
};

// With n = (x - mean) / std and h = grad * weight * (1 + scale):
//
//   grad_x = (h - mean(h) - n mean(h n)) / std + passed
struct ModulatedNormBackward {
  Rows x, grad, grad_x;         // of one dtype
  Rows passed;                  // a gradient of x that came another way, or no data
  GatedResidualBackward gated;  // with a branch: `gated.grad` is grad_x
  Modulation scale;
  const float* weight = nullptr;
  bool centered = true;
  const float* statistics = nullptr;
  Chunks chunks;
  float *grad_sums = nullptr, *normed_sums = nullptr;  // `[chunks, D]`: of grad; of grad * n
};

// The vectors' gradients, zeros before, from the sums of all chunks.
struct ModulationSums {
  Chunks chunks;
  int64_t width = 0;
  const float *grad_sums = nullptr, *normed_sums = nullptr, *gate_sums = nullptr;
  Modulation scale;
  const float *weight = nullptr, *bias = nullptr;
  int64_t shift_rows_each = 1, gate_rows_each = 1;
  float *shift = nullptr, *scales = nullptr, *gate = nullptr;  // `[vectors, D]` or null
  float *weights = nullptr, *biases = nullptr;                 // `[D]` or null
};

struct BiasGelu {
  Rows x, out;  // of one dtype
  const float* bias = nullptr;
  bool tanh = true;  // else the error function
};

struct BiasGeluBackward {
  Rows x, grad, grad_x;  // of one dtype
  const float* bias = nullptr;
  bool tanh = true;
  Chunks chunks;
  float* bias_sums = nullptr;  // `[chunks, D]`: of grad_x, or null
};

}  // namespace vqkernels
