// The noise ops' work as kernels see it. Torch-free, plain data.
//
// A tensor is `count` samples of `elements` that lie next to each other, cut into blocks; a sample
// has `Levels`, stretches of elements with one noise level each.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace vqkernels {

constexpr int64_t kNoiseBlock = 2048;

struct Batch {
  int64_t count = 0, elements = 0;

  int64_t blocks_each() const { return (elements + kNoiseBlock - 1) / kNoiseBlock; }
};

struct Samples {
  void* data = nullptr;  // null: the operand is missing
  int64_t stride = 0;    // elements from one sample to the next
  DType dtype = DType::f32;
};

// Level l of sample b is number b * each + l; with `each` 0 there is one for all samples.
struct Levels {
  int64_t each = 1, length = 1;
};

struct KeyedNoise {
  uint64_t seed = 0;
  uint32_t step = 0, stream = 0;
  const int64_t* sample_ids = nullptr;  // null: 0, 1, 2, ...

  uint32_t sample_id(int64_t sample) const {
    return uint32_t(sample_ids == nullptr ? sample : sample_ids[sample]);
  }
};

struct NormalNoise {
  Batch batch;
  Samples out;
  KeyedNoise key;
};

enum class NoiseTarget : int32_t { epsilon = 0, sample = 1, v = 2, flow = 3 };
enum class NoiseLoss : int32_t { mse = 0, huber = 1, pseudo_huber = 2 };

// Data that noise is mixed into: alpha x0 + sigma z.
struct Mixture {
  Batch batch;
  Samples x0, noise;  // without a given noise it is drawn by the key
  KeyedNoise key;
  Levels levels;
  const float *alpha = nullptr, *sigma = nullptr;  // a level each
  NoiseTarget target = NoiseTarget::epsilon;
};

struct Diffuse {
  Mixture mixture;
  Samples x_t, target;
  bool streaming = false;  // results are larger than caches: they are written past them
};

struct DiffusionLoss {
  // A level's elements are summed in chunks that its length alone decides, and chunks in order.
  static constexpr int64_t kChunk = 8 * kNoiseBlock;

  Mixture mixture;
  Samples model_output;
  NoiseLoss loss = NoiseLoss::mse;
  const float* delta = nullptr;  // a level each, of the Huber losses

  // Forward: sums of rho, one a chunk.
  double* sums = nullptr;
  int64_t chunks_each() const { return (mixture.levels.length + kChunk - 1) / kChunk; }

  // Backward: what a level's slopes are multiplied with, and where they go.
  const float* scale = nullptr;
  Samples grad_output, grad_x0;
};

enum class Threshold : int32_t { none = 0, clip = 1, dynamic = 2 };

// The columns of a row of `denoise_step`'s table.
namespace step_column {
enum : int {
  guidance = 0,
  guidance_rescale = 1,
  prediction_sample = 2,
  prediction_output = 3,
  clip = 4,
  prev = 5,  // of sample, prediction, output, history 0 to 3
  prev_noise = 12,
  variance_log_min = 13,
  variance_log_max = 14,
  extra = 15,  // as prev
  count = 22,
};
}

struct DenoiseStep {
  static constexpr int kHistory = 4;

  Batch batch;
  Samples sample, model_output, uncond_output, history[kHistory], variance, noise;
  Samples prev, prediction, extra;
  const float* table = nullptr;
  int64_t steps = 0;               // rows of the table
  const int64_t* index = nullptr;  // a level each
  Levels levels;
  bool keyed = false;  // noise is drawn by the key, at step + index
  KeyedNoise key;
  Threshold threshold = Threshold::none;
  double ratio = 0;
  bool learned_range = true;
  bool whole_samples = false;  // statistics of a sample come first: its blocks stay together
  bool streaming = false;
};

}  // namespace vqkernels
