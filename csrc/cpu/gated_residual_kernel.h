// residual + gate * branch, and its gradients.
// Bytes: each tensor read or written once.
#pragma once

#include "modulation_rows.h"

namespace vqkernels {
namespace {

inline void gated_residual(const GatedResidual& task, int64_t begin, int64_t end) {
  const int64_t width = task.residual.width;
  Scratch scratch(2 * padded(width));
  float* gate_buffer = scratch.take<float>(width);
  float* branch_buffer = scratch.take<float>(width);
  dispatch_branch(
      task.residual.dtype, task.branch.dtype, [&](auto* stream_type, auto* branch_type) {
        using T = std::remove_pointer_t<decltype(stream_type)>;
        using X = std::remove_pointer_t<decltype(branch_type)>;
        const float* gate = nullptr;
        for (int64_t row = begin; row < end; ++row) {
          if (gate == nullptr || row % task.gate.rows_each == 0) {
            gate = vector_for(task.gate, row, gate_buffer);
          }
          const T* residual = row_at<const T>(task.residual, row);
          const X* branch = branch_row<X>(task.branch, row, branch_buffer);
          T* out = row_at<T>(task.out, row);
          each_vector(width, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
            store_at(out, column, count,
                     multiply_add(load_at(gate, column, count), load_at(branch, column, count),
                                  load_at(residual, column, count)));
          });
        }
      });
}

// The gate's part of a backward pass over a group of rows whose gradient is `grad`.
template <typename X, int kRows>
struct GateGroup {
  const X* branch[kRows];
  X* grad_branch[kRows];
  const float* gate;
  float* sums;

  // `buffers` holds 2 * kRows rows `stride` apart.
  GateGroup(const GatedResidualBackward& task, int64_t row, const float* gate, float* sums,
            float* buffers, int64_t stride)
      : gate(gate), sums(sums) {
    for (int r = 0; r < kRows; ++r) {
      branch[r] = branch_row<X>(task.branch, row + r, buffers + 2 * r * stride);
      if constexpr (std::is_same_v<X, float>) {
        grad_branch[r] = task.grad_branch.dtype == DType::f32
                             ? row_at<float>(task.grad_branch, row + r)
                             : buffers + (2 * r + 1) * stride;
      } else {
        grad_branch[r] = row_at<X>(task.grad_branch, row + r);
      }
    }
  }

  VQKERNELS_INLINE void take(const vf (&grad)[kRows], int64_t column, int64_t count) const {
    const vf gates = load_at(gate, column, count);
    vf terms[kRows];
    for (int r = 0; r < kRows; ++r) {
      terms[r] = grad[r] * load_at(branch[r], column, count);
      store_at(grad_branch[r], column, count, grad[r] * gates);
    }
    add_to(sums, column, count, terms);
  }

  void close(const GatedResidualBackward& task, int64_t row) const {
    if constexpr (std::is_same_v<X, float>) {
      if (task.grad_branch.dtype == DType::f32) return;
      for (int r = 0; r < kRows; ++r) narrow(grad_branch[r], task.grad_branch, row + r);
    }
  }
};

inline void gated_residual_backward(const GatedResidualBackward& task, int64_t chunk_begin,
                                    int64_t chunk_end) {
  const int64_t width = task.grad.width, stride = padded(width);
  Scratch scratch((1 + 2 * kTogether) * stride);
  float* gate_buffer = scratch.take<float>(stride);
  float* buffers = scratch.take<float>(2 * kTogether * stride);
  dispatch_branch(task.grad.dtype, task.branch.dtype, [&](auto* stream_type, auto* branch_type) {
    using T = std::remove_pointer_t<decltype(stream_type)>;
    using X = std::remove_pointer_t<decltype(branch_type)>;
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const float* gate = nullptr;
      float* sums = task.gate_sums + chunk * width;
      std::fill(sums, sums + width, 0.0f);
      each_group(
          task.chunks.begin(chunk), task.chunks.end(chunk), task.chunks.rows_each,
          [&](int64_t row) { gate = vector_for(task.gate, row, gate_buffer); },
          [&](int64_t row, auto rows) {
            constexpr int kRows = decltype(rows)::value;
            const GateGroup<X, kRows> group(task, row, gate, sums, buffers, stride);
            const T* from[kRows];
            for (int r = 0; r < kRows; ++r) from[r] = row_at<const T>(task.grad, row + r);
            each_vector(width, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
              vf grad[kRows];
              for (int r = 0; r < kRows; ++r) grad[r] = load_at(from[r], column, count);
              group.take(grad, column, count);
            });
            group.close(task, row);
          });
    }
  });
}

}  // namespace
}  // namespace vqkernels
