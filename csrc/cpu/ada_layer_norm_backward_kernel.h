// Gradients of normalized and modulated rows, and of the gated sum before them.
// Bytes: x, the gradients and the branch read once, each gradient written once. A chunk's sums and
// four rows stay in L1.
#pragma once

#include "gated_residual_kernel.h"

namespace vqkernels {
namespace {

// Where a chunk's sums go, and the vectors in force.
struct BackwardRoom {
  float *factor, *gate_buffer, *buffers;
  const float* gate = nullptr;
  float *grad_sums = nullptr, *normed_sums = nullptr, *gate_sums = nullptr;
  int64_t stride;

  explicit BackwardRoom(int64_t width) : stride(padded(width)) {
    Scratch scratch((2 + 2 * kTogether) * stride);
    factor = scratch.take<float>(stride);
    gate_buffer = scratch.take<float>(stride);
    buffers = scratch.take<float>(2 * kTogether * stride);
  }

  void start_chunk(const ModulatedNormBackward& task, int64_t chunk) {
    const int64_t width = task.x.width;
    const auto cleared = [&](float* all) {
      if (all != nullptr) std::fill(all + chunk * width, all + (chunk + 1) * width, 0.0f);
      return all != nullptr ? all + chunk * width : nullptr;
    };
    grad_sums = cleared(task.grad_sums);
    normed_sums = cleared(task.normed_sums);
    gate_sums = cleared(task.gated.gate_sums);
  }
};

template <typename T, typename X, bool kGated, int kRows>
inline void modulated_norm_backward_group(const ModulatedNormBackward& task, int64_t row,
                                          const BackwardRoom& room) {
  const int64_t width = task.x.width;
  const T *x[kRows], *grads[kRows], *passed[kRows];
  T* grad_x[kRows];
  vf mean[kRows], inverse[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = row_at<const T>(task.x, row + r);
    grads[r] = row_at<const T>(task.grad, row + r);
    passed[r] = task.passed.data != nullptr ? row_at<const T>(task.passed, row + r) : nullptr;
    grad_x[r] = row_at<T>(task.grad_x, row + r);
    mean[r] = splat(task.statistics[2 * (row + r)]);
    inverse[r] = splat(task.statistics[2 * (row + r) + 1]);
  }

  // Sums of h and of h n along the rows, of grad and of grad * n down the columns.
  Sums<kRows> along, along_normed;
  each_vector_in_two(width, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
    const vf factor = load_at(room.factor, column, count);
    vf grad[kRows], times_normed[kRows];
    for (int r = 0; r < kRows; ++r) {
      grad[r] = load_at(grads[r], column, count);
      const vf normed = (load_at(x[r], column, count) - mean[r]) * inverse[r];
      const vf h = grad[r] * factor;
      times_normed[r] = grad[r] * normed;
      along.parts[r][part] += h;
      along_normed.parts[r][part] = multiply_add(h, normed, along_normed.parts[r][part]);
    }
    add_to(room.grad_sums, column, count, grad);
    add_to(room.normed_sums, column, count, times_normed);
  });

  vf constant[kRows], slope[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float share = 1.0f / float(width);
    constant[r] = splat(task.centered ? -share * along.of(r) : 0.0f);
    slope[r] = splat(-share * along_normed.of(r));
  }
  [[maybe_unused]] const auto gated = [&] {
    if constexpr (kGated) {
      return GateGroup<X, kRows>(task.gated, row, room.gate, room.gate_sums, room.buffers,
                                 room.stride);
    } else {
      return 0;
    }
  }();
  each_vector(width, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
    const vf factor = load_at(room.factor, column, count);
    vf grad[kRows];
    for (int r = 0; r < kRows; ++r) {
      const vf normed = (load_at(x[r], column, count) - mean[r]) * inverse[r];
      const vf h = load_at(grads[r], column, count) * factor;
      grad[r] = multiply_add(normed, slope[r], h + constant[r]) * inverse[r];
      if (passed[r] != nullptr) grad[r] += load_at(passed[r], column, count);
      store_at(grad_x[r], column, count, grad[r]);
    }
    if constexpr (kGated) gated.take(grad, column, count);
  });
  if constexpr (kGated) gated.close(task.gated, row);
}

template <typename T, typename X, bool kGated>
inline void modulated_norm_backward_chunks(const ModulatedNormBackward& task, int64_t chunk_begin,
                                           int64_t chunk_end) {
  BackwardRoom room(task.x.width);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    room.start_chunk(task, chunk);
    each_group(
        task.chunks.begin(chunk), task.chunks.end(chunk), task.chunks.rows_each,
        [&](int64_t row) {
          factor_for(task.scale, task.weight, row, room.factor);
          if constexpr (kGated) room.gate = vector_for(task.gated.gate, row, room.gate_buffer);
        },
        [&](int64_t row, auto rows) {
          modulated_norm_backward_group<T, X, kGated, decltype(rows)::value>(task, row, room);
        });
  }
}

inline void ada_layer_norm_backward(const ModulatedNormBackward& task, int64_t chunk_begin,
                                    int64_t chunk_end) {
  const bool gated = task.gated.branch.data != nullptr;
  const DType branch = gated ? task.gated.branch.dtype : task.x.dtype;
  dispatch_branch(task.x.dtype, branch, [&](auto* stream_type, auto* branch_type) {
    using T = std::remove_pointer_t<decltype(stream_type)>;
    using X = std::remove_pointer_t<decltype(branch_type)>;
    if (gated) {
      modulated_norm_backward_chunks<T, X, true>(task, chunk_begin, chunk_end);
    } else if constexpr (std::is_same_v<T, X>) {
      modulated_norm_backward_chunks<T, X, false>(task, chunk_begin, chunk_end);
    }
  });
}

// Columns [begin, end) of the vectors' gradients.
inline void modulation_sums(const ModulationSums& task, int64_t begin, int64_t end) {
  const int64_t width = task.width, parts = task.chunks.in_each();
  const int64_t rows_each = task.chunks.rows_each;
  Scratch scratch(padded(width));
  float* buffer = scratch.take<float>(width);
  for (int64_t first = 0, row = 0; row < task.chunks.rows; first += parts, row += rows_each) {
    const auto total = [&](const float* sums, int64_t column, int64_t count) {
      vf sum = load_at(sums + first * width, column, count);
      for (int64_t part = 1; part < parts; ++part) {
        sum += load_at(sums + (first + part) * width, column, count);
      }
      return sum;
    };
    const auto add = [&](float* to, int64_t vector, int64_t column, int64_t count, vf sum) {
      float* sums = to + vector * width;
      store_at(sums, column, count, load_at(sums, column, count) + sum);
    };
    const float* scale = task.weights != nullptr || task.biases != nullptr
                             ? vector_for(task.scale, row, buffer)
                             : nullptr;
    each_vector(end - begin, [&](int64_t more, int64_t count) {
      const int64_t column = begin + more;
      if (task.gate != nullptr) {
        add(task.gate, row / task.gate_rows_each, column, count,
            total(task.gate_sums, column, count));
      }
      if (task.shift == nullptr) return;
      const vf grad = total(task.grad_sums, column, count);
      const vf normed = total(task.normed_sums, column, count);
      vf scaled = normed;
      if (task.weight != nullptr) scaled *= load_at(task.weight, column, count);
      if (task.bias != nullptr) {
        scaled = multiply_add(grad, load_at(task.bias, column, count), scaled);
      }
      add(task.shift, row / task.shift_rows_each, column, count, grad);
      add(task.scales, row / task.scale.rows_each, column, count, scaled);
      if (scale == nullptr) return;
      const vf factor = load_at(scale, column, count) + splat(1.0f);
      if (task.weights != nullptr) add(task.weights, 0, column, count, normed * factor);
      if (task.biases != nullptr) add(task.biases, 0, column, count, grad * factor);
    });
  }
}

}  // namespace
}  // namespace vqkernels
