// The search on warpgroups, as nearest_code.cu launches it.
#pragma once

#include "candidates.h"
#include "search_tiles.h"

namespace vqkernels::cuda {

constexpr int kWarpgroupWidth = 256;  // the most columns

constexpr int kWarpgroups = 2;  // of 64 rows, a block

// Blocks that share a multiprocessor and drift apart, one folding while the other multiplies. With
// more than 64 columns registers hold one only.
constexpr int warpgroup_blocks(int steps) { return steps <= 4 ? 2 : 1; }

// Chunks of 64 columns that a form of `width` columns is padded to.
inline int warpgroup_chunks(int width) { return (width + kChunk - 1) / kChunk; }

// Whether this object holds code for them.
bool warpgroups_compiled();

// `half`: of rows and codes that are searched as they are, not screened.
void launch_warpgroups(const Search& search, bool screened, DType half, const Context& context);

}  // namespace vqkernels::cuda
