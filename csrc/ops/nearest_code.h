// The search, as `nearest_code` and `quantize` share it.
#pragma once

#include "tensors.h"

namespace vqkernels {

Metric parse_metric(const std::string& name);

// Writes each row's index into `labels`; `packed` may hold the book's panels.
void search(const Tensor& x, const Tensor& codebook, Metric metric,
            const std::optional<Tensor>& packed, Labels<int64_t>& labels);

}  // namespace vqkernels
