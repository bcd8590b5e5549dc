// What the noise ops share: tensors as samples, levels, keyed noise, results.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace vqkernels {
namespace {

// Blocks a thread takes at least.
constexpr int64_t kBlocksWorthThread = 16;
// Results of so many bytes go past the caches.
constexpr int64_t kStreamedBytes = int64_t(1) << 25;

// The tensor itself if each of its samples lies in one piece, else a copy.
inline Tensor whole_samples(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) {
      return torch::stable::contiguous(tensor);
    }
    expected *= tensor.size(d);
  }
  return tensor;
}

inline std::optional<Tensor> whole_samples(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return whole_samples(*tensor);
}

inline Samples samples_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), dtype_of(tensor)};
}

inline Samples samples_of(const std::optional<Tensor>& tensor) {
  return tensor ? samples_of(*tensor) : Samples();
}

inline Batch batch_of(const Tensor& tensor) {
  const int64_t count = tensor.size(0);
  return {count, count == 0 ? 0 : tensor.numel() / count};
}

// `level` is [] or has the shape of the samples' first dimensions.
inline Levels levels_of(const Tensor& level, const Batch& batch) {
  if (level.dim() == 0) return {0, std::max<int64_t>(1, batch.elements)};
  const int64_t each = std::max<int64_t>(1, level.numel() / std::max<int64_t>(1, batch.count));
  return {each, std::max<int64_t>(1, batch.elements / each)};
}

// Reads the key, and keeps the sample ids that it points to.
class Key {
 public:
  Key(const std::optional<Tensor>& key, const std::optional<Tensor>& sample_ids) {
    if (key) {
      words_ = dense(*key);
      const int64_t* words = data<int64_t>(*words_);
      noise.seed = uint64_t(words[0]);
      noise.step = uint32_t(words[1]);
      noise.stream = uint32_t(words[2]);
    }
    if (sample_ids) {
      ids_ = dense(*sample_ids);
      noise.sample_ids = data<int64_t>(*ids_);
    }
  }

  KeyedNoise noise;

 private:
  std::optional<Tensor> words_, ids_;
};

inline NoiseTarget target_named(const std::string& name) {
  if (name == "epsilon") return NoiseTarget::epsilon;
  if (name == "sample") return NoiseTarget::sample;
  if (name == "v") return NoiseTarget::v;
  return NoiseTarget::flow;
}

inline bool streamed(const Tensor& result, int64_t bytes = kStreamedBytes) {
  return result.numel() * (result.scalar_type() == ScalarType::Float ? 4 : 2) >= bytes;
}

template <typename F>
void each_block_in_parallel(const Batch& batch, const F& f) {
  parallel(batch.count * batch.blocks_each(), kBlocksWorthThread, f);
}

inline Tensor result_like(const Tensor& like, const std::vector<Tensor>& out, size_t which) {
  return out.size() > which ? out[which] : empty(like.sizes(), like.scalar_type(), like);
}

}  // namespace
}  // namespace vqkernels
