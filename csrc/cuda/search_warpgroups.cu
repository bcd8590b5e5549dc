// Launches of the search on warpgroups, one kernel for each number of columns that it pads to.
#include "search_launch.h"
#include "search_warpgroups.h"

namespace vqkernels::cuda {
namespace {

template <typename Half, bool kScreened, int kSteps>
void launch(const Search& search, const Context& context) {
  using Layout = WarpgroupLayout<kSteps>;
  const int64_t blocks =
      int64_t(blocks_for(search.rows, Layout::kRows)) * search.books * search.splits;
  VQKERNELS_LAUNCH((search_warpgroups<Half, kScreened, kSteps>), dim3(unsigned(blocks)),
                   dim3(Layout::kThreads), Layout::kBytes, context.stream)
  (search);
}

template <typename Half, bool kScreened>
void launch(const Search& search, const Context& context) {
  const int steps = blocks_for(search.width, kStep);
  if (steps <= 2) {
    launch<Half, kScreened, 2>(search, context);
  } else if (steps <= 4) {
    launch<Half, kScreened, 4>(search, context);
  } else if (steps <= 8) {
    launch<Half, kScreened, 8>(search, context);
  } else if (steps <= 12) {
    launch<Half, kScreened, 12>(search, context);
  } else {
    launch<Half, kScreened, 16>(search, context);
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

void launch_warpgroups(const Search& search, bool screened, DType half, const Context& context) {
  if (screened) {
    launch<__half, true>(search, context);
  } else if (half == DType::f16) {
    launch<__half, false>(search, context);
  } else {
    launch<__nv_bfloat16, false>(search, context);
  }
}

}  // namespace vqkernels::cuda
