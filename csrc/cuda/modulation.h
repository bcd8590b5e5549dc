// Normalized and modulated rows on CUDA devices, after a gated sum or without one: launchers over
// raw pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace vqkernels::cuda {

// Tokens `[B, N, D]` with adjacent columns; strides in elements, of a sample and of a token.
struct Tokens {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t strides[2] = {};
};

// Vectors `[B, F, D]`, each for `each` consecutive tokens, or one `[D]` for all: `each` is N then,
// and its strides are zeros. Columns are adjacent.
struct Vectors {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t strides[2] = {};
  int64_t each = 1;
  bool packed = false;  // the launchers': may be read in pieces of 16 bytes of tokens
};

// Dense `[V, D]`, one row for `each` consecutive tokens.
struct VectorGradients {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t each = 1;
};

//   stream = x + gate * branch                        without a branch: x itself
//   out = norm(stream) * weight * (1 + scale) + (bias * (1 + scale) + shift)
struct Modulate {
  int64_t batch = 0, tokens = 0, width = 0;
  Tokens x;               // of one dtype with stream and out
  Tokens branch, stream;  // no data: no gated sum
  Tokens out;             // no data: the gated sum alone
  Vectors gate, shift, scale;
  Vectors weight, bias;  // no data: ones, zeros
  float eps = 0;
  bool centered = true;         // false: the mean counts as zero, which is RMS normalization
  float* statistics = nullptr;  // `[B, N, 2]`: mean, 1 / deviation
};

void modulate(const Modulate& problem, const Context& context);

// With n = (x - mean) / deviation and h = grad * weight * (1 + scale):
//
//   grad_x = (h - mean(h) - n mean(h n)) / deviation + passed
//   grad_branch = gate * grad_x
//
// and the sums over tokens that are the vectors' gradients. Without x there is no norm, and grad
// counts as grad_x.
struct ModulateBackward {
  int64_t batch = 0, tokens = 0, width = 0;
  Tokens grad;                 // of one dtype with x, grad_x and passed
  Tokens x, grad_x;            // what was normalized
  Tokens passed;               // a gradient of x that came another way, or no data
  Tokens branch, grad_branch;  // no data: no gated sum
  Vectors gate, scale, weight, bias;
  bool centered = true;
  const float* statistics = nullptr;
  VectorGradients grad_gate, grad_shift, grad_scale, grad_weight, grad_bias;  // what there is
};

void modulate_backward(const ModulateBackward& problem, const Context& context);

}  // namespace vqkernels::cuda
