// What the elements of a step are made of: a row of the table, guided outputs, predictions.
#pragma once

#include "noise_pieces.h"

namespace vqkernels::cuda {

// Columns of the table: vqkernels/ops/denoise_step.py. Those of the next sample and of the extra
// result begin alike: sample, prediction, output, history.
enum Column {
  kGuidance = 0,
  kGuidanceRescale = 1,
  kPredictionSample = 2,
  kPredictionOutput = 3,
  kClip = 4,
  kPrev = 5,
  kPrevNoise = 12,
  kVarianceLogMin = 13,
  kVarianceLogMax = 14,
  kExtra = 15,
};

struct Row {
  const float* columns;
  int64_t step;

  __device__ Row(const DenoiseStep& call, unsigned sample, int64_t level) {
    const int64_t given = call.index[call.one_index ? 0 : sample * call.grid.levels + level];
    step = min(max(given, int64_t(0)), call.steps - 1);
    columns = call.table + step * kCoefficients;
  }
  __device__ float operator[](int column) const { return columns[column]; }
};

// What the elements of a sample decide together: what guided outputs are scaled by, and the limit
// of a dynamic threshold.
struct Whole {
  float factor = 1, limit = 1;
};

// A coefficient of 0 leaves its term out, whatever the values are.
template <int kCount>
__device__ __forceinline__ void add_term(float coefficient, const float (&values)[kCount],
                                         float (&sum)[kCount]) {
  if (coefficient == 0.0f) return;
#pragma unroll
  for (int e = 0; e < kCount; ++e) sum[e] = fmaf(coefficient, values[e], sum[e]);
}

// x between -limit and limit; NaN stays, and a limit that is NaN leaves x.
__device__ __forceinline__ float clamped(float x, float limit) {
  const float below = x > limit ? limit : x;
  return below < -limit ? -limit : below;
}

// The model's outputs, and those without a condition.
template <int kCount>
struct Outputs {
  Loaded<kCount> model, uncond;

  template <bool kGuided>
  __device__ __forceinline__ void load(const DenoiseStep& call, unsigned sample, int64_t first) {
    model.load(call.model_output, sample, first);
    if (kGuided && call.uncond_output.data != nullptr) {
      uncond.load(call.uncond_output, sample, first);
    }
  }

  // Guided, by a scale that is at 1 exactly the condition's own outputs.
  template <bool kGuided>
  __device__ __forceinline__ void read(const DenoiseStep& call, const Row& row, float factor,
                                       float (&output)[kCount]) const {
    model.read(call.model_output, output);
    if (!kGuided || call.uncond_output.data == nullptr) return;
    const float more = row[kGuidance] - 1.0f;
    if (more != 0.0f) {
      float other[kCount];
      uncond.read(call.uncond_output, other);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        output[e] = fmaf(more, output[e] - other[e], output[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) output[e] *= factor;
  }
};

// Before any threshold.
template <int kCount>
__device__ __forceinline__ void predict(const Row& row, const float (&x)[kCount],
                                        const float (&output)[kCount],
                                        float (&prediction)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) prediction[e] = 0;
  add_term(row[kPredictionSample], x, prediction);
  add_term(row[kPredictionOutput], output, prediction);
}

}  // namespace vqkernels::cuda
