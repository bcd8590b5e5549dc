// The noise kernels of a table against their definitions in float64.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "../common/philox.h"
#include "../cpu/kernel_table.h"

namespace vqkernels {
namespace {

using Expect = std::function<void(bool, const std::string&, int64_t)>;

inline double exact_normal(const KeyedNoise& key, int64_t sample, uint32_t step, int64_t element) {
  uint32_t words[4] = {uint32_t(element / 4), key.sample_id(sample), step, key.stream};
  philox4x32(words, key.seed);
  const int pair = int(element % 4 / 2);
  const double radius = std::sqrt(-2 * std::log((words[2 * pair] + 1.0) * 0x1p-32));
  const double angle = 2 * std::acos(-1.0) * (words[2 * pair + 1] * 0x1p-32);
  return radius * (element % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

// Samples of one element type, with room between them.
struct NoiseSamples {
  NoiseSamples(int64_t count, int64_t elements, DType dtype)
      : stride(elements + 5), dtype(dtype), bytes(size_t(count * stride) * 4) {}

  Samples of() { return {bytes.data(), stride, dtype}; }

  void set(int64_t sample, int64_t element, float value) {
    dispatch(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      reinterpret_cast<T*>(bytes.data())[sample * stride + element] = from_float<T>(value);
    });
  }

  double get(int64_t sample, int64_t element) const {
    return dispatch(dtype, [&](auto* type) -> double {
      using T = std::remove_pointer_t<decltype(type)>;
      return to_float(reinterpret_cast<const T*>(bytes.data())[sample * stride + element]);
    });
  }

  int64_t stride;
  DType dtype;
  std::vector<char> bytes;
};

class NoiseChecker {
 public:
  NoiseChecker(const KernelTable& table, const Expect& expect) : table_(table), expect_(expect) {
    key_.seed = 0x123456789abcdef0;
    key_.step = 3;
    key_.stream = 0xffffffff;
  }

  void run() {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const int64_t elements : {1, 7, 64, 2500}) {
        normals(elements, dtype);
        mixtures(elements, dtype);
        for (const Threshold threshold : {Threshold::none, Threshold::clip, Threshold::dynamic}) {
          steps(elements, dtype, threshold);
        }
      }
    }
  }

 private:
  static constexpr int64_t kSamples = 2;

  static double unit(DType dtype) {
    return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  }

  // A number of each element that is none of the others'.
  static float number(int which, int64_t sample, int64_t element) {
    return float(std::sin(double(which * 1000003 + sample * 977 + element * 13 + 1)) * 2);
  }

  NoiseSamples filled(int which, int64_t elements, DType dtype) {
    NoiseSamples samples(kSamples, elements, dtype);
    for (int64_t b = 0; b < kSamples; ++b) {
      for (int64_t e = 0; e < elements; ++e) samples.set(b, e, number(which, b, e));
    }
    return samples;
  }

  void near(double found, double right, DType dtype, const char* what, int64_t element) {
    expect_(std::fabs(found - right) <= 1e-5 + unit(dtype) * std::fabs(right), what, element);
  }

  void normals(int64_t elements, DType dtype) {
    NoiseSamples out(kSamples, elements, dtype);
    NormalNoise task;
    task.batch = {kSamples, elements};
    task.out = out.of();
    task.key = key_;
    table_.normal_noise(task, 0, kSamples * task.batch.blocks_each());
    for (int64_t b = 0; b < kSamples; ++b) {
      for (int64_t e = 0; e < elements; ++e) {
        const double right = exact_normal(key_, b, key_.step, e);
        const double allowed = 2e-6 + (dtype == DType::f32 ? 0 : unit(dtype) * std::fabs(right));
        expect_(std::fabs(out.get(b, e) - right) <= allowed, "normal_noise", e);
      }
    }
  }

  void mixtures(int64_t elements, DType dtype) {
    NoiseSamples x0 = filled(1, elements, dtype), output = filled(2, elements, dtype);
    NoiseSamples x_t(kSamples, elements, dtype), target(kSamples, elements, dtype);
    NoiseSamples grad(kSamples, elements, dtype);
    const float alpha[kSamples] = {0.8f, 0.3f}, sigma[kSamples] = {0.6f, 0.9f};
    Diffuse task;
    Mixture& mixture = task.mixture;
    mixture.batch = {kSamples, elements};
    mixture.x0 = x0.of();
    mixture.key = key_;
    mixture.levels = {1, elements};
    mixture.alpha = alpha;
    mixture.sigma = sigma;
    mixture.target = NoiseTarget::v;
    task.x_t = x_t.of();
    task.target = target.of();
    const int64_t blocks = kSamples * mixture.batch.blocks_each();
    table_.diffuse(task, 0, blocks);

    DiffusionLoss loss;
    loss.mixture = mixture;
    loss.model_output = output.of();
    std::vector<double> sums(size_t(kSamples * loss.chunks_each()));
    const float scale[kSamples] = {0.5f, 2.0f};
    loss.sums = sums.data();
    loss.scale = scale;
    loss.grad_output = grad.of();
    table_.diffusion_loss(loss, 0, int64_t(sums.size()));
    table_.diffusion_loss_backward(loss, 0, blocks);
    for (int64_t b = 0; b < kSamples; ++b) {
      double sum = 0, found = 0;
      for (int64_t e = 0; e < elements; ++e) {
        const double x = x0.get(b, e), z = exact_normal(key_, b, key_.step, e);
        near(x_t.get(b, e), alpha[b] * x + sigma[b] * z, dtype, "diffuse x_t", e);
        const double wanted = alpha[b] * z - sigma[b] * x, rest = output.get(b, e) - wanted;
        near(target.get(b, e), wanted, dtype, "diffuse target", e);
        near(grad.get(b, e), 2 * scale[b] * rest, dtype, "diffusion_loss_backward", e);
        sum += rest * rest;
      }
      for (int64_t c = 0; c < loss.chunks_each(); ++c)
        found += sums[size_t(b * loss.chunks_each() + c)];
      expect_(std::fabs(found - sum) <= 1e-5 * (1 + sum), "diffusion_loss", b);
    }
  }

  void steps(int64_t elements, DType dtype, Threshold threshold) {
    NoiseSamples sample = filled(3, elements, dtype), output = filled(4, elements, dtype);
    NoiseSamples uncond = filled(5, elements, dtype), history = filled(6, elements, dtype);
    NoiseSamples prev(kSamples, elements, dtype), prediction(kSamples, elements, dtype);
    NoiseSamples extra(kSamples, elements, dtype);
    std::vector<float> table(2 * step_column::count, 0.25f);
    const float* row = table.data() + step_column::count;
    table[step_column::count + step_column::guidance] = 1.5f;
    table[step_column::count + step_column::guidance_rescale] = 0;
    table[step_column::count + step_column::clip] = threshold == Threshold::clip ? 0.3f : 5.0f;
    table[step_column::count + step_column::extra + 1] = 0;
    const int64_t index = 1;
    DenoiseStep task;
    task.batch = {kSamples, elements};
    task.sample = sample.of();
    task.model_output = output.of();
    task.uncond_output = uncond.of();
    task.history[0] = history.of();
    task.prev = prev.of();
    task.prediction = prediction.of();
    task.extra = extra.of();
    task.table = table.data();
    task.steps = 2;
    task.index = &index;
    task.levels = {0, elements};
    task.keyed = true;
    task.key = key_;
    task.threshold = threshold;
    task.ratio = 1;  // the largest
    task.whole_samples = threshold == Threshold::dynamic;
    table_.denoise_step(task, 0,
                        task.whole_samples ? kSamples : kSamples * task.batch.blocks_each());
    for (int64_t b = 0; b < kSamples; ++b) {
      std::vector<double> guided, predicted;
      double largest = 1;
      for (int64_t e = 0; e < elements; ++e) {
        const double o = output.get(b, e), more = row[step_column::guidance] - 1.0;
        guided.push_back(o + more * (o - uncond.get(b, e)));
        predicted.push_back(0.25 * sample.get(b, e) + 0.25 * guided.back());
        largest = std::max(largest, std::fabs(predicted.back()));
      }
      for (int64_t e = 0; e < elements; ++e) {
        double p = predicted[size_t(e)];
        const double limit = row[step_column::clip];
        if (threshold == Threshold::clip) p = std::max(-limit, std::min(limit, p));
        if (threshold == Threshold::dynamic) p /= largest;
        const double linear = sample.get(b, e) + guided[size_t(e)] + history.get(b, e);
        const double z = exact_normal(key_, b, key_.step + 1, e);
        near(prediction.get(b, e), p, dtype, "denoise_step prediction", e);
        near(prev.get(b, e), 0.25 * (linear + p + z), dtype, "denoise_step", e);
        near(extra.get(b, e), 0.25 * linear, dtype, "denoise_step extra", e);
      }
    }
  }

  const KernelTable& table_;
  const Expect expect_;
  KeyedNoise key_;
};

}  // namespace
}  // namespace vqkernels
