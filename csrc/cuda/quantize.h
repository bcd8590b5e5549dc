// The vector quantizer around `nearest_code`, forward and backward: launchers over raw pointers.
#pragma once

#include <cstdint>

#include "nearest_code.h"

namespace vqkernels::cuda {

struct Quantize {
  NearestCode search;                // its indices: -1 also where `mask` is false
  const uint8_t* mask = nullptr;     // optional, at `search.labels`; 0 leaves a row out
  Rows quantized;                    // the grid of search.x, its own strides, x's dtype
  float* counts = nullptr;           // `[books, K]`
  float* commitment_loss = nullptr;  // one number each
  float* codebook_loss = nullptr;
};

void quantize(const Quantize& problem, const Context& context);

enum class Gradient : int32_t { straight_through = 0, rotation = 1, none = 2 };

struct QuantizeBackwardX {
  Rows x, codebook;
  Rows grad_quantized;                     // data may be null: no gradient came
  const float* grad_commitment = nullptr;  // one number, or null
  Labels labels;
  const int64_t* indices = nullptr;
  Gradient gradient = Gradient::straight_through;
  Rows grad_x;  // the grid of x, x's dtype
};

void quantize_backward_x(const QuantizeBackwardX& problem, const Context& context);

// The gradient of a book, in two steps around a stable sort that the caller does (ascending):
// `code_keys` writes book * K + index for each row, -1 without a code, in the order book-major,
// then row; `quantize_backward_codebook` takes the sorted keys and where each came from.
void code_keys(const Rows& x, const Labels& labels, const int64_t* indices, int64_t codebook_size,
               int32_t* keys, const Context& context);

struct QuantizeBackwardCodebook {
  Rows x, codebook;
  const float* grad_codebook_loss = nullptr;  // one number
  const int32_t* keys = nullptr;              // sorted, `[books * rows]`
  const int64_t* order = nullptr;             // the place book * rows + row of each sorted key
  Rows grad_codebook;                         // dense `[books, K, D]`, the book's dtype
};

void quantize_backward_codebook(const QuantizeBackwardCodebook& problem, const Context& context);

}  // namespace vqkernels::cuda
