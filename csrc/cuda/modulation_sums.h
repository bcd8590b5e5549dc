// Sums of chunks in order: gradients of vectors, weights and biases.
//
// A vector's chunks lie side by side, `[chunks, D]`. A block takes 32 columns of one gradient: each
// of its warps adds up its share of the chunks in order, then the first adds up the shares. Floor:
// every chunk's sums read once, from L2.
#pragma once

#include "modulation_rows.h"

namespace vqkernels::cuda {

// Dense rows `[count, D]` that a kernel writes.
struct Results {
  void* data = nullptr;
  DType dtype = DType::f32;
};

namespace {

constexpr int kShares = 16;
constexpr int kMostTotals = 5;

// One gradient: the sum over a vector's chunks of `sums`, times `weight`, plus that of `beside`
// times `bias`, where there are such; or, where `scaled`, of a chunk's `sums` times 1 + scale.
struct Total {
  const float* sums;
  Results to;
  unsigned vectors, chunks;  // chunks of one vector
  bool scaled = false;
  Vectors weight;
  const float* beside = nullptr;
  Vectors bias;
};

struct Totals {
  Tiles tiles;
  Vectors scale;
  int64_t width;
  Total of[kMostTotals];
};

__global__ void __launch_bounds__(kShares* kWarp) add_up(Totals call) {
  __shared__ float shares[2][kShares][kWarp];
  const unsigned column_blocks = unsigned((call.width + kWarp - 1) / kWarp);
  unsigned vector = blockIdx.x / column_blocks;
  int kind = 0;
  while (vector >= call.of[kind].vectors) vector -= call.of[kind++].vectors;
  const Total& total = call.of[kind];
  const int64_t column = int64_t(blockIdx.x % column_blocks) * kWarp + threadIdx.x;
  const bool inside = column < call.width;

  const unsigned each = (total.chunks + kShares - 1) / kShares;
  const unsigned begin = min(threadIdx.y * each, total.chunks);
  const unsigned end = min(begin + each, total.chunks);
  float sum = 0, beside = 0;
  for (unsigned i = begin; inside && i < end; ++i) {
    const unsigned chunk = vector * total.chunks + i;
    const int64_t at = chunk * call.width + column;
    float term = total.sums[at];
    if (total.scaled) {
      const int64_t scale = place(call.scale, Tile(call.tiles, chunk)) + column;
      term *= 1.0f + element_of(call.scale.data, call.scale.dtype, scale);
    }
    sum += term;
    if (total.beside != nullptr) beside += total.beside[at];
  }
  shares[0][threadIdx.y][threadIdx.x] = sum;
  shares[1][threadIdx.y][threadIdx.x] = beside;
  __syncthreads();
  if (threadIdx.y > 0 || !inside) return;
  for (int share = 1; share < kShares; ++share) {
    sum += shares[0][share][threadIdx.x];
    beside += shares[1][share][threadIdx.x];
  }
  if (total.weight.data != nullptr) {
    sum *= element_of(total.weight.data, total.weight.dtype, column);
  }
  if (total.beside != nullptr) {
    sum = fmaf(beside, element_of(total.bias.data, total.bias.dtype, column), sum);
  }
  set_element(total.to.data, total.to.dtype, vector * call.width + column, sum);
}

// Collects the gradients of a call, and launches one kernel for all of them.
class AddUp {
 public:
  AddUp(const Tiles& tiles, const ModulateBackward& call)
      : totals_{tiles, call.scale, call.width, {}}, rows_(call.batch * call.tokens) {}

  // Nothing where there is no such gradient, or where the chunks' sums are the gradient.
  Total* add(const Results& sums, const VectorGradients& to) {
    if (to.data == nullptr || sums.data == to.data) return nullptr;
    Total& total = totals_.of[count_++];
    total.sums = static_cast<const float*>(sums.data);
    total.to = {to.data, to.dtype};
    total.vectors = unsigned(rows_ / to.each);
    total.chunks = totals_.tiles.count / total.vectors;
    blocks_ += total.vectors;
    return &total;
  }

  void launch(const Context& context) const {
    if (count_ == 0) return;
    const int64_t column_blocks = (totals_.width + kWarp - 1) / kWarp;
    VQKERNELS_LAUNCH(add_up, dim3(unsigned(blocks_ * column_blocks)), dim3(kWarp, kShares), 0,
                     context.stream)
    (totals_);
  }

 private:
  Totals totals_;
  int64_t rows_, blocks_ = 0;
  int count_ = 0;
};

}  // namespace
}  // namespace vqkernels::cuda
