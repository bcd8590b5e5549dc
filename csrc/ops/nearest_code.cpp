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

// Checks that `packed` was made for this call; the layout differs between instruction sets.
void check_packed(const float* packed, const Codebook& book) {
  Codebook probe = book;
  std::vector<float> wanted(kHeaderWords + centre_words(book.codes.width));
  probe.codes.count = 0;
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

void pack(const Codebook& book, float* packed) {
  kernels().choose_frame(book, packed);
  const int64_t dim = book.codes.width, words = kernels().panel_width * (dim + 1);
  float* panels = packed + kHeaderWords + centre_words(dim);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / words);
  parallel(panels_of(book.codes.count), grain, [&](int64_t begin, int64_t end) {
    kernels().pack_panels(book, packed, begin, end, panels + begin * words);
  });
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

void search_book(const Rows& x, Codebook book, int64_t* index) {
  const KernelTable& table = kernels();
  const int64_t panels = panels_of(book.codes.count), dim = book.codes.width;
  const Grid grid = plan(x.count, panels, dim);

  std::vector<float> frame;
  Tensor own;
  if (book.packed == nullptr) {
    if (x.count <= kFewTiles * table.tile_rows) {
      frame.resize(kHeaderWords + centre_words(dim));
      table.choose_frame(book, frame.data());
    } else {
      const int64_t words = packed_words(book.codes.count, dim);
      own = torch::stable::empty({words}, ScalarType::Float);
      pack(book, data<float>(own));
      book.packed = data<float>(own);
    }
  }
  NearestTask whole;
  whole.x = x;
  whole.book = book;
  whole.frame = book.packed != nullptr ? book.packed : frame.data();
  whole.row_end = x.count;

  std::vector<float> scores(x.count * grid.codes);
  std::vector<int64_t> others(x.count * (grid.codes - 1));
  parallel(grid.rows * grid.codes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      NearestTask task = whole;
      const int64_t across = cell % grid.rows, down = cell / grid.rows;
      const int64_t tiles = (x.count + table.tile_rows - 1) / table.tile_rows;
      task.row_begin = tiles * across / grid.rows * table.tile_rows;
      task.row_end = std::min(x.count, tiles * (across + 1) / grid.rows * table.tile_rows);
      task.panel_begin = panels * down / grid.codes;
      task.panel_end = panels * (down + 1) / grid.codes;
      float* score = scores.data() + down * x.count + task.row_begin;
      int64_t* found = (down == 0 ? index : others.data() + (down - 1) * x.count) + task.row_begin;
      table.nearest_code(task, score, found);
      if (grid.codes == 1) table.settle_rows(task, score, found);
    }
  });
  if (grid.codes == 1) return;
  for (int64_t row = 0; row < x.count; ++row) {
    for (int64_t down = 1; down < grid.codes; ++down) {
      const float score = scores[down * x.count + row];
      if (score < scores[row]) {
        scores[row] = score;
        index[row] = others[(down - 1) * x.count + row];
      }
    }
  }
  table.settle_rows(whole, scores.data(), index);
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
    Codebook book{codes_of(codebook, group), metric, nullptr};
    if (packed) {
      book.packed = data<float>(*packed) + group * packed_words(book.codes.count, rows.width);
      check_packed(book.packed, book);
    }
    search_book(rows, book, labels.of(group));
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
  const int64_t books = book_count(codebook);
  const int64_t words = packed_words(codebook.size(codebook.dim() - 2),
                                     codebook.size(codebook.dim() - 1));
  Tensor packed = empty({books, words}, ScalarType::Float, codebook);
  std::memset(packed.data_ptr(), 0, sizeof(float) * books * words);
  for (int64_t group = 0; group < books; ++group) {
    pack(Codebook{codes_of(codebook, group), parse_metric(metric), nullptr},
         data<float>(packed) + group * words);
  }
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code));
  m.impl("pack_codebook", TORCH_BOX(&pack_codebook));
}

}  // namespace
}  // namespace vqkernels
