// Blocks of samples as floats: read where they lie or widened into a room in cache, written where
// they go, narrowed, or past the caches.
#pragma once

#include "noise_task.h"
#include "normals.h"

namespace vqkernels {
namespace {

struct alignas(64) NoiseRoom {
  float floats[kNoiseBlock + kNormalsBeyond];
};

template <typename T>
inline T* at_sample(const Samples& samples, int64_t sample, int64_t element) {
  return static_cast<T*>(samples.data) + sample * samples.stride + element;
}

inline const float* read_block(const Samples& from, int64_t sample, int64_t begin, int64_t count,
                               NoiseRoom& room) {
  if (from.dtype == DType::f32) return at_sample<const float>(from, sample, begin);
  dispatch(from.dtype, [&](auto* type) {
    const auto* halves = at_sample<std::remove_pointer_t<decltype(type)>>(from, sample, begin);
    each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
      store(room.floats + at, load_at(halves, at, lanes));
    });
  });
  return room.floats;
}

// Where to put floats that `finish_block` then brings to where they belong.
inline float* start_block(const Samples& to, int64_t sample, int64_t begin, bool streaming,
                          NoiseRoom& room) {
  if (to.dtype != DType::f32 || streaming) return room.floats;
  return at_sample<float>(to, sample, begin);
}

// Past the caches go whole vectors of floats; what is missing is no obstacle.
inline bool can_stream(const Samples& to) {
  const int64_t bytes = reinterpret_cast<intptr_t>(to.data) | (to.stride * 4);
  return to.data == nullptr || (to.dtype == DType::f32 && bytes % (kLanes * 4) == 0);
}

inline void stream(float* to, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v);
#endif
}

inline void finish_block(const float* floats, const Samples& to, int64_t sample, int64_t begin,
                         int64_t count, bool streaming) {
  if (to.dtype == DType::f32) {
    float* place = at_sample<float>(to, sample, begin);
    if (place == floats) return;
    const bool aligned = streaming && reinterpret_cast<uintptr_t>(place) % (kLanes * 4) == 0;
    each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
      if (aligned && lanes == kLanes) {
        stream(place + at, load(floats + at));
      } else {
        store_at(place, at, lanes, load_at(floats, at, lanes));
      }
    });
    return;
  }
  dispatch(to.dtype, [&](auto* type) {
    auto* halves = at_sample<std::remove_pointer_t<decltype(type)>>(to, sample, begin);
    each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
      store_at(halves, at, lanes, load_at(floats, at, lanes));
    });
  });
}

inline void end_streaming([[maybe_unused]] bool streaming) {
#if defined(__AVX512F__) || defined(__AVX2__)
  if (streaming) _mm_sfence();
#endif
}

// Calls f(sample, first element, how many) for the blocks [begin, end) of all samples.
template <typename F>
inline void each_block(const Batch& batch, int64_t begin, int64_t end, const F& f) {
  const int64_t each = batch.blocks_each();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / each, first = block % each * kNoiseBlock;
    f(sample, first, std::min(kNoiseBlock, batch.elements - first));
  }
}

// Calls f(level, first element, how many) for the stretches of [begin, begin + count) that have one
// level; neighbours for which `same` holds are taken together.
template <typename Same, typename F>
inline void each_stretch(const Levels& levels, int64_t sample, int64_t begin, int64_t count,
                         const Same& same, const F& f) {
  const int64_t start = sample * levels.each, end = begin + count;
  while (begin < end) {
    const int64_t level = start + (levels.each > 1 ? begin / levels.length : 0);
    int64_t next = end;
    if (levels.each > 1) {
      next = (begin / levels.length + 1) * levels.length;
      while (next < end && same(level, start + next / levels.length)) next += levels.length;
      next = std::min(next, end);
    }
    f(level, begin, next - begin);
    begin = next;
  }
}

}  // namespace
}  // namespace vqkernels
