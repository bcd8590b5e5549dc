// out[row] = codes[indices[row]]; -1 gives zeros. Bytes: rows x width read and written once.
#pragma once

#include "kernel_table.h"

namespace vqkernels {
namespace {

// Copies without conversion, so that it serves every element type of one size.
template <typename Bits>
int64_t gather_bits(const Rows& codes, const int64_t* indices, const Rows& out, int64_t row_begin,
                    int64_t row_end) {
  int64_t outside = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t index = indices[row];
    Bits* to = static_cast<Bits*>(out.data) + row * out.width;
    if (index < 0 || index >= codes.count) {
      outside += index != -1;
      std::memset(to, 0, sizeof(Bits) * out.width);
      continue;
    }
    const Bits* from = static_cast<const Bits*>(codes.data) + codes.offset(index);
    if (codes.col_stride == 1) {
      std::memcpy(to, from, sizeof(Bits) * out.width);
    } else {
      for (int64_t d = 0; d < out.width; ++d) to[d] = from[d * codes.col_stride];
    }
  }
  return outside;
}

inline int64_t gather_codes(const Rows& codes, const int64_t* indices, const Rows& out,
                            int64_t row_begin, int64_t row_end) {
  if (codes.dtype == DType::f32) {
    return gather_bits<uint32_t>(codes, indices, out, row_begin, row_end);
  }
  return gather_bits<uint16_t>(codes, indices, out, row_begin, row_end);
}

}  // namespace
}  // namespace vqkernels
