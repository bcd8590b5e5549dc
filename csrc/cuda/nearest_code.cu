// Nearest code on CUDA devices: forms and terms, one tensor-core search, decisions in float64.
//
//   prepare_codes, prepare_rows   half-precision forms, and how far off they are   prepare.h
//   search_tiles                  candidates of every row                          search_tiles.h
//   or search_warpgroups          the same on compute capability 9.0         search_warpgroups.h
//   decide, choose, resolve       the index of every row                           decide.h
//
// Half-precision inputs of one dtype that lie well in memory are searched as they are, unless codes
// are to be normalized. Everything else (fp32, mixed, strided) is screened in fp16, which is as
// fast; for D <= 16 with three products side by side, so that hardly a row is left undecided. fp32
// lanes would need D multiply-adds for each score, 0.29 ms at D = 8 for the shapes in
// search_tiles.h; two tensor-core steps need 0.11 ms.
//
// Exact: the index is that of the least float64 distance, the lowest one among equals, whatever the
// screen. Memory: the forms, 2 bytes an element (6 up to D = 16), 49 bytes a code, and 48 a row and
// split.
#include <algorithm>
#include <stdexcept>

#include "decide.h"
#include "nearest_code.h"
#include "prepare.h"
#include "search_launch.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreeTerms = 16;  // up to this D
constexpr int kLeastTiles = 4;   // of a split, so that reading its rows is paid for

bool lies_well(const Rows& rows) {
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                       rows.strides[0] % kPiece == 0 && rows.book_stride % kPiece == 0 &&
                       rows.width % kPiece == 0;
  return aligned && rows.col_stride == 1 && rows.middle == 1 && rows.inner == 1 &&
         rows.dtype != DType::f32;
}

struct Plan {
  bool direct;  // search the inputs as they are
  int terms, width;
  int tiles, splits, tiles_per_split;
  bool warpgroups;  // else search_tiles, with the rest
  int warps_m, stages;
  bool resident;

  int block_rows() const { return 64 * (warpgroups ? kWarpgroups : warps_m); }
  int shared_bytes() const {
    return warps_m == 2 ? SearchLayout<2>(width, stages, resident).bytes
                        : SearchLayout<4>(width, stages, resident).bytes;
  }
};

// 128 rows a block leave room for two blocks on a multiprocessor, one of which compares scores
// while the other multiplies. Rows of 129 to 256 columns leave none: then 256 rows, which read the
// book half as often. Rows that do not fit beside two stages are streamed with the codes.
void choose_shape(const NearestCode& problem, const Device& device, Plan& plan) {
  const int chunks = (plan.width + kChunk - 1) / kChunk;
  const auto fits = [&](int warps_m, int stages, bool resident) {
    Plan tried = plan;
    tried.warps_m = warps_m;
    tried.stages = stages;
    tried.resident = resident;
    return tried.shared_bytes() <= device.shared_block;
  };
  const bool tall = chunks > 2 && chunks <= kResident && problem.x.count > 128 && fits(4, 2, true);
  plan.warps_m = problem.block_rows > 0 ? problem.block_rows / 64 : tall ? 4 : 2;
  plan.resident = chunks <= kResident && fits(plan.warps_m, 2, true);
  plan.stages = 3;
  const int blocks = plan.warps_m == 2 ? 2 : 1;
  if (!fits(plan.warps_m, 3, plan.resident) || plan.shared_bytes() * blocks > device.shared_total) {
    plan.stages = 2;
  }
  if (problem.stages > 0) plan.stages = problem.stages;
}

// Whether search_warpgroups takes the search. Blocks of 192 and 256 rows, as many as registers
// hold, read the book less often and were slower for every shape measured (H100).
bool choose_warpgroups(const NearestCode& problem, const Device& device, int width) {
  const bool possible =
      device.capability == 90 && warpgroups_compiled() && width <= kWarpgroupWidth;
  if (problem.warpgroups == 2 && !possible) {
    throw std::runtime_error(
        "nearest_code on warpgroups needs compute capability 9.0, an object "
        "built for 90a, and at most 256 columns");
  }
  return possible && problem.warpgroups != 1 && (problem.x.count > 64 || problem.warpgroups == 2);
}

Plan plan_for(const NearestCode& problem, const Device& device) {
  const int dim = int(problem.x.width);
  Plan plan{};
  plan.direct = lies_well(problem.x) && lies_well(problem.codebook) &&
                problem.x.dtype == problem.codebook.dtype && problem.metric != Metric::cosine;
  plan.terms = plan.direct ? 0 : dim <= kThreeTerms ? 3 : 1;
  plan.width = plan.direct ? dim : (plan.terms * dim + kStep - 1) / kStep * kStep;
  plan.warpgroups = choose_warpgroups(problem, device, plan.width);
  if (!plan.warpgroups) choose_shape(problem, device, plan);

  plan.tiles = blocks_for(problem.codebook.count, kTileCodes);
  const int rows = blocks_for(problem.x.count, plan.block_rows()) * int(problem.x.books);
  const int of_warpgroups = warpgroup_blocks(blocks_for(plan.width, kStep));
  const int blocks = plan.warpgroups ? of_warpgroups : plan.warps_m == 2 ? 2 : 1;
  const int together = blocks * device.multiprocessors;
  const int wanted = problem.splits > 0 ? problem.splits : together / rows;
  const int most = problem.splits > 0 ? plan.tiles : plan.tiles / kLeastTiles;
  plan.tiles_per_split = blocks_for(plan.tiles, std::max(1, std::min(wanted, most)));
  plan.splits = blocks_for(plan.tiles, plan.tiles_per_split);
  return plan;
}

template <typename Half, bool kScreened, int kWarpsM>
void launch_search(const Search& search, int shared_bytes, const Context& context) {
  const int64_t blocks =
      int64_t(blocks_for(search.rows, 64 * kWarpsM)) * search.books * search.splits;
  VQKERNELS_LAUNCH((search_tiles<Half, kScreened, kWarpsM>), dim3(unsigned(blocks)),
                   dim3(SearchLayout<kWarpsM>::kThreads), shared_bytes, context.stream)
  (search);
}

template <typename Half, bool kScreened>
void launch_search(const Search& search, const Plan& plan, const Context& context) {
  if (plan.warps_m == 4) {
    launch_search<Half, kScreened, 4>(search, plan.shared_bytes(), context);
  } else {
    launch_search<Half, kScreened, 2>(search, plan.shared_bytes(), context);
  }
}

}  // namespace

void nearest_code(const NearestCode& problem, const Context& context) {
  const Rows &x = problem.x, &codebook = problem.codebook;
  const int64_t all_rows = x.books * x.count;
  if (all_rows == 0) return;
  const Plan plan = plan_for(problem, context.device);
  const unsigned books = unsigned(x.books);

  CodeForms codes{};
  codes.codebook = codebook;
  codes.metric = problem.metric;
  codes.terms = plan.terms;
  codes.width = plan.width;
  codes.chunks = plan.warpgroups ? warpgroup_chunks(plan.width) : 0;
  codes.tiles = context.array<Tile>(x.books * plan.tiles);
  codes.terms_of_codes = context.array<CodeTerms>(x.books * plan.tiles * kTileCodes);
  if (!plan.direct && problem.metric == Metric::l2) {
    float* centre = context.array<float>(x.books * x.width);
    codes.centre = centre;
    codes.largest_unit = context.array<int>(x.books);
    with_type(codebook.dtype, [&](auto type) {
      VQKERNELS_LAUNCH((book_centre<typename decltype(type)::type>),
                       dim3(blocks_for(x.width, kWarp), books), dim3(kPrepareThreads), 0,
                       context.stream)
      (codebook, centre, codes.largest_unit);
    });
  }
  RowForms rows{};
  rows.x = x;
  rows.centre = codes.centre;
  rows.largest_unit = codes.largest_unit;
  rows.terms = plan.terms;
  rows.width = plan.width;
  codes.undecided = context.array<int>(2);
  rows.terms_of_row = context.array<RowTerms>(all_rows);
  const int code_columns = codes.chunks > 0 ? codes.chunks * kChunk : plan.width;
  if (!plan.direct || codes.chunks > 0) {
    codes.forms = context.array<uint16_t>(x.books * plan.tiles * kTileCodes * code_columns);
  }
  if (!plan.direct) {
    rows.forms = context.array<__half>(all_rows * plan.width);
  }
  with_type(codebook.dtype, [&](auto type) {
    VQKERNELS_LAUNCH((prepare_codes<typename decltype(type)::type>), dim3(plan.tiles, books),
                     dim3(kCodeWarps * kWarp), 0, context.stream)
    (codes);
  });
  // The search on warpgroups makes the terms of rows that it takes as they are.
  if (!plan.direct || !plan.warpgroups) {
    with_type(x.dtype, [&](auto type) {
      VQKERNELS_LAUNCH((prepare_rows<typename decltype(type)::type>),
                       dim3(blocks_for(x.count, kPrepareWarps), books), dim3(kPrepareThreads), 0,
                       context.stream)
      (rows);
    });
  }

  Search search{};
  search.x = plan.direct ? x.data : rows.forms;
  search.x_stride = plan.direct ? x.strides[0] : plan.width;
  search.x_book = plan.direct ? x.book_stride : x.count * plan.width;
  const bool of_book = codes.forms == nullptr;
  search.codes = of_book ? codebook.data : codes.forms;
  search.code_stride = of_book ? codebook.strides[0] : plan.width;
  search.code_book =
      of_book ? codebook.book_stride : int64_t(plan.tiles) * kTileCodes * code_columns;
  search.row_terms = rows.terms_of_row;
  search.tiles = codes.tiles;
  search.terms_of_codes = codes.terms_of_codes;
  search.records = context.array<Record>(plan.splits * all_rows);
  search.rows = int(x.count);
  search.codes_count = int(codebook.count);
  search.width = plan.width;
  search.books = int(x.books);
  search.tile_count = plan.tiles;
  search.splits = plan.splits;
  search.tiles_per_split = plan.tiles_per_split;
  search.stages = plan.stages;
  search.resident = plan.resident;
  if (plan.warpgroups) {
    launch_warpgroups(search, !plan.direct, x.dtype, context);
  } else if (!plan.direct) {
    launch_search<__half, true>(search, plan, context);
  } else if (x.dtype == DType::f16) {
    launch_search<__half, false>(search, plan, context);
  } else {
    launch_search<__nv_bfloat16, false>(search, plan, context);
  }

  Decision decision{};
  decision.records = search.records;
  decision.row_terms = rows.terms_of_row;
  decision.x = x;
  decision.codebook = codebook;
  decision.metric = problem.metric;
  decision.labels = problem.labels;
  decision.indices = problem.indices;
  decision.weighed = problem.weighed;
  decision.splits = plan.splits;
  decision.split_codes = plan.tiles_per_split * kTileCodes;
  decision.undecided = codes.undecided;
  decision.list = context.array<int32_t>(all_rows);
  VQKERNELS_LAUNCH(decide, dim3(blocks_for(all_rows, kDecideThreads)), dim3(kDecideThreads), 0,
                   context.stream)
  (decision);
  const unsigned choosers = unsigned(
      std::min<int64_t>(blocks_for(all_rows, kChooseWarps), 8 * context.device.multiprocessors));
  const unsigned resolvers =
      unsigned(std::min<int64_t>(all_rows, 2 * context.device.multiprocessors));
  with_types(x.dtype, codebook.dtype, [&](auto row, auto code) {
    using T = typename decltype(row)::type;
    using C = typename decltype(code)::type;
    VQKERNELS_LAUNCH((choose<T, C>), dim3(choosers), dim3(kChooseThreads), 0, context.stream)
    (decision);
    VQKERNELS_LAUNCH((resolve<T, C>), dim3(resolvers), dim3(kResolveThreads), 0, context.stream)
    (decision);
  });
}

}  // namespace vqkernels::cuda
