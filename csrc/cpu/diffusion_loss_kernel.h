// Losses of a model that predicts a noise target, and their slopes; the target is made in passing.
#pragma once

#include "diffuse_kernel.h"

namespace vqkernels {
namespace {

inline vf size_of(vf v) { return (vf)((vi)v & splat(int32_t(0x7fffffff))); }

struct SquaredLoss {
  static vf value(vf d, vf) { return d * d; }
  static vf slope(vf d, vf) { return d + d; }
};

// Quadratic up to delta, then linear; a NaN stays one.
struct HuberLoss {
  static vf value(vf d, vf delta) {
    const vf size = size_of(d), inner = minimum(delta, size);
    return inner * multiply_add(splat(-0.5f), inner, size);
  }
  static vf slope(vf d, vf delta) { return maximum(-delta, minimum(delta, d)); }
};

// 2 delta (sqrt(d^2 + delta^2) - delta), without the difference's cancellation.
struct PseudoHuberLoss {
  static vf value(vf d, vf delta) {
    const vf root = square_root(multiply_add(d, d, delta * delta));
    return (delta + delta) * (d * d) / (root + delta);
  }
  static vf slope(vf d, vf delta) {
    return (delta + delta) * d / square_root(multiply_add(d, d, delta * delta));
  }
};

template <typename F>
inline void with_loss(NoiseLoss loss, const F& f) {
  if (loss == NoiseLoss::mse) return f(SquaredLoss());
  if (loss == NoiseLoss::huber) return f(HuberLoss());
  f(PseudoHuberLoss());
}

inline bool needs_noise(const Mixture& mixture) { return mixture.target != NoiseTarget::sample; }

// Chunks are numbered by level, then along its elements.
inline void diffusion_loss(const DiffusionLoss& task, int64_t chunk_begin, int64_t chunk_end) {
  const Mixture& mixture = task.mixture;
  const Levels& levels = mixture.levels;
  NoiseRoom output_room;
  with_target(mixture.target, [&](auto target) {
    with_loss(task.loss, [&](auto loss) {
      using Loss = decltype(loss);
      for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
        const int64_t level = chunk / task.chunks_each(), sample = level / levels.each;
        const int64_t within = chunk % task.chunks_each() * DiffusionLoss::kChunk;
        const int64_t first = level % levels.each * levels.length + within;
        const int64_t last = first + std::min(DiffusionLoss::kChunk, levels.length - within);
        const vf alpha = splat(mixture.alpha[level]), sigma = splat(mixture.sigma[level]);
        const vf delta = splat(task.delta == nullptr ? 1.0f : task.delta[level]);
        double sum = 0;
        for (int64_t at = first; at < last; at += kNoiseBlock) {
          const int64_t count = std::min(kNoiseBlock, last - at);
          const MixedBlock block(mixture, sample, at, count, needs_noise(mixture));
          const float* output = read_block(task.model_output, sample, at, count, output_room);
          vf sums[2] = {};
          int which = 0;
          each_vector(count, [&](int64_t i, int64_t lanes) VQKERNELS_INLINE {
            const vf wanted = target_of<decltype(target)::value>(
                load_at(block.x, i, lanes), load_at(block.z, i, lanes), alpha, sigma);
            const vf value = Loss::value(load_at(output, i, lanes) - wanted, delta);
            sums[which] += first_lanes(value, lanes);
            which ^= 1;
          });
          sum += sum_of(sums[0] + sums[1]);
        }
        task.sums[chunk] = sum;
      }
    });
  });
}

inline void diffusion_loss_backward(const DiffusionLoss& task, int64_t begin, int64_t end) {
  const Mixture& mixture = task.mixture;
  const bool needs_x0 = task.grad_x0.data != nullptr;
  NoiseRoom output_room, grad_room, x0_room;
  const auto same = [](int64_t, int64_t) { return false; };
  with_target(mixture.target, [&](auto target) {
    with_loss(task.loss, [&](auto loss) {
      using Loss = decltype(loss);
      constexpr NoiseTarget kTarget = decltype(target)::value;
      each_block(mixture.batch, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
        const MixedBlock block(mixture, sample, first, count, needs_noise(mixture));
        const float* output = read_block(task.model_output, sample, first, count, output_room);
        float* grad = start_block(task.grad_output, sample, first, false, grad_room);
        float* by_x0 = nullptr;
        if (needs_x0) by_x0 = start_block(task.grad_x0, sample, first, false, x0_room);
        each_stretch(
            mixture.levels, sample, first, count, same,
            [&](int64_t level, int64_t from, int64_t length) {
              const vf alpha = splat(mixture.alpha[level]), sigma = splat(mixture.sigma[level]);
              const vf delta = splat(task.delta == nullptr ? 1.0f : task.delta[level]);
              const vf scale = splat(task.scale[level]);
              const int64_t start = from - first;
              each_vector(length, [&](int64_t i, int64_t lanes) VQKERNELS_INLINE {
                const int64_t at = start + i;
                const vf wanted = target_of<kTarget>(load_at(block.x, at, lanes),
                                                     load_at(block.z, at, lanes), alpha, sigma);
                const vf slope = scale * Loss::slope(load_at(output, at, lanes) - wanted, delta);
                store_at(grad, at, lanes, slope);
                if (by_x0 == nullptr) return;
                // Minus the target's slope along x0.
                constexpr float kSlope = kTarget == NoiseTarget::sample ? -1.0f
                                         : kTarget == NoiseTarget::flow ? 1.0f
                                                                        : 0.0f;
                const vf along = kTarget == NoiseTarget::v ? sigma : splat(kSlope);
                store_at(by_x0, at, lanes, along * slope);
              });
            });
        finish_block(grad, task.grad_output, sample, first, count, false);
        if (needs_x0) finish_block(by_x0, task.grad_x0, sample, first, count, false);
      });
    });
  });
}

}  // namespace
}  // namespace vqkernels
