// The search on warpgroups, as nearest_code.cu launches it.
#pragma once

#include "candidates.h"
#include "search_tiles.h"

namespace vqkernels::cuda {

constexpr int kWarpgroupWidth = 256;  // the most columns

// Warpgroups of 64 rows a block: as many as the registers of a multiprocessor hold.
constexpr int most_warpgroups(int steps) { return steps <= 4 ? 4 : 3; }

// Blocks that share a multiprocessor.
constexpr int warpgroup_blocks(int groups, int steps) { return groups == 2 && steps <= 4 ? 2 : 1; }

// Chunks of 64 columns that a form of `width` columns is padded to.
inline int warpgroup_chunks(int width) { return (width + kChunk - 1) / kChunk; }

// Whether this object holds code for them.
bool warpgroups_compiled();

// `groups`: 2, or the most; `half`: of rows and codes that are searched as they are, not screened.
void launch_warpgroups(const Search& search, bool screened, DType half, int groups,
                       const Context& context);

}  // namespace vqkernels::cuda
