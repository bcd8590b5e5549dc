// Working memory of one thread: grows on demand, aligned to a cache line, reused by the next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace vqkernels {
namespace {

// Hands out consecutive pieces of one per-thread block. `floats` is the sum of all pieces.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    thread_local Block block;
    const int64_t needed = floats + kPiecesAtMost * kAlign;
    if (block.capacity < needed) {
      block.memory.reset();
      const size_t bytes = size_t(needed + kAlign) * sizeof(float) / 64 * 64;
      block.memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      block.capacity = needed;
    }
    next_ = block.memory.get();
  }

  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) == sizeof(float));
    float* piece = next_;
    next_ += (count + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr int64_t kAlign = 16;
  static constexpr int64_t kPiecesAtMost = 8;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<float, Free> memory;
    int64_t capacity = 0;
  };
  float* next_;
};

}  // namespace
}  // namespace vqkernels
