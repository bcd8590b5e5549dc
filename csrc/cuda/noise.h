// Noised samples and steps of samplers on CUDA devices: launchers over raw pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace vqkernels::cuda {

// B samples of E neighbouring elements each, `stride` elements apart.
struct Samples {
  void* data = nullptr;  // none: not given, or not wanted
  DType dtype = DType::f32;
  int64_t stride = 0;
  bool packed = false;  // the launchers': pieces may be moved at once
};

// `levels` values a sample, each for as many of its elements, which follow each other. E is fewer
// than 2^34, and a multiple of `levels`.
struct NoiseGrid {
  int64_t batch = 0, elements = 0, levels = 1;
};

// Noise that is given, or a key to draw it by.
struct Noise {
  Samples given;
  const int64_t* key = nullptr;         // seed, step, stream
  const int64_t* sample_ids = nullptr;  // `[B]`, or 0 to B - 1
};

struct NormalNoise {
  NoiseGrid grid;
  Samples out;
  Noise noise;  // a key
};

void normal_noise(const NormalNoise& problem, const Context& context);

enum class Target : int32_t { epsilon = 0, sample = 1, v = 2, flow = 3 };

//   x_t = alpha * x0 + sigma * noise
//   target = noise, x0, alpha * noise - sigma * x0 or noise - x0
struct Diffuse {
  NoiseGrid grid;
  Samples x0, x_t, wanted;                         // of one dtype
  const float *alpha = nullptr, *sigma = nullptr;  // `[B, levels]`
  Noise noise;
  Target target = Target::epsilon;
};

void diffuse(const Diffuse& problem, const Context& context);

enum class Threshold : int32_t { none = 0, clip = 1, dynamic = 2 };
enum class VarianceType : int32_t { learned_range = 0, learned = 1 };

constexpr int kCoefficients = 22;  // columns of a row of the table
constexpr int kMostHistory = 4;

// A step as vqkernels/ops/denoise_step.py defines it. Where outputs are guided or thresholds
// dynamic, a sample has one level.
struct DenoiseStep {
  NoiseGrid grid;
  Samples sample;
  Samples model_output, uncond_output, variance;  // of one dtype
  Samples history[kMostHistory];
  int histories = 0;
  const float* table = nullptr;  // `[steps, 22]`
  int64_t steps = 1;
  const int64_t* index = nullptr;  // rows of the table, `[B, levels]`; clamped into it
  bool one_index = false;          // for all samples and levels
  Noise noise;
  Threshold threshold = Threshold::none;
  double ratio = 1;
  VarianceType variance_type = VarianceType::learned_range;
  Samples prev_sample, prediction, extra;  // prev_sample's memory may be sample's or a history's
};

// Elements of a sample that a dynamic threshold takes: they are counted in 32 bits.
constexpr int64_t kMostRanked = (int64_t(1) << 32) - 1;

void denoise_step(const DenoiseStep& problem, const Context& context);

}  // namespace vqkernels::cuda
