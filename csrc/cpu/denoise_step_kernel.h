// One step of a sampler: see vqkernels/ops/denoise_step.py for the equation. A block is worked on
// in cache: guided output, prediction and the affine part in one pass, then history and noise.
#pragma once

#include <algorithm>
#include <cmath>

#include "combination.h"
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
  NoiseRoom sample, output, uncond, history[DenoiseStep::kHistory];
  NoiseRoom noise, variance, scaled, prediction, prev, extra;
};

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

// A prediction limited to [-limit, limit], and divided by the limit if `scaled`.
template <int kOperands>
inline void limited_prediction(const Combination<float>& predicted, float limit, bool scaled,
                               int64_t count, float* prediction) {
  const vf most = splat(limit), least = splat(-limit), factor = splat(scaled ? 1 / limit : 1.0f);
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf x{};
    for (int i = 0; i < kOperands; ++i) {
      x = multiply_add(splat(predicted.weights[i]), load_at(predicted.operands[i], at, lanes), x);
    }
    store_at(prediction, at, lanes, maximum(least, minimum(most, x)) * factor);
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

// The noise of a stretch, times what the model says of its deviation.
inline const float* noise_of(const DenoiseStep& task, int64_t level, int64_t sample, int64_t first,
                             int64_t count, StepRooms& rooms) {
  const float* z;
  if (task.keyed) {
    const uint32_t step = task.key.step + uint32_t(row_number(task, level));
    z = fill_normals(task.key, task.key.sample_id(sample), step, first, count, rooms.noise.floats);
  } else {
    z = read_block(task.noise, sample, first, count, rooms.noise);
  }
  if (task.variance.data == nullptr) return z;
  const float* v = read_block(task.variance, sample, first, count, rooms.variance);
  scale_noise(task, row_of(task, level), v, count, z, rooms.scaled.floats);
  return rooms.scaled.floats;
}

// A stretch's operands, and where its results go; null: there is none.
template <typename T>
struct Stretch {
  const float* row;
  const T *sample, *output, *noise;
  const T* history[DenoiseStep::kHistory];
  T *prediction, *prev, *extra;
  int64_t count;
};

// Weights `of` of sample, prediction, output and history. A prediction without a limit is itself a
// sum, of which no digits are lost here.
template <typename T>
inline Combination<T> combination(const Stretch<T>& stretch, const float* of, bool limited) {
  Combination<T> sum;
  const float* row = stretch.row;
  const double inner = limited ? 0.0 : of[1];
  sum.add(of[0] + inner * row[step_column::prediction_sample], stretch.sample);
  sum.add(of[2] + inner * row[step_column::prediction_output], stretch.output);
  if (limited) sum.add(of[1], stretch.prediction);
  for (int i = 0; i < DenoiseStep::kHistory && stretch.history[i] != nullptr; ++i) {
    sum.add(of[3 + i], stretch.history[i]);
  }
  return sum;
}

template <typename T>
inline Combination<T> prediction_of(const Stretch<T>& stretch) {
  Combination<T> sum;
  sum.add(stretch.row[step_column::prediction_sample], stretch.sample);
  sum.add(stretch.row[step_column::prediction_output], stretch.output);
  return sum;
}

// All results that are wanted; with `limited` the prediction is there already.
template <typename T>
inline void step_sums(const Stretch<T>& stretch, bool limited, bool streaming) {
  Combination<T> sums[3];
  T* out[3];
  int count = 0;
  const auto write = [&](const Combination<T>& sum, T* place) {
    sums[count] = sum;
    out[count++] = place;
  };
  if (stretch.prediction != nullptr && !limited) write(prediction_of(stretch), stretch.prediction);
  if (stretch.extra != nullptr) {
    write(combination(stretch, stretch.row + step_column::extra, limited), stretch.extra);
  }
  // `prev` comes last: it may take the place of an operand.
  Combination<T> to_prev = combination(stretch, stretch.row + step_column::prev, limited);
  if (stretch.noise != nullptr) to_prev.add(stretch.row[step_column::prev_noise], stretch.noise);
  write(to_prev, stretch.prev);
  combine(sums, out, count, stretch.count, streaming);
}

// In place of an operand whose weight is 0.
alignas(64) constexpr float kNothing[kNoiseBlock] = {};

// Both in one pass, where there is neither history nor `extra`: the limited prediction and `prev`.
template <bool kStored>
inline void limited_step(const Stretch<float>& stretch, const Combination<float>& predicted,
                         float limit, bool scaled) {
  const float* of = stretch.row + step_column::prev;
  const vf most = splat(limit), least = splat(-limit), factor = splat(scaled ? 1 / limit : 1.0f);
  const auto term = [](float weight, const float* operand) {
    return weight == 0 || operand == nullptr ? kNothing : operand;
  };
  const float to_noise = stretch.noise == nullptr ? 0 : stretch.row[step_column::prev_noise];
  const float *sample = term(of[0], stretch.sample), *output = term(of[2], stretch.output);
  const float* noise = term(to_noise, stretch.noise);
  const float *first = predicted.operands[0], *second = predicted.operands[1];
  const vf a = splat(predicted.weights[0]), b = splat(predicted.weights[1]);
  const vf by_sample = splat(of[0]), by_output = splat(of[2]), by_noise = splat(to_noise);
  const vf by_prediction = splat(of[1]);
  const bool counts = of[1] != 0;  // else it may be no number
  float *prediction = stretch.prediction, *prev = stretch.prev;
  each_vector(stretch.count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf x = multiply_add(a, load_at(first, at, lanes), b * load_at(second, at, lanes));
    x = maximum(least, minimum(most, x)) * factor;
    vf sum =
        multiply_add(by_sample, load_at(sample, at, lanes), by_output * load_at(output, at, lanes));
    sum = multiply_add(by_noise, load_at(noise, at, lanes), sum);
    if constexpr (kStored) store_at(prediction, at, lanes, x);
    store_at(prev, at, lanes, counts ? multiply_add(by_prediction, x, sum) : sum);
  });
}

// Whether a row's step is nothing but sums of operands of one type, which are read and written
// where they lie.
inline bool only_sums(const DenoiseStep& task, bool drawn) {
  if (task.threshold != Threshold::none || task.uncond_output.data != nullptr || drawn)
    return false;
  bool same = task.model_output.dtype == task.sample.dtype;
  for (const Samples& entry : task.history) {
    same = same && (entry.data == nullptr || entry.dtype == task.sample.dtype);
  }
  return same;
}

template <typename T>
inline void sum_stretch(const DenoiseStep& task, const float* row, int64_t sample, int64_t first,
                        int64_t count) {
  const auto place = [&](const Samples& samples) -> T* {
    return samples.data == nullptr ? nullptr : at_sample<T>(samples, sample, first);
  };
  Stretch<T> stretch = {};
  stretch.row = row;
  stretch.count = count;
  stretch.sample = place(task.sample);
  stretch.output = place(task.model_output);
  for (int i = 0; i < DenoiseStep::kHistory; ++i) stretch.history[i] = place(task.history[i]);
  stretch.prev = place(task.prev);
  stretch.extra = place(task.extra);
  stretch.prediction = place(task.prediction);
  const bool aligned = (first * 4) % (kLanes * 4) == 0 && can_stream(task.prev) &&
                       can_stream(task.extra) && can_stream(task.prediction);
  step_sums(stretch, false, task.streaming && aligned);
}

inline void step_stretch(const DenoiseStep& task, int64_t level, const WholeSample& whole,
                         int64_t sample, int64_t first, int64_t count, StepRooms& rooms) {
  const float* row = row_of(task, level);
  const bool drawn =
      row[step_column::prev_noise] != 0 && (task.keyed || task.noise.data != nullptr);
  if (only_sums(task, drawn)) {
    return dispatch(task.sample.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      sum_stretch<T>(task, row, sample, first, count);
    });
  }
  const auto start = [&](const Samples& to, NoiseRoom& room) -> float* {
    if (to.data == nullptr) return nullptr;
    return start_block(to, sample, first, task.streaming, room);
  };
  Stretch<float> stretch = {};
  stretch.row = row;
  stretch.count = count;
  stretch.sample = read_block(task.sample, sample, first, count, rooms.sample);
  stretch.output = output_of(task, row, whole.output_factor, sample, first, count, rooms);
  if (drawn) stretch.noise = noise_of(task, level, sample, first, count, rooms);
  for (int i = 0; i < DenoiseStep::kHistory && task.history[i].data != nullptr; ++i) {
    stretch.history[i] = read_block(task.history[i], sample, first, count, rooms.history[i]);
  }
  stretch.prev = start(task.prev, rooms.prev);
  stretch.extra = start(task.extra, rooms.extra);
  stretch.prediction = start(task.prediction, rooms.prediction);

  if (task.threshold == Threshold::none) {
    step_sums(stretch, false, false);
  } else {
    const Combination<float> predicted = prediction_of(stretch);
    const bool scaled = task.threshold == Threshold::dynamic;
    const float limit = scaled ? whole.limit : row[step_column::clip];
    if (predicted.count == 2 && stretch.history[0] == nullptr && stretch.extra == nullptr) {
      const auto step = stretch.prediction != nullptr ? limited_step<true> : limited_step<false>;
      step(stretch, predicted, limit, scaled);
    } else {
      const auto limited_of = predicted.count == 2   ? limited_prediction<2>
                              : predicted.count == 1 ? limited_prediction<1>
                                                     : limited_prediction<0>;
      if (stretch.prediction == nullptr) stretch.prediction = rooms.prediction.floats;
      limited_of(predicted, limit, scaled, count, stretch.prediction);
      step_sums(stretch, true, false);
    }
  }
  const auto finish = [&](const float* floats, const Samples& to) {
    if (to.data != nullptr) finish_block(floats, to, sample, first, count, task.streaming);
  };
  finish(stretch.prev, task.prev);
  finish(stretch.prediction, task.prediction);
  finish(stretch.extra, task.extra);
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
      given.add(read_block(task.model_output, sample, first, count, rooms.scaled), count);
      with_guidance.add(output_of(task, row, 1, sample, first, count, rooms), count);
    }
    const double ratio = given.deviation() / with_guidance.deviation();
    whole.output_factor = float(rescale * ratio + 1 - double(rescale));
  }
  if (task.threshold == Threshold::dynamic) {
    SampleQuantile sizes(elements);
    for (int64_t first = 0; first < elements; first += kNoiseBlock) {
      const int64_t count = std::min(kNoiseBlock, elements - first);
      Combination<float> predicted;
      predicted.add(row[step_column::prediction_sample],
                    read_block(task.sample, sample, first, count, rooms.sample));
      predicted.add(row[step_column::prediction_output],
                    output_of(task, row, whole.output_factor, sample, first, count, rooms));
      float* values = rooms.prediction.floats;
      combine(&predicted, &values, 1, count, false);
      sizes.add(values, count);
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
