// One step of a sampler: see vqkernels/ops/denoise_step.py for the equation. A block is worked on
// in cache: guided output, prediction and the affine part in one pass, then history and noise.
#pragma once

#include <algorithm>
#include <cmath>

#include "noise_blocks.h"
#include "sample_statistics.h"

namespace vqkernels {
namespace {

// What a sample as a whole decides of its elements.
struct WholeSample {
  float output_factor = 1;  // of the guided output
  float limit = 0;          // of the prediction, which is divided by it too
};

struct StepRooms {
  NoiseRoom sample, output, uncond, entry, variance, noise, prediction, prev, extra;
};

// In place of an operand whose coefficient is 0, so that it counts for nothing, also where it is
// infinite.
alignas(64) constexpr float kNothing[kNoiseBlock] = {};

inline const float* counted(float coefficient, const float* operand) {
  return coefficient == 0 ? kNothing : operand;
}

inline int64_t row_number(const DenoiseStep& task, int64_t level) {
  return std::clamp<int64_t>(task.index[level], 0, task.steps - 1);
}

inline const float* row_of(const DenoiseStep& task, int64_t level) {
  return task.table + row_number(task, level) * step_column::count;
}

inline vf guided(vf output, vf uncond, vf more) {
  return multiply_add(more, output - uncond, output);
}

// The model's output after guidance. What was read is in `rooms`, and so is the result.
inline const float* output_of(const DenoiseStep& task, const float* row, float factor,
                              int64_t sample, int64_t first, int64_t count, StepRooms& rooms) {
  const float* output = read_block(task.model_output, sample, first, count, rooms.output);
  if (task.uncond_output.data == nullptr) return output;
  const float more = row[step_column::guidance] - 1;
  if (more == 0 && factor == 1) return output;
  const float* uncond = read_block(task.uncond_output, sample, first, count, rooms.uncond);
  float* out = rooms.output.floats;
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf v = load_at(output, at, lanes);
    if (more != 0) v = guided(v, load_at(uncond, at, lanes), splat(more));
    store_at(out, at, lanes, v * splat(factor));
  });
  return out;
}

// prediction = a sample + b output and prev = c sample + d output: without a threshold `prev` is
// linear in both, whatever it has of the prediction.
template <bool kStored>
inline void linear_part(const float* row, const float* sample, const float* output, int64_t count,
                        float* prediction, float* prev) {
  const float a = row[step_column::prediction_sample], b = row[step_column::prediction_output];
  const float* of = row + step_column::prev;
  const float c = float(of[0] + double(of[1]) * a), d = float(of[2] + double(of[1]) * b);
  const float *sample1 = counted(a, sample), *output1 = counted(b, output);
  const float *sample2 = counted(c, sample), *output2 = counted(d, output);
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    const vf sum =
        multiply_add(splat(c), load_at(sample2, at, lanes), splat(d) * load_at(output2, at, lanes));
    if constexpr (kStored) {
      store_at(prediction, at, lanes,
               multiply_add(splat(a), load_at(sample1, at, lanes),
                            splat(b) * load_at(output1, at, lanes)));
    }
    store_at(prev, at, lanes, sum);
  });
}

// The same with the prediction limited to [-limit, limit], and divided by the limit if `kScaled`.
template <bool kScaled, bool kStored>
inline void limited_part(const float* row, float limit, const float* sample, const float* output,
                         int64_t count, float* prediction, float* prev) {
  const float a = row[step_column::prediction_sample], b = row[step_column::prediction_output];
  const float* of = row + step_column::prev;
  const float *sample1 = counted(a, sample), *output1 = counted(b, output);
  const float *sample2 = counted(of[0], sample), *output2 = counted(of[2], output);
  const float inverse = 1 / limit;
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf x =
        multiply_add(splat(a), load_at(sample1, at, lanes), splat(b) * load_at(output1, at, lanes));
    x = maximum(splat(-limit), minimum(splat(limit), x));
    if constexpr (kScaled) x *= splat(inverse);
    const vf sum = multiply_add(splat(of[0]), load_at(sample2, at, lanes),
                                splat(of[2]) * load_at(output2, at, lanes));
    if constexpr (kStored) store_at(prediction, at, lanes, x);
    store_at(prev, at, lanes, multiply_add(splat(of[1]), x, sum));
  });
}

template <typename F>
inline void with_bool(bool value, const F& f) {
  if (value) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

inline void add_term(float coefficient, const float* operand, int64_t count, float* sum) {
  if (coefficient == 0) return;
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    store_at(
        sum, at, lanes,
        multiply_add(splat(coefficient), load_at(operand, at, lanes), load_at(sum, at, lanes)));
  });
}

// Multiplies noise by the deviation that the model says.
inline void scale_noise(const DenoiseStep& task, const float* row, const float* variance,
                        int64_t count, const float* noise, float* out) {
  const float low = row[step_column::variance_log_min], high = row[step_column::variance_log_max];
  constexpr float kLog2E = 1.44269504088896341f;
  // exp(((v + 1) / 2 (high - low) + low) / 2), as a power of 2.
  const vf slope = splat((high - low) / 4 * kLog2E), start = splat((high + low) / 4 * kLog2E);
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    const vf v = load_at(variance, at, lanes);
    const vf deviation =
        task.learned_range ? exp2<5>(multiply_add(v, slope, start)) : square_root(v);
    store_at(out, at, lanes, load_at(noise, at, lanes) * deviation);
  });
}

inline void step_stretch(const DenoiseStep& task, int64_t level, const WholeSample& whole,
                         int64_t sample, int64_t first, int64_t count, StepRooms& rooms) {
  const float* row = row_of(task, level);
  const float* x = read_block(task.sample, sample, first, count, rooms.sample);
  const float* output = output_of(task, row, whole.output_factor, sample, first, count, rooms);

  const bool wanted = task.prediction.data != nullptr, extra_wanted = task.extra.data != nullptr;
  // `prev` may take the place of an operand that is read again, or later.
  const bool kept = task.streaming || extra_wanted || task.history[0].data != nullptr;
  float* prev = start_block(task.prev, sample, first, kept, rooms.prev);
  float* prediction = rooms.prediction.floats;
  if (wanted) {
    prediction = start_block(task.prediction, sample, first, task.streaming, rooms.prediction);
  }
  const float limit = task.threshold == Threshold::clip ? row[step_column::clip] : whole.limit;
  with_bool(wanted || extra_wanted, [&](auto stored) {
    constexpr bool kStored = decltype(stored)::value;
    if (task.threshold == Threshold::none) {
      linear_part<kStored>(row, x, output, count, prediction, prev);
    } else if (task.threshold == Threshold::clip) {
      limited_part<false, kStored>(row, limit, x, output, count, prediction, prev);
    } else {
      limited_part<true, kStored>(row, limit, x, output, count, prediction, prev);
    }
  });
  float* extra = nullptr;
  if (extra_wanted) {
    extra = rooms.extra.floats;
    std::fill(extra, extra + count, 0.0f);
    const float* operands[] = {x, prediction, output};
    for (int i = 0; i < 3; ++i) add_term(row[step_column::extra + i], operands[i], count, extra);
  }
  for (int i = 0; i < DenoiseStep::kHistory && task.history[i].data != nullptr; ++i) {
    const float to_prev = row[step_column::prev + 3 + i];
    const float to_extra = extra_wanted ? row[step_column::extra + 3 + i] : 0;
    if (to_prev == 0 && to_extra == 0) continue;
    const float* entry = read_block(task.history[i], sample, first, count, rooms.entry);
    add_term(to_prev, entry, count, prev);
    add_term(to_extra, entry, count, extra);
  }
  const float to_noise = row[step_column::prev_noise];
  if (to_noise != 0 && (task.keyed || task.noise.data != nullptr)) {
    const float* z;
    if (task.keyed) {
      const uint32_t step = task.key.step + uint32_t(row_number(task, level));
      z = fill_normals(task.key, task.key.sample_id(sample), step, first, count,
                       rooms.noise.floats);
    } else {
      z = read_block(task.noise, sample, first, count, rooms.noise);
    }
    if (task.variance.data != nullptr) {
      const float* v = read_block(task.variance, sample, first, count, rooms.variance);
      scale_noise(task, row, v, count, z, rooms.entry.floats);
      z = rooms.entry.floats;
    }
    add_term(to_noise, z, count, prev);
  }
  finish_block(prev, task.prev, sample, first, count, task.streaming);
  if (wanted) finish_block(prediction, task.prediction, sample, first, count, task.streaming);
  if (extra_wanted) finish_block(extra, task.extra, sample, first, count, task.streaming);
}

// Quantile and deviations of a sample come from passes of their own over it.
inline WholeSample whole_sample(const DenoiseStep& task, int64_t sample, StepRooms& rooms) {
  WholeSample whole;
  const int64_t elements = task.batch.elements;
  const float* row = row_of(task, task.levels.each == 0 ? 0 : sample);
  const float rescale = row[step_column::guidance_rescale];
  if (task.uncond_output.data != nullptr && rescale != 0 && elements > 1) {
    Deviation given, with_guidance;
    for (int64_t first = 0; first < elements; first += kNoiseBlock) {
      const int64_t count = std::min(kNoiseBlock, elements - first);
      given.add(read_block(task.model_output, sample, first, count, rooms.entry), count);
      with_guidance.add(output_of(task, row, 1, sample, first, count, rooms), count);
    }
    const double ratio = given.deviation() / with_guidance.deviation();
    whole.output_factor = float(rescale * ratio + 1 - double(rescale));
  }
  if (task.threshold == Threshold::dynamic) {
    SampleQuantile sizes(elements);
    const float a = row[step_column::prediction_sample], b = row[step_column::prediction_output];
    for (int64_t first = 0; first < elements; first += kNoiseBlock) {
      const int64_t count = std::min(kNoiseBlock, elements - first);
      const float* x = read_block(task.sample, sample, first, count, rooms.sample);
      const float* output = output_of(task, row, whole.output_factor, sample, first, count, rooms);
      const float *sample1 = counted(a, x), *output1 = counted(b, output);
      float* sizes_here = rooms.prediction.floats;
      each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
        const vf value = multiply_add(splat(a), load_at(sample1, at, lanes),
                                      splat(b) * load_at(output1, at, lanes));
        store_at(sizes_here, at, lanes, (vf)((vi)value & splat(int32_t(0x7fffffff))));
      });
      sizes.add(sizes_here, count);
    }
    const float quantile = sizes.at(task.ratio);
    const float most = row[step_column::clip];
    whole.limit = std::isnan(quantile) ? quantile : std::min(std::max(quantile, 1.0f), most);
  }
  return whole;
}

// Of blocks, or of samples where these stay whole.
inline void denoise_step(const DenoiseStep& task, int64_t begin, int64_t end) {
  StepRooms rooms;
  WholeSample whole;
  const auto same = [&](int64_t a, int64_t b) { return task.index[a] == task.index[b]; };
  const int64_t blocks = task.batch.blocks_each();
  const auto steps = [&](int64_t from, int64_t to) {
    each_block(task.batch, from, to, [&](int64_t sample, int64_t first, int64_t count) {
      each_stretch(task.levels, sample, first, count, same,
                   [&](int64_t level, int64_t at, int64_t length) {
                     step_stretch(task, level, whole, sample, at, length, rooms);
                   });
    });
  };
  if (task.whole_samples) {
    for (int64_t sample = begin; sample < end; ++sample) {
      whole = whole_sample(task, sample, rooms);
      steps(sample * blocks, (sample + 1) * blocks);
    }
  } else {
    steps(begin, end);
  }
  end_streaming(task.streaming);
}

}  // namespace
}  // namespace vqkernels
