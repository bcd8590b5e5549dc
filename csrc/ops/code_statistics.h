// Per-code sums, as `code_statistics` and the backward of `quantize` share them.
#pragma once

#include "tensors.h"

namespace vqkernels {

// Adds each row of x (or code - x, with `subtract_from`) to its code's sum, which starts at zero.
void sum_by_code(const Rows& x, const int64_t* indices, const float* weights,
                 const Rows* subtract_from, int64_t codebook_size, float* sums);

}  // namespace vqkernels
