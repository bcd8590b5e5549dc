// Normalized and modulated rows, after a gated sum or without one.
// Bytes: x (and the branch) read once, each result written once; four rows at a time stay in L1.
#pragma once

#include <cmath>

#include "modulation_rows.h"

namespace vqkernels {
namespace {

// The vectors in force, and room for a group's rows.
struct NormBuffers {
  float *factor, *addend, *gate, *values, *branch;
  int64_t stride;

  explicit NormBuffers(int64_t width) : stride(padded(width)) {
    Scratch scratch((3 + 2 * kTogether) * stride);
    factor = scratch.take<float>(stride);
    addend = scratch.take<float>(stride);
    gate = scratch.take<float>(stride);
    values = scratch.take<float>(kTogether * stride);
    branch = scratch.take<float>(kTogether * stride);
  }
};

// Mean and deviation of kRows rows of floats whose sums are known. The mean is rounded, so what is
// left of it when it has been subtracted counts: `rest`, without which rows whose mean is far
// above their deviation would lose digits.
template <int kRows>
struct Deviations {
  vf mean[kRows], rest[kRows], inverse[kRows];

  VQKERNELS_INLINE Deviations(const float* const (&values)[kRows], const Sums<kRows>& sums,
                              const ModulatedNorm& task, float* statistics) {
    const int64_t width = task.x.width;
    const float share = 1.0f / float(width);
    Sums<kRows> squares, rests;
    for (int r = 0; r < kRows; ++r) {
      mean[r] = splat(task.centered ? sums.of(r) * share : 0.0f);
    }
    each_vector_in_two(width, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
      for (int r = 0; r < kRows; ++r) {
        const vf away = first_lanes(load_at(values[r], column, count) - mean[r], count);
        squares.parts[r][part] = multiply_add(away, away, squares.parts[r][part]);
        rests.parts[r][part] += away;
      }
    });
    for (int r = 0; r < kRows; ++r) {
      const float square = squares.of(r) * share;
      const float left = task.centered ? rests.of(r) * share : 0.0f;
      const float variance = square - left * left;
      const float scale = 1.0f / std::sqrt((variance < 0 ? 0.0f : variance) + task.eps);
      statistics[2 * r] = mean[r][0] + left;
      statistics[2 * r + 1] = scale;
      rest[r] = splat(-left * scale);
      inverse[r] = splat(scale);
    }
  }
};

template <typename T, typename X, bool kGated, int kRows>
inline void modulated_norm_group(const ModulatedNorm& task, int64_t row, const NormBuffers& room) {
  const int64_t width = task.x.width;
  T *x[kRows], *out[kRows];
  const T* residual[kRows];
  const X* branch[kRows];
  float* copies[kRows];
  const float* values[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = row_at<T>(task.x, row + r);
    out[r] = row_at<T>(task.out, row + r);
    copies[r] = room.values + r * room.stride;
    if constexpr (std::is_same_v<T, float>) {
      values[r] = x[r];
    } else {
      values[r] = copies[r];
    }
    if constexpr (kGated) {
      residual[r] = row_at<const T>(task.gated.residual, row + r);
      branch[r] = branch_row<X>(task.gated.branch, row + r, room.branch + r * room.stride);
    }
  }

  Sums<kRows> sums;
  each_vector_in_two(width, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
    vf gate = {};
    if constexpr (kGated) gate = load_at(room.gate, column, count);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kGated) {
        const vf sum = multiply_add(gate, load_at(branch[r], column, count),
                                    load_at(residual[r], column, count));
        store_at(x[r], column, count, sum);
      }
      // The rounded sum: what a reader of the stream normalizes.
      const vf value = load_at(x[r], column, count);
      if constexpr (!std::is_same_v<T, float>) store_at(copies[r], column, count, value);
      sums.parts[r][part] += value;
    }
  });

  const Deviations<kRows> deviations(values, sums, task, task.statistics + 2 * row);

  each_vector(width, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
    const vf factor = load_at(room.factor, column, count);
    const vf addend = load_at(room.addend, column, count);
    for (int r = 0; r < kRows; ++r) {
      const vf away = load_at(values[r], column, count) - deviations.mean[r];
      const vf normed = multiply_add(away, deviations.inverse[r], deviations.rest[r]);
      store_at(out[r], column, count, multiply_add(normed, factor, addend));
    }
  });
}

template <typename T, typename X, bool kGated>
inline void modulated_norm_rows(const ModulatedNorm& task, int64_t begin, int64_t end) {
  const NormBuffers room(task.x.width);
  NormBuffers in_force = room;
  each_group(
      begin, end, task.rows_each,
      [&](int64_t row) {
        factor_for(task.scale, task.weight, row, room.factor, &task.shift, task.bias, room.addend);
        if constexpr (kGated) {
          in_force.gate = const_cast<float*>(vector_for(task.gated.gate, row, room.gate));
        }
      },
      [&](int64_t row, auto rows) {
        modulated_norm_group<T, X, kGated, decltype(rows)::value>(task, row, in_force);
      });
}

inline void ada_layer_norm(const ModulatedNorm& task, int64_t begin, int64_t end) {
  const bool gated = task.gated.branch.data != nullptr;
  const DType branch = gated ? task.gated.branch.dtype : task.x.dtype;
  dispatch_branch(task.x.dtype, branch, [&](auto* stream_type, auto* branch_type) {
    using T = std::remove_pointer_t<decltype(stream_type)>;
    using X = std::remove_pointer_t<decltype(branch_type)>;
    if (gated) {
      modulated_norm_rows<T, X, true>(task, begin, end);
    } else if constexpr (std::is_same_v<T, X>) {
      modulated_norm_rows<T, X, false>(task, begin, end);
    }
  });
}

}  // namespace
}  // namespace vqkernels
