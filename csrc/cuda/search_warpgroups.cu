// Launches of the search on warpgroups, one kernel for each number of columns that it pads to.
#include "search_launch.h"
#include "search_warpgroups.h"

namespace vqkernels::cuda {
namespace {

template <typename Half, bool kScreened, int kGroups, int kSteps>
void launch(const Search& search, const Context& context) {
  using Layout = WarpgroupLayout<kGroups, kSteps>;
  const int64_t blocks =
      int64_t(blocks_for(search.rows, Layout::kRows)) * search.books * search.splits;
  VQKERNELS_LAUNCH((search_warpgroups<Half, kScreened, kGroups, kSteps>), dim3(unsigned(blocks)),
                   dim3(Layout::kThreads), Layout::kBytes, context.stream)
  (search);
}

template <typename Half, bool kScreened, int kSteps>
void launch(const Search& search, int groups, const Context& context) {
  constexpr int kMost = most_warpgroups(kSteps);
  if (groups != kMost) {
    launch<Half, kScreened, 2, kSteps>(search, context);
  } else {
    launch<Half, kScreened, kMost, kSteps>(search, context);
  }
}

template <typename Half, bool kScreened>
void launch(const Search& search, int groups, const Context& context) {
  const int steps = blocks_for(search.width, kStep);
  if (steps <= 2) {
    launch<Half, kScreened, 2>(search, groups, context);
  } else if (steps <= 4) {
    launch<Half, kScreened, 4>(search, groups, context);
  } else if (steps <= 8) {
    launch<Half, kScreened, 8>(search, groups, context);
  } else if (steps <= 12) {
    launch<Half, kScreened, 12>(search, groups, context);
  } else {
    launch<Half, kScreened, 16>(search, groups, context);
  }
}

}  // namespace

bool warpgroups_compiled() {
#if defined(VQKERNELS_SM90A) || !defined(__CUDACC__)
  return true;
#else
  return false;
#endif
}

void launch_warpgroups(const Search& search, bool screened, DType half, int groups,
                       const Context& context) {
  if (screened) {
    launch<__half, true>(search, groups, context);
  } else if (half == DType::f16) {
    launch<__half, false>(search, groups, context);
  } else {
    launch<__nv_bfloat16, false>(search, groups, context);
  }
}

}  // namespace vqkernels::cuda
