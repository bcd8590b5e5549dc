// Keyed noise, data mixed with it, and losses of models that predict it.
#include <tuple>

#include "noise.h"

namespace vqkernels {
namespace {

Tensor normal_noise(std::vector<int64_t> shape, const Tensor& key_words,
                    const std::optional<Tensor>& sample_ids, ScalarType dtype,
                    const std::vector<Tensor>& out) {
  const Key key(key_words, sample_ids);
  const Tensor noise = out.empty() ? empty(shape, dtype, key_words) : out[0];
  NormalNoise task;
  task.batch = batch_of(noise);
  task.out = samples_of(noise);
  task.key = key.noise;
  each_block_in_parallel(
      task.batch, [&](int64_t begin, int64_t end) { kernels().normal_noise(task, begin, end); });
  return noise;
}

// Tensors that a mixture points into.
struct MixtureOf {
  MixtureOf(const Tensor& x0_given, const Tensor& alpha_given, const Tensor& sigma_given,
            const std::optional<Tensor>& noise_given, const std::optional<Tensor>& key_words,
            const std::optional<Tensor>& sample_ids, const std::string& target)
      : x0(whole_samples(x0_given)),
        alpha(dense(alpha_given)),
        sigma(dense(sigma_given)),
        noise(whole_samples(noise_given)),
        key(key_words, sample_ids) {
    task.batch = batch_of(x0);
    task.x0 = samples_of(x0);
    task.noise = samples_of(noise);
    task.key = key.noise;
    task.levels = levels_of(alpha, task.batch);
    task.alpha = data<float>(alpha);
    task.sigma = data<float>(sigma);
    task.target = target_named(target);
  }
  MixtureOf(const MixtureOf&) = delete;

  Tensor x0, alpha, sigma;
  std::optional<Tensor> noise;
  Key key;
  Mixture task;
};

std::tuple<Tensor, Tensor> diffuse(const Tensor& x0, const Tensor& alpha, const Tensor& sigma,
                                   const std::optional<Tensor>& noise,
                                   const std::optional<Tensor>& key,
                                   const std::optional<Tensor>& sample_ids,
                                   const std::string& target, const std::vector<Tensor>& out) {
  const MixtureOf mixture(x0, alpha, sigma, noise, key, sample_ids, target);
  const Tensor x_t = result_like(x0, out, 0), wanted = result_like(x0, out, 1);
  Diffuse task;
  task.mixture = mixture.task;
  task.x_t = samples_of(x_t);
  task.target = samples_of(wanted);
  task.streaming = streamed(x_t);
  each_block_in_parallel(task.mixture.batch,
                         [&](int64_t begin, int64_t end) { kernels().diffuse(task, begin, end); });
  return {x_t, wanted};
}

// A level each of weight and delta, as kernels read them.
struct LossOf : MixtureOf {
  LossOf(const Tensor& output_given, const Tensor& x0, const Tensor& alpha, const Tensor& sigma,
         const std::optional<Tensor>& noise, const std::optional<Tensor>& key,
         const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& weight_given,
         const std::optional<Tensor>& delta_given, const std::string& target,
         const std::string& loss)
      : MixtureOf(x0, alpha, sigma, noise, key, sample_ids, target),
        output(whole_samples(output_given)) {
    if (weight_given) weight = dense(*weight_given);
    if (delta_given) delta = dense(*delta_given);
    all.mixture = task;
    all.model_output = samples_of(output);
    all.loss = loss == "mse"     ? NoiseLoss::mse
               : loss == "huber" ? NoiseLoss::huber
                                 : NoiseLoss::pseudo_huber;
    if (delta) all.delta = data<float>(*delta);
  }

  float weight_of(int64_t level) const { return weight ? data<float>(*weight)[level] : 1.0f; }

  Tensor output;
  std::optional<Tensor> weight, delta;
  DiffusionLoss all;
};

Tensor diffusion_loss(const Tensor& model_output, const Tensor& x0, const Tensor& alpha,
                      const Tensor& sigma, const std::optional<Tensor>& noise,
                      const std::optional<Tensor>& key, const std::optional<Tensor>& sample_ids,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& delta,
                      const std::string& target, const std::string& loss) {
  LossOf of(model_output, x0, alpha, sigma, noise, key, sample_ids, weight, delta, target, loss);
  const Tensor losses = empty(alpha.sizes(), ScalarType::Float, x0);
  const int64_t levels = losses.numel(), chunks = of.all.chunks_each();
  const int64_t length = of.task.batch.elements / std::max<int64_t>(1, of.task.levels.each);
  std::vector<double> sums(size_t(levels * chunks));
  of.all.sums = sums.data();
  if (length > 0) {
    const int64_t blocks =
        (std::min(length, DiffusionLoss::kChunk) + kNoiseBlock - 1) / kNoiseBlock;
    parallel(levels * chunks, std::max<int64_t>(1, kBlocksWorthThread / blocks),
             [&](int64_t begin, int64_t end) { kernels().diffusion_loss(of.all, begin, end); });
  }
  for (int64_t level = 0; level < levels; ++level) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[size_t(level * chunks + chunk)];
    data<float>(losses)[level] = float(sum / double(length) * of.weight_of(level));
  }
  return losses;
}

std::tuple<Tensor, Tensor> diffusion_loss_backward(
    const Tensor& grad_given, const Tensor& model_output, const Tensor& x0, const Tensor& alpha,
    const Tensor& sigma, const std::optional<Tensor>& noise, const std::optional<Tensor>& key,
    const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& delta, const std::string& target, const std::string& loss,
    bool needs_x0) {
  LossOf of(model_output, x0, alpha, sigma, noise, key, sample_ids, weight, delta, target, loss);
  const Tensor grad = dense(grad_given);
  std::vector<float> scale(size_t(grad.numel()));
  for (size_t level = 0; level < scale.size(); ++level) {
    scale[level] =
        data<float>(grad)[level] * of.weight_of(int64_t(level)) / float(of.task.levels.length);
  }
  const Tensor grad_output = empty(model_output.sizes(), model_output.scalar_type(), x0);
  const Tensor grad_x0 =
      needs_x0 ? empty(x0.sizes(), x0.scalar_type(), x0) : empty({0}, x0.scalar_type(), x0);
  of.all.scale = scale.data();
  of.all.grad_output = samples_of(grad_output);
  if (needs_x0) of.all.grad_x0 = samples_of(grad_x0);
  each_block_in_parallel(of.task.batch, [&](int64_t begin, int64_t end) {
    kernels().diffusion_loss_backward(of.all, begin, end);
  });
  return {grad_output, grad_x0};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("normal_noise", TORCH_BOX(&normal_noise));
  m.impl("diffuse", TORCH_BOX(&diffuse));
  m.impl("diffusion_loss", TORCH_BOX(&diffusion_loss));
  m.impl("diffusion_loss_backward", TORCH_BOX(&diffusion_loss_backward));
}

}  // namespace
}  // namespace vqkernels
