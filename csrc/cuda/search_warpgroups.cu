// Launches of the search on warpgroups, one kernel for each number of columns that it pads to.
#include "search_launch.h"
#include "search_warpgroups.h"

namespace vqkernels::cuda {
namespace {

template <typename Half, Form kForm, int kGroups, int kSteps>
void launch(const Search& search, const Context& context) {
  using Layout = WarpgroupLayout<kGroups, kSteps>;
  const int64_t blocks =
      int64_t(blocks_for(search.rows, Layout::kRows)) * search.books * search.splits;
  VQKERNELS_LAUNCH((search_warpgroups<Half, kForm, kGroups, kSteps>), dim3(unsigned(blocks)),
                   dim3(Layout::kThreads), Layout::kBytes, context.stream)
  (search);
}

template <typename Half, Form kForm, int kSteps>
void launch(const Search& search, int groups, const Context& context) {
  constexpr int kMost = most_warpgroups(kSteps);
  if (groups != kMost) {
    launch<Half, kForm, 2, kSteps>(search, context);
  } else {
    launch<Half, kForm, kMost, kSteps>(search, context);
  }
}

template <typename Half, Form kForm>
void launch(const Search& search, int groups, const Context& context) {
  const int steps = blocks_for(search.width, kStep);
  if (steps <= 2) {
    launch<Half, kForm, 2>(search, groups, context);
  } else if (steps <= 4) {
    launch<Half, kForm, 4>(search, groups, context);
  } else if (steps <= 8) {
    launch<Half, kForm, 8>(search, groups, context);
  } else {
    launch<Half, kForm, 16>(search, groups, context);
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

void launch_warpgroups(const Search& search, Form form, DType half, int groups,
                       const Context& context) {
  if (form == Form::screened) {
    launch<__half, Form::screened>(search, groups, context);
  } else if (half == DType::f16) {
    form == Form::plain ? launch<__half, Form::plain>(search, groups, context)
                        : launch<__half, Form::scaled>(search, groups, context);
  } else {
    form == Form::plain ? launch<__nv_bfloat16, Form::plain>(search, groups, context)
                        : launch<__nv_bfloat16, Form::scaled>(search, groups, context);
  }
}

}  // namespace vqkernels::cuda
