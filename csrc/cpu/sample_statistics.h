// Statistics over all elements of a sample: a standard deviation and an exact quantile.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace vqkernels {
namespace {

// Blocks are summed about their own mean and combined as Chan et al. do (1979), so that a large
// mean costs no digits.
class Deviation {
 public:
  void add(const float* values, int64_t count) {
    vf sums{};
    each_vector(count, [&](int64_t at, int64_t lanes)
                           VQKERNELS_INLINE { sums += load_at(values, at, lanes); });
    const double mean = double(sum_of(sums)) / double(count);
    const vf center = splat(float(mean));
    vf squares{}, rests{};
    each_vector(count, [&](int64_t at, int64_t lanes) VQKERNELS_INLINE {
      const vf rest = first_lanes(load_at(values, at, lanes) - center, lanes);
      rests += rest;
      squares = multiply_add(rest, rest, squares);
    });
    // `center` is the mean up to rounding; what is missing is the mean of the rests.
    const double rest = double(sum_of(rests)) / double(count), here = double(center[0]) + rest;
    const double square = double(sum_of(squares)) - rest * rest * double(count);
    const double total = double(count_ + count), apart = here - mean_;
    square_ += square + apart * apart * double(count_) * double(count) / total;
    mean_ += apart * double(count) / total;
    count_ += count;
  }

  double deviation() const { return std::sqrt(std::max(square_, 0.0) / double(count_ - 1)); }

 private:
  int64_t count_ = 0;
  double mean_ = 0, square_ = 0;
};

// The quantile of absolute values, interpolated between its two neighbours. Their bits are in their
// order: a histogram of the leading ones finds the few that need sorting.
class SampleQuantile {
 public:
  explicit SampleQuantile(int64_t count) : bits_(size_t(count)), counts_(kBins) {}

  void add(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
      bits_[size_t(added_ + i)] = bits;
      ++counts_[bits >> kShift];
    }
    added_ += count;
  }

  // Of as many numbers as were promised; a NaN among them makes it one.
  float at(double ratio) {
    const int64_t last = int64_t(bits_.size()) - 1;
    if (last < 0) return 0;
    const uint32_t most = *std::max_element(bits_.begin(), bits_.end());
    if (most > 0x7f800000u) return bit_cast<float>(most);
    const double rank = ratio * double(last);
    const int64_t below = int64_t(rank), above = int64_t(std::ceil(rank));
    const float low = ranked(below), high = above == below ? low : ranked(above);
    return low == high ? low : float(low + (double(high) - low) * (rank - double(below)));
  }

 private:
  static constexpr int kShift = 19, kBins = 1 << (32 - kShift - 1);

  float ranked(int64_t rank) {
    int64_t bin = 0;
    while (rank >= counts_[size_t(bin)]) rank -= counts_[size_t(bin++)];
    std::vector<uint32_t> inside;
    for (const uint32_t bits : bits_) {
      if (bits >> kShift == bin) inside.push_back(bits);
    }
    std::nth_element(inside.begin(), inside.begin() + rank, inside.end());
    return bit_cast<float>(inside[size_t(rank)]);
  }

  int64_t added_ = 0;
  std::vector<uint32_t> bits_;
  std::vector<int64_t> counts_;
};

}  // namespace
}  // namespace vqkernels
