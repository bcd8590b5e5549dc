#include <array>
#include <tuple>

#include "noise.h"

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> denoise_step(
    const Tensor& sample_given, const Tensor& output_given, const Tensor& coefficients_given,
    const Tensor& index_given, const std::optional<Tensor>& uncond_given,
    const std::vector<Tensor>& history_given, const std::optional<Tensor>& variance_given,
    const std::optional<Tensor>& noise_given, const std::optional<Tensor>& key_words,
    const std::optional<Tensor>& sample_ids, const std::string& threshold, double ratio,
    const std::string& variance_type, bool want_prediction, bool want_extra,
    const std::vector<Tensor>& out) {
  const Tensor sample = whole_samples(sample_given), output = whole_samples(output_given);
  const Tensor coefficients = dense(coefficients_given), index = dense(index_given);
  const auto uncond = whole_samples(uncond_given), variance = whole_samples(variance_given);
  const auto noise = whole_samples(noise_given);
  const Key key(key_words, sample_ids);
  std::array<std::optional<Tensor>, DenoiseStep::kHistory> history;

  DenoiseStep task;
  task.batch = batch_of(sample);
  task.sample = samples_of(sample);
  task.model_output = samples_of(output);
  task.uncond_output = samples_of(uncond);
  for (size_t i = 0; i < history_given.size(); ++i) {
    history[i] = whole_samples(history_given[i]);
    task.history[i] = samples_of(*history[i]);
  }
  task.variance = samples_of(variance);
  task.noise = samples_of(noise);
  task.table = data<float>(coefficients);
  task.steps = coefficients.size(0);
  task.index = data<int64_t>(index);
  task.levels = levels_of(index, task.batch);
  task.keyed = key_words.has_value();
  task.key = key.noise;
  task.threshold = threshold == "clip"      ? Threshold::clip
                   : threshold == "dynamic" ? Threshold::dynamic
                                            : Threshold::none;
  task.ratio = ratio;
  task.learned_range = variance_type == "learned_range";
  const bool rescaled = [&] {
    if (!uncond) return false;
    for (int64_t row = 0; row < task.steps; ++row) {
      const auto* columns = task.table + row * step_column::count;
      if (columns[step_column::guidance_rescale] != 0) return true;
    }
    return false;
  }();
  task.whole_samples = rescaled || task.threshold == Threshold::dynamic;

  const Tensor prev = result_like(sample_given, out, 0);
  const auto if_wanted = [&](bool wanted) {
    return wanted ? result_like(sample_given, {}, 0) : empty({0}, sample.scalar_type(), sample);
  };
  const Tensor prediction = if_wanted(want_prediction), extra = if_wanted(want_extra);
  task.prev = samples_of(prev);
  if (want_prediction) task.prediction = samples_of(prediction);
  if (want_extra) task.extra = samples_of(extra);
  task.streaming = streamed(prev, kStreamedBytes / 4);  // with its operands four times that
  const auto run = [&](int64_t begin, int64_t end) { kernels().denoise_step(task, begin, end); };
  if (task.whole_samples) {
    if (task.batch.elements > 0) parallel(task.batch.count, 1, run);
  } else {
    each_block_in_parallel(task.batch, run);
  }
  return {prev, prediction, extra};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("denoise_step", TORCH_BOX(&denoise_step));
}

}  // namespace
}  // namespace vqkernels
