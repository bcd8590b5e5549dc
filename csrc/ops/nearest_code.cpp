#include "nearest_code.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace vqkernels {
namespace {

// Below this many multiply-adds a call is not worth waking the pool for.
constexpr int64_t kSerialWork = 1 << 17;
// Up to this many tiles of rows, threads share the codes, not the rows, and pack what they need.
constexpr int64_t kFewTiles = 16;
// Deciding a code in float64 costs about as much as screening this many in int8 saves.
constexpr int64_t kCodesPerDecision = 24;
// Looking at a code through the tree costs about as much as scoring this many in order.
constexpr int64_t kCodesPerLook = 4;
// Rows and codes from which a tree can be worth its making.
constexpr int64_t kTreeRows = 4096, kTreeCodes = 2048;

// Checks that `packed` was made for this call; the layout differs between instruction sets.
void check_packed(const float* packed, const Codebook& book) {
  Codebook probe = book;
  probe.codes.count = 0;
  std::vector<float> wanted(PackedLayout(0, book.codes.width).frame_words);
  kernels().choose_frame(probe, wanted.data());
  int32_t header[6], expected[6];
  std::memcpy(header, packed, sizeof(header));
  std::memcpy(expected, wanted.data(), sizeof(expected));
  expected[4] = int32_t(book.codes.count);
  if (std::memcmp(header, expected, sizeof(header)) != 0) {
    throw std::invalid_argument(
        "packed must come from pack_codebook(codebook, metric=metric) of this codebook's shape, "
        "with this call's metric and instruction set");
  }
}

int64_t panels_of(int64_t codes) {
  const int64_t width = kernels().panel_width;
  return (codes + width - 1) / width;
}

bool can_screen_int8(int64_t dim) {
  return kernels().int8_screen && dim >= kScreenDim && dim <= kInt8LargestDim;
}

bool has_tree(const Rows& codes) { return codes.width <= kTreeDim && codes.count >= kTreeCodes; }

void pack(const Codebook& book, Screen screen, float* packed) {
  if (screen == Screen::tree) return kernels().pack_tree(book, packed);
  const int64_t words = kernels().panel_width * (book.codes.width + 1);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / words);
  parallel(panels_of(book.codes.count), grain, [&](int64_t begin, int64_t end) {
    kernels().pack_panels(book, screen, begin, end, packed);
  });
  kernels().hide_duplicates(book, screen, packed);
}

// Whether the task's screen leaves few enough codes, seen on some rows from the middle.
bool pays(NearestTask task) {
  constexpr int64_t kMost = 56;
  const int64_t least = kernels().tile_rows, rows = task.x.count, codes = task.book.codes.count;
  const int64_t probed = std::min(rows, std::clamp(rows / 32, least, kMost));
  task.row_begin = (rows - probed) / 2;
  task.row_end = task.row_begin + probed;
  task.panel_end = panels_of(codes);
  std::vector<double> score(probed);
  std::vector<int64_t> index(probed);
  const int64_t left = kernels().nearest_code(task, score.data(), index.data());
  const int64_t price = task.screen == Screen::tree ? kCodesPerLook : kCodesPerDecision;
  return left * price <= probed * codes;
}

// Rows and codes in a grid of tasks, one a thread.
struct Grid {
  int64_t rows = 1, codes = 1;
};

Grid plan(int64_t rows, int64_t panels, int64_t dim) {
  const KernelTable& table = kernels();
  if (rows * panels * table.panel_width * dim <= kSerialWork) return {};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (rows + table.tile_rows - 1) / table.tile_rows;
  const int64_t across_rows = tiles <= kFewTiles ? 1 : std::min(threads, tiles / 4);
  return {across_rows, std::min(std::max<int64_t>(1, threads / across_rows), panels)};
}

void run(const NearestTask& whole, int64_t* index) {
  const KernelTable& table = kernels();
  const int64_t rows = whole.x.count, panels = panels_of(whole.book.codes.count);
  const int64_t tiles = (rows + table.tile_rows - 1) / table.tile_rows;
  const Grid grid = plan(rows, panels, whole.x.width);
  std::vector<double> scores(rows * grid.codes);
  std::vector<int64_t> others(rows * (grid.codes - 1));
  parallel(grid.rows * grid.codes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      NearestTask task = whole;
      const int64_t across = cell % grid.rows, down = cell / grid.rows;
      task.row_begin = tiles * across / grid.rows * table.tile_rows;
      task.row_end = std::min(rows, tiles * (across + 1) / grid.rows * table.tile_rows);
      task.panel_begin = panels * down / grid.codes;
      task.panel_end = panels * (down + 1) / grid.codes;
      int64_t* found = down == 0 ? index : others.data() + (down - 1) * rows;
      table.nearest_code(task, scores.data() + down * rows + task.row_begin,
                         found + task.row_begin);
    }
  });
  for (int64_t down = 1; down < grid.codes; ++down) {
    for (int64_t row = 0; row < rows; ++row) {
      if (scores[down * rows + row] < scores[row]) {
        scores[row] = scores[down * rows + row];
        index[row] = others[(down - 1) * rows + row];
      }
    }
  }
}

void search_book(const Rows& x, const Codebook& book, const float* packed, int64_t* index) {
  const PackedLayout layout(book.codes.count, book.codes.width);
  const bool int8 = can_screen_int8(book.codes.width);
  const bool tree = has_tree(book.codes);
  NearestTask task;
  task.x = x;
  task.book = book;
  if (packed != nullptr) {
    task.frame = task.packed = packed;
    task.screen = int8 ? Screen::int8 : tree ? Screen::tree : Screen::fp32;
    if (task.screen != Screen::fp32 && !pays(task)) task.screen = Screen::fp32;
    return run(task, index);
  }
  if (x.count <= kFewTiles * kernels().tile_rows) {
    std::vector<float> frame(layout.frame_words);
    kernels().choose_frame(book, frame.data());
    task.frame = frame.data();
    return run(task, index);
  }
  const Tensor own = torch::stable::empty({layout.words}, ScalarType::Float);
  kernels().choose_frame(book, data<float>(own));
  task.frame = task.packed = data<float>(own);
  task.screen = int8 ? Screen::int8 : tree && x.count >= kTreeRows ? Screen::tree : Screen::fp32;
  pack(book, task.screen, data<float>(own));
  if (task.screen != Screen::fp32 && !pays(task)) {
    if (task.screen == Screen::int8) pack(book, Screen::fp32, data<float>(own));
    task.screen = Screen::fp32;
  }
  run(task, index);
}

}  // namespace

Metric parse_metric(const std::string& name) {
  return name == "l2" ? Metric::l2 : name == "dot" ? Metric::dot : Metric::cosine;
}

void search(const Tensor& x, const Tensor& codebook, Metric metric,
            const std::optional<Tensor>& packed, Labels<int64_t>& labels) {
  const bool grouped = codebook.dim() == 3;
  for (int64_t group = 0; group < book_count(codebook); ++group) {
    const Rows rows = grouped ? rows_of(x, group) : rows_of(x);
    if (rows.count == 0) continue;
    const Codebook book{codes_of(codebook, group), metric};
    const float* prepared = nullptr;
    if (packed) {
      prepared = data<float>(*packed) + group * PackedLayout(book.codes.count, rows.width).words;
      check_packed(prepared, book);
    }
    search_book(rows, book, prepared, labels.of(group));
  }
}

namespace {

Tensor nearest_code(const Tensor& x, const Tensor& codebook, const std::string& metric,
                    const std::string& /*precision*/, const std::optional<Tensor>& packed) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  Tensor indices = empty(shape, ScalarType::Long, x);
  Labels<int64_t> labels(indices, book_count(codebook));
  search(x, codebook, parse_metric(metric), packed, labels);
  labels.scatter();
  return indices;
}

Tensor pack_codebook(const Tensor& codebook, const std::string& metric) {
  const int64_t books = book_count(codebook), dim = codebook.size(codebook.dim() - 1);
  const PackedLayout layout(codebook.size(codebook.dim() - 2), dim);
  Tensor packed = empty({books, layout.words}, ScalarType::Float, codebook);
  std::memset(packed.data_ptr(), 0, sizeof(float) * books * layout.words);
  for (int64_t group = 0; group < books; ++group) {
    const Codebook book{codes_of(codebook, group), parse_metric(metric)};
    float* words = data<float>(packed) + group * layout.words;
    kernels().choose_frame(book, words);
    pack(book, has_tree(book.codes) ? Screen::tree : Screen::fp32, words);
    if (can_screen_int8(dim)) pack(book, Screen::int8, words);
  }
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code));
  m.impl("pack_codebook", TORCH_BOX(&pack_codebook));
}

}  // namespace
}  // namespace vqkernels
