// Where things lie in a packed codebook, in 32-bit words. Torch-free, the same for every
// instruction set but for the panel width.
//
//   header   16 words: a Frame
//   centre   D, rounded up to 16
//   bounds   two norms a panel (at most one panel per 16 codes), in two arrays
//   panels   (D + 1) words a code
//   tree     ids, boxes of the panels, boxes of the supers, only for D <= kTreeDim
//   screen   D / 4 + 2 words a code, only for kScreenDim <= D <= kInt8LargestDim: int8 codes
#pragma once

#include <cstdint>

namespace vqkernels {

constexpr int64_t kHeaderWords = 16;
constexpr int64_t kTreeDim = 4;
constexpr int64_t kScreenDim = 32;
constexpr int64_t kInt8LargestDim = 1 << 14;  // sums of products stay below 2^31

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct PackedLayout {
  int64_t frame_words, bounds, bound_stride, panels, tree, tree_ids, tree_panels, screen, words;

  PackedLayout(int64_t codebook_size, int64_t dim) {
    const int64_t codes = round_up(codebook_size, 64);
    frame_words = kHeaderWords + round_up(dim, 16);
    bounds = frame_words;
    bound_stride = round_up(codes / 16, 16);
    panels = bounds + 2 * bound_stride;
    tree = panels + codes * (dim + 1);
    tree_ids = dim <= kTreeDim ? codes : 0;
    tree_panels = dim <= kTreeDim ? bound_stride * (2 * dim + 1) : 0;
    const int64_t supers = round_up(bound_stride / 16, 16);
    screen = tree + tree_ids + tree_panels + (dim <= kTreeDim ? supers * (2 * dim + 1) : 0);
    words = screen +
            (dim >= kScreenDim && dim <= kInt8LargestDim ? codes * (round_up(dim, 4) / 4 + 2) : 0);
  }
};

}  // namespace vqkernels
