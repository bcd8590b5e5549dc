// Nearest code on CUDA devices: launchers over raw pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace vqkernels::cuda {

struct NearestCode {
  Rows x;         // `books` groups of `count` rows
  Rows codebook;  // as many books of `count` codes, evenly spaced by strides[0]
  Metric metric = Metric::l2;
  Labels labels;               // where `indices` has each row's place
  int64_t* indices = nullptr;  // -1 for a row without a code
  int32_t* weighed = nullptr;  // optional, `[books, rows]`: how many codes float64 decided between
  // Launch choices; 0 leaves them to the launcher.
  int splits = 0;      // parts that K is searched in
  int block_rows = 0;  // 128 or 256, of mma.sync
  int stages = 0;      // 2 or 3, of mma.sync
  int warpgroups = 0;  // 1: mma.sync; 2: wgmma
};

// Writes the index of every row's nearest code.
void nearest_code(const NearestCode& problem, const Context& context);

}  // namespace vqkernels::cuda
