// Nearest-code search: chunks of rows against blocks of codes, screened, then decided in float64.
//
// Rows of a chunk and codes of a block share the second-level cache. A screen writes the least
// approximate score of every group of codes; `list_candidates` reads them once and keeps the few
// that the error bound cannot rule out. Every screen gives the same answers.
#pragma once

#include "nearest_small_dim.h"
#include "nearest_tree.h"
#include "screen_int8.h"

namespace vqkernels {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kBlockBytes = 384 << 10;
constexpr int64_t kBlockPanels = 32;
constexpr int64_t kSmallBlockPanels = 256;

inline PanelBounds packed_bounds(const NearestTask& task) {
  const PackedLayout layout(task.book.codes.count, task.book.codes.width);
  float* bounds = const_cast<float*>(task.packed) + layout.bounds;
  return {bounds, bounds + layout.bound_stride};
}

// The codes of one block, from the packed book or packed here.
struct Block {
  const float* panels;
  PanelBounds bounds;
};

class Blocks {
 public:
  Blocks(const NearestTask& task, int64_t largest) : task_(task), largest_(largest) {}

  int64_t scratch_words() const {
    return task_.packed ? 0 : largest_ * panel_words(dim()) + 2 * round_up(largest_, 16);
  }

  void use(Scratch* scratch) {
    if (task_.packed) return;
    own_.bounds.code = scratch->take<float>(round_up(largest_, 16));
    own_.bounds.error = scratch->take<float>(round_up(largest_, 16));
    panels_ = scratch->take<float>(largest_ * panel_words(dim()));
    own_.panels = panels_;
  }

  Block get(int64_t begin, int64_t end) {
    if (!task_.packed) {
      pack_fp32(task_.book, task_.frame, begin, end, panels_, own_.bounds);
      return own_;
    }
    const PackedLayout layout(task_.book.codes.count, dim());
    return {task_.packed + layout.panels + begin * panel_words(dim()),
            packed_bounds(task_).from(begin)};
  }

 private:
  int64_t dim() const { return task_.book.codes.width; }
  const NearestTask& task_;
  int64_t largest_;
  float* panels_ = nullptr;
  Block own_{};
};

// Whether fp32 can rank codes for a row with this |x'|^2; written so that NaN says no.
inline bool in_range(float square, Metric metric) {
  return square <= 1e34f && (metric == Metric::l2 || square >= 1e-30f);
}

inline RowError fp32_error(float square, const NearestTask& task) {
  const float relative = rounding(task.x.width);
  const bool l2 = task.book.metric == Metric::l2;
  return {relative * std::sqrt(square) * 1.001f, l2 ? relative * 0.5f : 0.0f, 0.0f};
}

// The float64 answer of every row of a chunk, from its list or from all codes.
inline int64_t finish_rows(const NearestTask& task, int64_t chunk, int64_t rows,
                           const float* squares, const int32_t* ids, RowSearch* searches,
                           ExactRow* exact, double* score, int64_t* index) {
  int64_t scored = 0;
  for (int64_t r = 0; r < rows; ++r) {
    RowSearch& search = searches[r];
    scored += settle(&search, exact, chunk + r, ids);
    const bool decided =
        in_range(squares[r], task.book.metric) && search.index >= 0 && search.upper > -kInfinity;
    if (!decided) exact->search_all(chunk + r, &search);
    score[chunk + r - task.row_begin] = search.score;
    index[chunk + r - task.row_begin] = search.index;
  }
  return scored;
}

inline int64_t chunk_rows_for(int64_t words_per_row, int64_t multiple) {
  const int64_t fitting = kChunkBytes / int64_t(sizeof(float)) / words_per_row;
  return std::max(multiple, std::min<int64_t>(fitting, 256) / multiple * multiple);
}

inline int64_t nearest_fp32(const NearestTask& task, double* score, int64_t* index) {
  const int64_t dim = task.x.width;
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  const int64_t chunk_rows = chunk_rows_for(dim, kTileRows);
  const int64_t fitting = kBlockBytes / int64_t(panel_words(dim) * sizeof(float));
  const int64_t block = std::clamp<int64_t>(fitting, 1, kBlockPanels);
  constexpr int64_t kSearchWords = sizeof(RowSearch) / sizeof(float);

  Blocks blocks(task, block);
  Scratch scratch(chunk_rows * (dim + 1 + kSearchWords) + block * (kTileRows + 1) * kLanes +
                  4 * dim + blocks.scratch_words());
  blocks.use(&scratch);
  float* tiles = scratch.take<float>(chunk_rows * dim);
  float* squares = scratch.take<float>(chunk_rows);
  float* least = scratch.take<float>(block * kTileRows * kLanes);
  float* errors = scratch.take<float>(round_up(block, kLanes));
  auto* searches = reinterpret_cast<RowSearch*>(scratch.take<float>(chunk_rows * kSearchWords));
  auto* exact_x = reinterpret_cast<double*>(scratch.take<float>(2 * dim));
  ExactRow exact(task, exact_x, reinterpret_cast<double*>(scratch.take<float>(2 * dim)));

  int64_t scored = 0;
  for (int64_t chunk = task.row_begin; chunk < task.row_end; chunk += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, task.row_end - chunk);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - r);
      tile_for(count).load(task.x, chunk + r, count, frame, tiles + r * dim, squares + r);
    }
    for (int64_t r = 0; r < rows; ++r) searches[r].reset();
    for (int64_t begin = task.panel_begin; begin < task.panel_end; begin += block) {
      const int64_t panels = std::min(block, task.panel_end - begin);
      const Block codes = blocks.get(begin, begin + panels);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, rows - r);
        const TileShape& shape = tile_for(count);
        shape.score(tiles + r * dim, codes.panels, dim, panels, least);
        for (int64_t i = 0; i < count; ++i) {
          if (!in_range(squares[r + i], task.book.metric)) continue;
          panel_errors(fp32_error(squares[r + i], task), codes.bounds, panels, errors);
          scored += list_candidates(least + i * kLanes, shape.rows * kLanes, errors, panels, begin,
                                    chunk + r + i, nullptr, &searches[r + i], &exact);
        }
      }
    }
    scored += finish_rows(task, chunk, rows, squares, nullptr, searches, &exact, score, index);
  }
  return scored;
}

template <int D>
int64_t nearest_small_dim(const NearestTask& task, double* score, int64_t* index) {
#if defined(__AVX512F__)
  constexpr int V = D <= 4 ? 4 : 2;
#else
  constexpr int V = D <= 4 ? 2 : 1;
#endif
  constexpr int64_t kRows = kLanes * V, kChunk = 512 / kRows * kRows;
  constexpr int64_t kSearchWords = sizeof(RowSearch) / sizeof(float);
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  Blocks blocks(task, kSmallBlockPanels);
  Scratch scratch(kChunk * (D + 4 + kSearchWords) + kSmallBlockPanels * (kLanes + 1) + 4 * D +
                  blocks.scratch_words());
  blocks.use(&scratch);
  float* tiles = scratch.take<float>(kChunk * D);
  float* squares = scratch.take<float>(kChunk);
  float* least = scratch.take<float>(kSmallBlockPanels * kLanes);
  float* errors = scratch.take<float>(kSmallBlockPanels);
  auto* searches = reinterpret_cast<RowSearch*>(scratch.take<float>(kChunk * kSearchWords));
  ExactRow exact(task, reinterpret_cast<double*>(scratch.take<float>(2 * D)),
                 reinterpret_cast<double*>(scratch.take<float>(2 * D)));
  const int32_t* ids = panel_order(task);
  alignas(64) float best[kRows], second[kRows], panel_of_best[kRows];

  int64_t scored = 0;
  for (int64_t chunk = task.row_begin; chunk < task.row_end; chunk += kChunk) {
    const int64_t rows = std::min(kChunk, task.row_end - chunk);
    for (int64_t r = 0; r < rows; r += kRows) {
      load_tile<kRows>(task.x, chunk + r, std::min(kRows, rows - r), frame, tiles + r * D,
                       squares + r);
    }
    for (int64_t r = 0; r < rows; ++r) searches[r].reset();
    for (int64_t begin = task.panel_begin; begin < task.panel_end; begin += kSmallBlockPanels) {
      const int64_t panels = std::min(kSmallBlockPanels, task.panel_end - begin);
      const Block codes = blocks.get(begin, begin + panels);
      const float largest = *std::max_element(codes.bounds.code, codes.bounds.code + panels);
      for (int64_t r = 0; r < rows; r += kRows) {
        std::fill(best, best + kRows, kInfinity);
        std::fill(second, second + kRows, kInfinity);
        std::fill(panel_of_best, panel_of_best + kRows, 0.0f);
        score_lanes<D, V>(tiles + r * D, codes.panels, panels, {best, second, panel_of_best});
        for (int64_t i = 0; i < std::min(kRows, rows - r); ++i) {
          const float square = squares[r + i];
          if (!in_range(square, task.book.metric)) continue;
          RowSearch& search = searches[r + i];
          const RowError row_error = fp32_error(square, task);
          const float error = largest * (row_error.per_code + largest * row_error.per_square);
          if (!(best[i] - error <= search.upper)) continue;
          search.upper = std::min(search.upper, best[i] + error);
          float row[D];
          for (int d = 0; d < D; ++d) row[d] = tiles[r * D + d * kRows + i];
          const bool one_panel = second[i] - error > search.upper;
          const int64_t first = one_panel ? int64_t(panel_of_best[i]) : 0;
          const int64_t count = one_panel ? 1 : panels;
          score_tile<1>(row, codes.panels + first * panel_words(D), D, count, least);
          for (int64_t p = 0; p < count; ++p) errors[p] = error;
          scored += list_candidates(least, kLanes, errors, count, begin + first, chunk + r + i, ids,
                                    &search, &exact);
        }
      }
    }
    scored += finish_rows(task, chunk, rows, squares, ids, searches, &exact, score, index);
  }
  return scored;
}

template <int D>
int64_t nearest_by_tree(const NearestTask& task, double* score, int64_t* index) {
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  alignas(64) double exact_x[D], exact_centre[D];
  ExactRow exact(task, exact_x, exact_centre);
  TreeSearch<D> tree(task, &exact);
  const int32_t* ids = panel_order(task);
  Scratch scratch(tree.super_words());
  float* super_bounds = scratch.take<float>(tree.super_words());

  int64_t looked = 0;
  float x[16], square;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    RowSearch search;
    search.reset();
    square = load_framed_row(task.x, row, frame, x);
    if (in_range(square, task.book.metric)) {
      if (task.book.metric != Metric::l2 && tree.largest() > 0) {
        const float length = tree.largest() / std::sqrt(square);
        for (float& element : x) element *= length;
        exact.set_screen_scale(length);
        square = tree.largest() * tree.largest();
      }
      const RowError parts = fp32_error(square, task);
      const float code = tree.largest(), sum = std::sqrt(square) + code;
      const float error = code * (parts.per_code + code * parts.per_square) + 1e-30f;
      const float rounded = 4 * rounding(D) * sum * sum + 1e-30f;
      looked += tree.run({x, 0.5f * square + rounded, row}, error, super_bounds, &search);
    }
    looked += finish_rows(task, row, 1, &square, ids, &search, &exact, score, index);
  }
  return looked;
}

#if defined(__AVX512VNNI__)

inline int64_t nearest_int8(const NearestTask& task, double* score, int64_t* index) {
  const int64_t dim = task.x.width, words = round_up(dim, 4) / 4;
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  const PackedLayout layout(task.book.codes.count, dim);
  const PanelBounds bounds = packed_bounds(task);
  const int64_t chunk_rows = chunk_rows_for(words, kInt8TileRows);
  const int64_t fitting = kBlockBytes / int64_t(int8_panel_words(dim) * sizeof(float));
  const int64_t block = std::clamp<int64_t>(fitting, 1, kBlockPanels);
  constexpr int64_t kSearchWords = sizeof(RowSearch) / sizeof(float);

  Scratch scratch(chunk_rows * (words + 6 + kSearchWords) + block * (kInt8TileRows + 1) * kLanes +
                  5 * dim + 16);
  auto* tiles = scratch.take<uint32_t>(chunk_rows * words);
  float* squares = scratch.take<float>(chunk_rows);
  auto* rows_int8 = reinterpret_cast<Int8Row*>(scratch.take<float>(chunk_rows * 2));
  auto* row_errors = reinterpret_cast<RowError*>(scratch.take<float>(chunk_rows * 3));
  float* least = scratch.take<float>(block * kInt8TileRows * kLanes);
  float* errors = scratch.take<float>(round_up(block, kLanes));
  auto* searches = reinterpret_cast<RowSearch*>(scratch.take<float>(chunk_rows * kSearchWords));
  float* row = scratch.take<float>(round_up(dim, 16));
  auto* exact_x = reinterpret_cast<double*>(scratch.take<float>(2 * dim));
  ExactRow exact(task, exact_x, reinterpret_cast<double*>(scratch.take<float>(2 * dim)));

  const float relative = rounding(0);
  const float per_square = task.book.metric == Metric::l2 ? relative * 0.5f : 0.0f;
  int64_t scored = 0;
  for (int64_t chunk = task.row_begin; chunk < task.row_end; chunk += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, task.row_end - chunk);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tile = r / kInt8TileRows * kInt8TileRows;
      const Int8Shape shape = int8_shape(std::min<int64_t>(kInt8TileRows, rows - tile));
      squares[r] = load_framed_row(task.x, chunk + r, frame, row);
      float held, error;
      rows_int8[r] =
          quantize_row(row, dim, shape.rows, tiles + tile * words + r - tile, &held, &error);
      row_errors[r] = {error + relative * held * 2, per_square, held};
      searches[r].reset();
    }
    for (int64_t begin = task.panel_begin; begin < task.panel_end; begin += block) {
      const int64_t panels = std::min(block, task.panel_end - begin);
      const float* codes = task.packed + layout.screen + begin * int8_panel_words(dim);
      for (int64_t r = 0; r < rows; r += kInt8TileRows) {
        const int64_t count = std::min<int64_t>(kInt8TileRows, rows - r);
        const Int8Shape shape = int8_shape(count);
        shape.score(tiles + r * words, rows_int8 + r, codes, dim, panels, least);
        for (int64_t i = 0; i < count; ++i) {
          if (!in_range(squares[r + i], task.book.metric)) continue;
          panel_errors(row_errors[r + i], bounds.from(begin), panels, errors);
          scored += list_candidates(least + i * kLanes, shape.rows * kLanes, errors, panels, begin,
                                    chunk + r + i, nullptr, &searches[r + i], &exact);
        }
      }
    }
    scored += finish_rows(task, chunk, rows, squares, nullptr, searches, &exact, score, index);
  }
  return scored;
}

#endif

template <int D>
int64_t nearest_few_dims(const NearestTask& task, double* score, int64_t* index) {
  if constexpr (D <= kTreeDim) {
    if (task.screen == Screen::tree) return nearest_by_tree<D>(task, score, index);
  }
  return nearest_small_dim<D>(task, score, index);
}

inline int64_t nearest_code(const NearestTask& task, double* score, int64_t* index) {
#if defined(__AVX512VNNI__)
  if (task.screen == Screen::int8) return nearest_int8(task, score, index);
#endif
  switch (task.x.width) {
    case 1:
      return nearest_few_dims<1>(task, score, index);
    case 2:
      return nearest_few_dims<2>(task, score, index);
    case 3:
      return nearest_few_dims<3>(task, score, index);
    case 4:
      return nearest_few_dims<4>(task, score, index);
    case 5:
      return nearest_few_dims<5>(task, score, index);
    case 6:
      return nearest_few_dims<6>(task, score, index);
    case 7:
      return nearest_few_dims<7>(task, score, index);
    case kLargestSmallDim:
      return nearest_few_dims<8>(task, score, index);
    default:
      return nearest_fp32(task, score, index);
  }
}

// ---- packing a whole book ------------------------------------------------------------------

inline void pack_panels(const Codebook& book, Screen screen, int64_t begin, int64_t end,
                        float* packed) {
  const PackedLayout layout(book.codes.count, book.codes.width);
  float* code_bound = packed + layout.bounds + begin;
  const PanelBounds bounds{code_bound, code_bound + layout.bound_stride};
#if defined(__AVX512VNNI__)
  if (screen == Screen::int8) {
    float* panels = packed + layout.screen + begin * int8_panel_words(book.codes.width);
    return pack_int8(book, packed, begin, end, panels, bounds);
  }
#endif
  (void)screen;
  float* panels = packed + layout.panels + begin * panel_words(book.codes.width);
  pack_fp32(book, packed, begin, end, panels, bounds);
}

inline void hide_duplicates(const Codebook& book, Screen screen, float* packed) {
  const PackedLayout layout(book.codes.count, book.codes.width);
  int64_t words = panel_words(book.codes.width), base = layout.panels;
#if defined(__AVX512VNNI__)
  if (screen == Screen::int8) {
    words = int8_panel_words(book.codes.width);
    base = layout.screen;
  }
#endif
  (void)screen;
  for_each_duplicate(book.codes, [&](int64_t code) {
    packed[base + code / kPanelWidth * words + code % kPanelWidth] = kInfinity;
  });
}

}  // namespace
}  // namespace vqkernels
