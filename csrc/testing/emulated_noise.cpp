// The launchers of noise on the emulation, for tests that call them through ctypes. Each function
// returns null, or what went wrong. Samples arrive as their address, dtype and stride, or null; the
// device as the fields of `Device`; `sizes` are B, E and the levels.
#include "../cuda/noise.h"
#include "../cuda/normals.h"
#include "cuda_emulation_core.h"

namespace vqkernels::cuda {
namespace {

Samples samples_from(const int64_t* fields) {
  if (fields == nullptr) return {};
  return {reinterpret_cast<void*>(fields[0]), DType(fields[1]), fields[2]};
}

template <typename F>
const char* run(const int64_t* device, const F& launch) {
  return emulation::caught([&] {
    Context context;
    context.device = {int(device[0]), int(device[1]), int(device[2]), int(device[3])};
    launch(context);
  });
}

}  // namespace
}  // namespace vqkernels::cuda

namespace cuda = vqkernels::cuda;

// Two normals of each pair of words.
EMULATION_EXPORT void emulated_box_muller(const uint32_t* words, int64_t pairs, float* normals) {
  for (int64_t i = 0; i < 2 * pairs; i += 2) {
    const float radius = cuda::normal_radius(words[i]);
    cuda::turned(words[i + 1], normals[i], normals[i + 1]);
    normals[i] *= radius;
    normals[i + 1] *= radius;
  }
}

EMULATION_EXPORT const char* emulated_normal_noise(const int64_t* device, const int64_t* sizes,
                                                   const int64_t* const* samples,
                                                   const int64_t* key, const int64_t* sample_ids) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::NormalNoise problem;
    problem.grid = {sizes[0], sizes[1], sizes[2]};
    problem.out = cuda::samples_from(samples[0]);
    problem.noise = {{}, key, sample_ids};
    cuda::normal_noise(problem, context);
  });
}

// `samples`: x0, x_t, target, noise.
EMULATION_EXPORT const char* emulated_diffuse(const int64_t* device, const int64_t* sizes,
                                              const int64_t* const* samples, const float* alpha,
                                              const float* sigma, const int64_t* key,
                                              const int64_t* sample_ids, int target) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::Diffuse problem;
    problem.grid = {sizes[0], sizes[1], sizes[2]};
    problem.x0 = cuda::samples_from(samples[0]);
    problem.x_t = cuda::samples_from(samples[1]);
    problem.wanted = cuda::samples_from(samples[2]);
    problem.noise = {cuda::samples_from(samples[3]), key, sample_ids};
    problem.alpha = alpha;
    problem.sigma = sigma;
    problem.target = cuda::Target(target);
    cuda::diffuse(problem, context);
  });
}

// `samples`: sample, model_output, uncond_output, variance, noise, prev_sample, prediction, extra,
// history. `index` counts for all where `one_index`.
EMULATION_EXPORT const char* emulated_denoise_step(const int64_t* device, const int64_t* sizes,
                                                   const int64_t* const* samples, int histories,
                                                   const float* table, int64_t steps,
                                                   const int64_t* index, int one_index,
                                                   const int64_t* key, const int64_t* sample_ids,
                                                   int threshold, double ratio, int variance_type) {
  return cuda::run(device, [&](const cuda::Context& context) {
    cuda::DenoiseStep problem;
    problem.grid = {sizes[0], sizes[1], sizes[2]};
    problem.sample = cuda::samples_from(samples[0]);
    problem.model_output = cuda::samples_from(samples[1]);
    problem.uncond_output = cuda::samples_from(samples[2]);
    problem.variance = cuda::samples_from(samples[3]);
    problem.noise = {cuda::samples_from(samples[4]), key, sample_ids};
    problem.prev_sample = cuda::samples_from(samples[5]);
    problem.prediction = cuda::samples_from(samples[6]);
    problem.extra = cuda::samples_from(samples[7]);
    for (int i = 0; i < histories; ++i) problem.history[i] = cuda::samples_from(samples[8 + i]);
    problem.histories = histories;
    problem.table = table;
    problem.steps = steps;
    problem.index = index;
    problem.one_index = one_index != 0;
    problem.threshold = cuda::Threshold(threshold);
    problem.ratio = ratio;
    problem.variance_type = cuda::VarianceType(variance_type);
    cuda::denoise_step(problem, context);
  });
}
