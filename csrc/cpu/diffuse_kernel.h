// Data mixed with noise, and what a model learns to predict of it.
#pragma once

#include "noise_blocks.h"

namespace vqkernels {
namespace {

// Calls take(element, normals, how many) for the vectors of a block's normals, in registers.
template <typename F>
inline void draw_block(const KeyedNoise& key, int64_t sample, int64_t first, int64_t count,
                       const F& take) {
  draw_normals(key, key.sample_id(sample), key.step, first / 4, (count + 3) / 4,
               [&](int64_t at, vf normals) VQKERNELS_INLINE {
                 if (at < count) take(at, normals, std::min<int64_t>(kLanes, count - at));
               });
}

inline void normal_noise(const NormalNoise& task, int64_t begin, int64_t end) {
  dispatch(task.out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    each_block(task.batch, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
      T* out = at_sample<T>(task.out, sample, first);
      draw_block(task.key, sample, first, count,
                 [=](int64_t at, vf normals, int64_t lanes)
                     VQKERNELS_INLINE { store_at(out, at, lanes, normals); });
    });
  });
}

template <NoiseTarget kTarget>
inline vf target_of(vf x, vf z, vf alpha, vf sigma) {
  if constexpr (kTarget == NoiseTarget::epsilon) return z;
  if constexpr (kTarget == NoiseTarget::sample) return x;
  if constexpr (kTarget == NoiseTarget::v) return multiply_add(alpha, z, -(sigma * x));
  return z - x;
}

template <typename F>
inline void with_target(NoiseTarget target, const F& f) {
  switch (target) {
    case NoiseTarget::epsilon:
      return f(std::integral_constant<NoiseTarget, NoiseTarget::epsilon>());
    case NoiseTarget::sample:
      return f(std::integral_constant<NoiseTarget, NoiseTarget::sample>());
    case NoiseTarget::v:
      return f(std::integral_constant<NoiseTarget, NoiseTarget::v>());
    default:
      return f(std::integral_constant<NoiseTarget, NoiseTarget::flow>());
  }
}

// A block of data and the noise that goes with it.
struct MixedBlock {
  MixedBlock(const Mixture& mixture, int64_t sample, int64_t begin, int64_t count,
             bool with_noise = true) {
    x = read_block(mixture.x0, sample, begin, count, x_room);
    if (!with_noise) {
      z = x;  // not used
    } else if (mixture.noise.data != nullptr) {
      z = read_block(mixture.noise, sample, begin, count, z_room);
    } else {
      const uint32_t id = mixture.key.sample_id(sample);
      z = fill_normals(mixture.key, id, mixture.key.step, begin, count, z_room.floats);
    }
  }
  MixedBlock(const MixedBlock&) = delete;

  const float *x, *z;
  NoiseRoom x_room, z_room;
};

// One level for a block, whose noise is used as it is drawn.
template <typename T, NoiseTarget kTarget, bool kStreaming>
inline void diffuse_drawn(const Diffuse& task, int64_t level, int64_t sample, int64_t first,
                          int64_t count) {
  const Mixture& mixture = task.mixture;
  const T* x0 = at_sample<const T>(mixture.x0, sample, first);
  T* x_t = at_sample<T>(task.x_t, sample, first);
  T* wanted = at_sample<T>(task.target, sample, first);
  const vf alpha = splat(mixture.alpha[level]), sigma = splat(mixture.sigma[level]);
  draw_block(mixture.key, sample, first, count,
             [=](int64_t at, vf z, int64_t lanes) VQKERNELS_INLINE {
               const vf x = load_at(x0, at, lanes);
               const vf mixed = multiply_add(alpha, x, sigma * z);
               const vf target = target_of<kTarget>(x, z, alpha, sigma);
               if constexpr (kStreaming) {
                 if (lanes == kLanes) {
                   stream(x_t + at, mixed);
                   stream(wanted + at, target);
                   return;
                 }
               }
               store_at(x_t, at, lanes, mixed);
               store_at(wanted, at, lanes, target);
             });
}

inline void diffuse(const Diffuse& task, int64_t begin, int64_t end) {
  const Mixture& mixture = task.mixture;
  NoiseRoom x_t_room, target_room;
  const auto same = [&](int64_t a, int64_t b) {
    return mixture.alpha[a] == mixture.alpha[b] && mixture.sigma[a] == mixture.sigma[b];
  };
  with_target(mixture.target, [&](auto target) {
    constexpr NoiseTarget kTarget = decltype(target)::value;
    const bool streaming = task.streaming && can_stream(task.x_t) && can_stream(task.target);
    each_block(mixture.batch, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
      if (mixture.noise.data == nullptr && mixture.levels.each <= 1) {
        const int64_t level = sample * mixture.levels.each;
        if (streaming)
          return diffuse_drawn<float, kTarget, true>(task, level, sample, first, count);
        return dispatch(mixture.x0.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          diffuse_drawn<T, kTarget, false>(task, level, sample, first, count);
        });
      }
      const MixedBlock block(mixture, sample, first, count);
      float* x_t = start_block(task.x_t, sample, first, task.streaming, x_t_room);
      float* wanted = start_block(task.target, sample, first, task.streaming, target_room);
      each_stretch(mixture.levels, sample, first, count, same,
                   [&](int64_t level, int64_t from, int64_t length) {
                     const vf alpha = splat(mixture.alpha[level]);
                     const vf sigma = splat(mixture.sigma[level]);
                     const int64_t start = from - first;
                     each_vector(length, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
                       const vf x = load_at(block.x + start, at, lanes);
                       const vf z = load_at(block.z + start, at, lanes);
                       store_at(x_t + start, at, lanes, multiply_add(alpha, x, sigma * z));
                       store_at(wanted + start, at, lanes, target_of<kTarget>(x, z, alpha, sigma));
                     });
                   });
      finish_block(x_t, task.x_t, sample, first, count, task.streaming);
      finish_block(wanted, task.target, sample, first, count, task.streaming);
    });
  });
  end_streaming(task.streaming);
}

}  // namespace
}  // namespace vqkernels
