// Sums of chunks in order: gradients of vectors, weights and biases.
//
// A vector's chunks lie side by side, `[chunks, D]`. Of 32 columns of one gradient a warp adds up a
// share of the chunks in order, then the first warp the shares; as many warps take part as find
// kLeastShare chunks each, and a block takes as many columns as that leaves warps for. Floor: every
// chunk's sums read once, from L2.
#pragma once

#include "modulation_rows.h"

namespace vqkernels::cuda {

// Dense rows `[count, D]` that a kernel writes.
struct Results {
  void* data = nullptr;
  DType dtype = DType::f32;
};

namespace {

constexpr int kWarps = 16;  // of a block: shares of a gradient's columns times groups of columns
constexpr int kLeastShare = 8;
constexpr int kMostTotals = 5;

// One gradient: the sum over a vector's chunks of `sums`, times `weight`, plus that of `beside`
// times `bias`, where there are such; or, where `scaled`, of a chunk's `sums` times 1 + scale.
struct Total {
  const float* sums;
  Results to;
  unsigned chunks, shares;  // of one vector
  unsigned blocks;
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

__global__ void __launch_bounds__(kWarps* kWarp) add_up(Totals call) {
  __shared__ float shares[2][kWarps][kWarp];
  unsigned block = blockIdx.x;
  int kind = 0;
  while (block >= call.of[kind].blocks) block -= call.of[kind++].blocks;
  const Total& total = call.of[kind];
  const unsigned share = threadIdx.y % total.shares, groups = kWarps / total.shares;
  const unsigned columns = groups * kWarp, column_blocks = (call.width + columns - 1) / columns;
  const unsigned vector = block / column_blocks;
  const int64_t column =
      block % column_blocks * columns + threadIdx.y / total.shares * kWarp + threadIdx.x;
  const bool inside = column < call.width;

  const unsigned each = (total.chunks + total.shares - 1) / total.shares;
  const unsigned first = vector * total.chunks;
  const unsigned begin = first + min(share * each, total.chunks);
  const unsigned end = inside ? first + min((share + 1) * each, total.chunks) : begin;
  const auto sum_of = [&](const float* sums) {
    float sum = 0;
#pragma unroll 8
    for (unsigned chunk = begin; chunk < end; ++chunk) sum += sums[chunk * call.width + column];
    return sum;
  };
  float sum = 0;
  if (total.scaled) {
    for (unsigned chunk = begin; chunk < end; ++chunk) {
      const int64_t scale = place(call.scale, Tile(call.tiles, chunk)) + column;
      const float factor = 1.0f + element_of(call.scale.data, call.scale.dtype, scale);
      sum = fmaf(total.sums[chunk * call.width + column], factor, sum);
    }
  } else {
    sum = sum_of(total.sums);
  }
  float beside = total.beside == nullptr ? 0.0f : sum_of(total.beside);
  shares[0][threadIdx.y][threadIdx.x] = sum;
  shares[1][threadIdx.y][threadIdx.x] = beside;
  __syncthreads();
  if (share > 0 || !inside) return;
  for (unsigned other = 1; other < total.shares; ++other) {
    sum += shares[0][threadIdx.y + other][threadIdx.x];
    beside += shares[1][threadIdx.y + other][threadIdx.x];
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
    const int64_t vectors = rows_ / to.each;
    total.chunks = unsigned(totals_.tiles.count / vectors);
    total.shares = kWarps;
    while (total.shares > 1 && total.chunks < total.shares * kLeastShare) total.shares /= 2;
    const int64_t columns = int64_t(kWarps / total.shares) * kWarp;
    total.blocks = unsigned(vectors * blocks_for(totals_.width, columns));
    blocks_ += total.blocks;
    return &total;
  }

  void launch(const Context& context) const {
    if (count_ == 0) return;
    VQKERNELS_LAUNCH(add_up, dim3(blocks_), dim3(kWarp, kWarps), 0, context.stream)(totals_);
  }

 private:
  Totals totals_;
  int64_t rows_;
  unsigned blocks_ = 0;
  int count_ = 0;
};

}  // namespace
}  // namespace vqkernels::cuda
