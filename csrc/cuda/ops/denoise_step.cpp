#include <tuple>

#include "noise.h"

namespace vqkernels::cuda {
namespace {

Threshold parse_threshold(const std::string& name) {
  if (name == "none") return Threshold::none;
  return name == "clip" ? Threshold::clip : Threshold::dynamic;
}

// What kernels that look at whole samples cannot do.
void check_whole(const NoiseGrid& grid, bool guided, bool dynamic) {
  if ((guided || dynamic) && grid.levels != 1) {
    throw std::invalid_argument("index must be a scalar or [B] with " +
                                std::string(guided ? "guidance" : "dynamic thresholds"));
  }
  if (dynamic && grid.elements > kMostRanked) {
    throw std::invalid_argument(
        "CUDA kernels take dynamic thresholds of samples with fewer than 2^32 elements, got " +
        std::to_string(grid.elements));
  }
}

std::tuple<Tensor, Tensor, Tensor> denoise_step_op(
    const Tensor& sample_given, const Tensor& output_given, const Tensor& coefficients,
    const Tensor& index_given, const std::optional<Tensor>& uncond_given,
    const std::vector<Tensor>& history_given, const std::optional<Tensor>& variance_given,
    const std::optional<Tensor>& noise_given, const std::optional<Tensor>& key,
    const std::optional<Tensor>& sample_ids, const std::string& threshold, double ratio,
    const std::string& variance_type, bool want_prediction, bool want_extra,
    const std::vector<Tensor>& out) {
  const Call call("denoise_step", sample_given, false);
  const Tensor prev = result_like(sample_given, out);
  const Tensor nothing = empty({0}, sample_given.scalar_type(), sample_given);
  const Tensor prediction = want_prediction ? result_like(sample_given) : nothing;
  const Tensor extra = want_extra ? result_like(sample_given) : nothing;
  if (sample_given.numel() == 0) return {prev, prediction, extra};

  const Tensor sample = whole_samples(sample_given), output = whole_samples(output_given);
  const auto uncond = whole_samples(uncond_given), variance = whole_samples(variance_given);
  const Tensor table = dense(coefficients), index = dense(index_given);
  const NoiseOf noise(noise_given, key, sample_ids);
  std::vector<Tensor> history;
  for (const Tensor& of : history_given) history.push_back(whole_samples(of));

  DenoiseStep problem;
  problem.grid = grid_of(sample, index);
  problem.sample = samples_of(sample);
  problem.model_output = samples_of(output);
  problem.uncond_output = samples_of(uncond);
  problem.variance = samples_of(variance);
  problem.histories = int(history.size());
  for (size_t i = 0; i < history.size(); ++i) problem.history[i] = samples_of(history[i]);
  problem.table = data<float>(table);
  problem.steps = table.size(0);
  problem.index = data<int64_t>(index);
  problem.one_index = index.dim() == 0;
  problem.noise = noise.noise();
  problem.threshold = parse_threshold(threshold);
  problem.ratio = ratio;
  problem.variance_type =
      variance_type == "learned" ? VarianceType::learned : VarianceType::learned_range;
  problem.prev_sample = samples_of(prev);
  if (want_prediction) problem.prediction = samples_of(prediction);
  if (want_extra) problem.extra = samples_of(extra);
  check_whole(problem.grid, uncond.has_value(), problem.threshold == Threshold::dynamic);
  denoise_step(problem, call.context());
  call.finish();
  return {prev, prediction, extra};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("denoise_step", TORCH_BOX(&denoise_step_op));
}

}  // namespace
}  // namespace vqkernels::cuda
