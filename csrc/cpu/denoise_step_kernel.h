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
  NoiseRoom sample, output, uncond, history[DenoiseStep::kHistory];
  NoiseRoom noise, variance, scaled, prediction, prev, extra;
};

// A sum of weighted operands. A weight of 0 leaves its operand out, also where it is infinite.
struct Combination {
  static constexpr int kMost = 4 + DenoiseStep::kHistory;

  void add(double weight, const float* operand) {
    if (float(weight) == 0) return;
    weights[count] = float(weight);
    operands[count++] = operand;
  }

  bool same_operands(const Combination& other) const {
    return count == other.count && std::equal(operands, operands + count, other.operands);
  }

  int count = 0;
  float weights[kMost];
  const float* operands[kMost];
};

// Several combinations of the same operands. An operand's numbers are read before those at its
// place are written.
template <int kOperands, int kSums>
inline void combine_all(const Combination* sums, float* const* out, int64_t count) {
  vf weights[kSums][kOperands];
  for (int s = 0; s < kSums; ++s) {
    for (int i = 0; i < kOperands; ++i) weights[s][i] = splat(sums[s].weights[i]);
  }
  const float* operands[kOperands];
  for (int i = 0; i < kOperands; ++i) operands[i] = sums[0].operands[i];
  float* places[kSums];
  for (int s = 0; s < kSums; ++s) places[s] = out[s];
  each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
    vf values[kOperands];
    for (int i = 0; i < kOperands; ++i) values[i] = load_at(operands[i], at, lanes);
    for (int s = 0; s < kSums; ++s) {
      vf sum = weights[s][0] * values[0];
      for (int i = 1; i < kOperands; ++i) sum = multiply_add(weights[s][i], values[i], sum);
      store_at(places[s], at, lanes, sum);
    }
  });
}

template <int kSums, int kOperands = Combination::kMost>
inline void combine(const Combination* sums, float* const* out, int64_t count) {
  if constexpr (kOperands == 0) {
    for (int s = 0; s < kSums; ++s) std::fill(out[s], out[s] + count, 0.0f);
  } else if (sums[0].count == kOperands) {
    combine_all<kOperands, kSums>(sums, out, count);
  } else {
    combine<kSums, kOperands - 1>(sums, out, count);
  }
}

// Together if they have the same operands, which are read once then; else in this order.
inline void combine(const Combination* sums, float* const* out, int sum_count, int64_t count) {
  bool same = true;
  for (int s = 1; s < sum_count; ++s) same = same && sums[s].same_operands(sums[0]);
  if (same && sum_count == 3) return combine<3>(sums, out, count);
  if (same && sum_count == 2) return combine<2>(sums, out, count);
  for (int s = 0; s < sum_count; ++s) combine<1>(sums + s, out + s, count);
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

// A prediction limited to [-limit, limit], and divided by the limit if `scaled`.
template <int kOperands>
inline void limited_prediction(const Combination& predicted, float limit, bool scaled,
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

// A stretch's operands, and where its results go until `finish_block`; null: there is none.
struct Stretch {
  const float *row, *sample, *output, *noise;
  const float* history[DenoiseStep::kHistory];
  float *prediction, *prev, *extra;
  int64_t count;
};

// Weights `of` of sample, prediction, output and history. A prediction without a limit is itself a
// sum, of which no digits are lost here.
inline Combination combination(const Stretch& stretch, const float* of, bool limited) {
  Combination sum;
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

// In place of an operand whose weight is 0.
alignas(64) constexpr float kNothing[kNoiseBlock] = {};

// Both in one pass, where there is neither history nor `extra`: the limited prediction and `prev`.
template <bool kStored>
inline void limited_step(const Stretch& stretch, const Combination& predicted, float limit,
                         bool scaled) {
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

// `predicted` makes the prediction; with `limited` it is there already.
inline void step_sums(const Stretch& stretch, const Combination& predicted, bool stored,
                      bool limited) {
  Combination sums[3];
  float* out[3];
  int count = 0;
  const auto write = [&](const Combination& sum, float* place) {
    sums[count] = sum;
    out[count++] = place;
  };
  if (stored && !limited) write(predicted, stretch.prediction);
  if (stretch.extra != nullptr) {
    write(combination(stretch, stretch.row + step_column::extra, limited), stretch.extra);
  }
  // `prev` comes last: it may take the place of an operand.
  Combination to_prev = combination(stretch, stretch.row + step_column::prev, limited);
  if (stretch.noise != nullptr) to_prev.add(stretch.row[step_column::prev_noise], stretch.noise);
  write(to_prev, stretch.prev);
  combine(sums, out, count, stretch.count);
}

inline void step_stretch(const DenoiseStep& task, int64_t level, const WholeSample& whole,
                         int64_t sample, int64_t first, int64_t count, StepRooms& rooms) {
  const float* row = row_of(task, level);
  const bool drawn =
      row[step_column::prev_noise] != 0 && (task.keyed || task.noise.data != nullptr);
  const auto start = [&](const Samples& to, NoiseRoom& room) -> float* {
    if (to.data == nullptr) return nullptr;
    return start_block(to, sample, first, task.streaming, room);
  };
  Stretch stretch = {};
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
  const bool stored = stretch.prediction != nullptr;

  Combination predicted;
  predicted.add(row[step_column::prediction_sample], stretch.sample);
  predicted.add(row[step_column::prediction_output], stretch.output);
  if (task.threshold == Threshold::none) {
    step_sums(stretch, predicted, stored, false);
  } else {
    const bool scaled = task.threshold == Threshold::dynamic;
    const float limit = scaled ? whole.limit : row[step_column::clip];
    if (!stored) stretch.prediction = rooms.prediction.floats;
    if (predicted.count == 2 && stretch.history[0] == nullptr && stretch.extra == nullptr) {
      const auto step = stored ? limited_step<true> : limited_step<false>;
      step(stretch, predicted, limit, scaled);
    } else {
      const auto limited_of = predicted.count == 2   ? limited_prediction<2>
                              : predicted.count == 1 ? limited_prediction<1>
                                                     : limited_prediction<0>;
      limited_of(predicted, limit, scaled, count, stretch.prediction);
      step_sums(stretch, predicted, stored, true);
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
      Combination predicted;
      predicted.add(row[step_column::prediction_sample],
                    read_block(task.sample, sample, first, count, rooms.sample));
      predicted.add(row[step_column::prediction_output],
                    output_of(task, row, whole.output_factor, sample, first, count, rooms));
      float* values = rooms.prediction.floats;
      combine(&predicted, &values, 1, count);
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
