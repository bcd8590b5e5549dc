#include <tuple>

#include "noise.h"

namespace vqkernels::cuda {
namespace {

Target parse_target(const std::string& name) {
  if (name == "epsilon") return Target::epsilon;
  if (name == "sample") return Target::sample;
  return name == "v" ? Target::v : Target::flow;
}

Tensor normal_noise_op(std::vector<int64_t> shape, const Tensor& key,
                       const std::optional<Tensor>& sample_ids, ScalarType dtype,
                       const std::vector<Tensor>& out) {
  const Call call("normal_noise", key, false);
  const Tensor result = out.empty() ? empty(shape, dtype, key) : out[0];
  const NoiseOf noise(std::nullopt, key, sample_ids);
  NormalNoise problem;
  problem.grid = grid_of(result);
  problem.out = samples_of(result);
  problem.noise = noise.noise();
  normal_noise(problem, call.context());
  call.finish();
  return result;
}

std::tuple<Tensor, Tensor> diffuse_op(const Tensor& x0_given, const Tensor& alpha_given,
                                      const Tensor& sigma_given,
                                      const std::optional<Tensor>& noise_given,
                                      const std::optional<Tensor>& key,
                                      const std::optional<Tensor>& sample_ids,
                                      const std::string& target, const std::vector<Tensor>& out) {
  const Call call("diffuse", x0_given, false);
  const Tensor x_t = result_like(x0_given, out, 0), wanted = result_like(x0_given, out, 1);
  const Tensor x0 = whole_samples(x0_given);
  const Tensor alpha = dense(alpha_given), sigma = dense(sigma_given);
  const NoiseOf noise(noise_given, key, sample_ids);
  Diffuse problem;
  problem.grid = grid_of(x0, alpha);
  problem.x0 = samples_of(x0);
  problem.x_t = samples_of(x_t);
  problem.wanted = samples_of(wanted);
  problem.alpha = data<float>(alpha);
  problem.sigma = data<float>(sigma);
  problem.noise = noise.noise();
  problem.target = parse_target(target);
  diffuse(problem, call.context());
  call.finish();
  return {x_t, wanted};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("normal_noise", TORCH_BOX(&normal_noise_op));
  m.impl("diffuse", TORCH_BOX(&diffuse_op));
}

}  // namespace
}  // namespace vqkernels::cuda
