// Nearest-code search over packed panels.
//
// Cost for N rows, K codes, dimension D: N K D multiply-adds, and an epilogue of about 3 vector
// operations per vector of scores. The tile keeps tile_rows x kPanelWidth full sums in registers;
// each sum is one chain over d in ascending order, whatever the tile's shape, so a row's result
// depends neither on its batch nor on the number of threads, and equal codes score equal.
// For D <= 8 the epilogue would dominate: there rows lie in lanes, codes are broadcast, one
// minimum is kept a panel, and the winning panel is scored once more to find the code.
#pragma once

#include <algorithm>
#include <type_traits>

#include "codebook_panels.h"

namespace vqkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(VQKERNELS_NEON) || defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif

constexpr int kVectors = kPanelWidth / kLanes;  // vectors a panel row
constexpr int64_t kLargestSmallDim = 8;
constexpr int64_t kChunkTiles = 16;
constexpr int64_t kChunkBytes = 320 << 10;  // rows of one chunk, and codes of one block: half of
constexpr int64_t kBlockBytes = 400 << 10;  // a 1 MiB second-level cache each

// Running minimum of one row, by lane, and the first code of the vector it came from.
struct alignas(64) LaneState {
  float score[kLanes];
  int32_t code[kLanes];
};

// ---- rows ----------------------------------------------------------------------------------

// Rows [begin, begin + count) as x' = (x - centre) * scale in [dim][R], zeros past count, and
// |x'|^2 of each. A NaN or an infinity makes its row's square NaN or infinite.
template <int R>
inline void load_tile(const Rows& rows, int64_t begin, int64_t count, const Frame& frame,
                      float* tile, float* squares) {
  const float* centre = frame.centre();
  const float scale = frame.scale;
  const int64_t dim = rows.width;
  int64_t offsets[R] = {};
  for (int64_t r = 0; r < count; ++r) offsets[r] = rows.offset(begin + r);
  if (count < R) std::memset(tile, 0, sizeof(float) * R * dim);
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(rows.data);
    if (rows.col_stride == 1) {
      for (int64_t r = 0; r < count; ++r) {
        const T* row = data + offsets[r];
        for (int64_t d = 0; d < dim; ++d) tile[d * R + r] = (to_float(row[d]) - centre[d]) * scale;
      }
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        const T* column = data + d * rows.col_stride;
        for (int64_t r = 0; r < count; ++r) {
          tile[d * R + r] = (to_float(column[offsets[r]]) - centre[d]) * scale;
        }
      }
    }
  });
  float sums[R] = {};
  for (int64_t d = 0; d < dim; ++d) {
    for (int r = 0; r < R; ++r) sums[r] += tile[d * R + r] * tile[d * R + r];
  }
  std::memcpy(squares, sums, sizeof(float) * count);
}

// Whether fp32 can rank codes for a row with this |x'|^2; written so that NaN says no.
inline bool in_range(float square, Metric metric) {
  return square <= 1e34f && (metric == Metric::l2 || square >= 1e-30f);
}

// ---- D > 8: a register tile of R rows by P panels ------------------------------------------

template <int R, int P>
void scan_panels(const float* tile, const float* panels, int64_t dim, int32_t first_code,
                 int64_t count, LaneState* state) {
  const int64_t stride = panel_words(dim);
  for (int64_t panel = 0; panel + P <= count; panel += P) {
    const float* from = panels + panel * stride;
    vf sums[R][P * kVectors];
    for (int v = 0; v < P * kVectors; ++v) {
      const vf start = load(from + v / kVectors * stride + v % kVectors * kLanes);
      for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
    const float* code = from + kPanelWidth;
    const float* row = tile;
    for (int64_t d = 0; d < dim; ++d, code += kPanelWidth, row += R) {
      vf elements[P * kVectors];
      for (int v = 0; v < P * kVectors; ++v) {
        elements[v] = load(code + v / kVectors * stride + v % kVectors * kLanes);
      }
      for (int r = 0; r < R; ++r) {
        const vf x = splat(row[r]);
        for (int v = 0; v < P * kVectors; ++v) {
          sums[r][v] = multiply_add(elements[v], x, sums[r][v]);
        }
      }
    }
    const int32_t code_of_panel = first_code + int32_t(panel) * kPanelWidth;
    for (int r = 0; r < R; ++r) {
      vf score = load(state[r].score);
      vi label = load(state[r].code);
      for (int v = 0; v < P * kVectors; ++v) {
        keep_smaller(sums[r][v], splat(int32_t(code_of_panel + v * kLanes)), score, label);
      }
      store(state[r].score, score);
      store(state[r].code, label);
    }
  }
}

// R rows by as many panels at once as keep the multiply-add units busy.
template <int R>
void scan_block(const float* tile, const float* panels, int64_t dim, int32_t first_code,
                int64_t count, LaneState* state) {
  constexpr int kAtOnce = R == 1 ? 8 / kVectors : R <= 4 && kLanes == 16 ? 2 : 1;
  const int64_t whole = count / kAtOnce * kAtOnce;
  scan_panels<R, kAtOnce>(tile, panels, dim, first_code, whole, state);
  if (whole < count) {
    scan_panels<R, 1>(tile, panels + whole * panel_words(dim), dim,
                      first_code + int32_t(whole) * kPanelWidth, count - whole, state);
  }
}

using ScanBlock = void (*)(const float*, const float*, int64_t, int32_t, int64_t, LaneState*);
using LoadTile = void (*)(const Rows&, int64_t, int64_t, const Frame&, float*, float*);

// The narrowest tile that holds `rows` rows.
struct TileShape {
  int rows;
  ScanBlock scan;
  LoadTile load;
};

inline TileShape tile_for(int64_t rows) {
  if (rows == 1) return {1, scan_block<1>, load_tile<1>};
  if (rows <= 3) return {3, scan_block<3>, load_tile<3>};
#if defined(__AVX512F__)
  if (rows <= 8) return {8, scan_block<8>, load_tile<8>};
#endif
  return {kTileRows, scan_block<kTileRows>, load_tile<kTileRows>};
}

inline void resolve(const LaneState& state, float* score, int64_t* index) {
  float best = kInfinity;
  int64_t code = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float s = state.score[lane];
    const int64_t c = state.code[lane] + lane;
    if (s < best || (s == best && s < kInfinity && c < code)) {
      best = s;
      code = c;
    }
  }
  *score = best;
  *index = code;
}

// ---- the loop over chunks of rows and blocks of codes --------------------------------------

// Packed panels of one block of codes: from the packed book, or packed here into `buffer`.
inline const float* block_panels(const NearestTask& task, int64_t begin, int64_t end,
                                 float* buffer) {
  const int64_t dim = task.book.codes.width;
  if (task.book.packed != nullptr) {
    return task.book.packed + kHeaderWords + centre_words(dim) + begin * panel_words(dim);
  }
  pack_panels(task.book, task.frame, begin, end, buffer);
  return buffer;
}

inline int64_t panels_per_block(int64_t dim) {
  return std::max<int64_t>(1, kBlockBytes / int64_t(panel_words(dim) * sizeof(float)));
}

inline void nearest_large_dim(const NearestTask& task, float* score, int64_t* index) {
  const int64_t dim = task.x.width;
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  const int64_t fitting = kChunkBytes / int64_t(kTileRows * dim * sizeof(float));
  const int64_t chunk_tiles = std::clamp<int64_t>(fitting, 1, kChunkTiles);
  const int64_t chunk_rows = chunk_tiles * kTileRows;
  const int64_t block = panels_per_block(dim);
  const int64_t buffer_words = task.book.packed ? 0 : block * panel_words(dim);
  constexpr int64_t kStateWords = sizeof(LaneState) / sizeof(float);

  Scratch scratch(chunk_rows * (dim + 1 + kStateWords) + buffer_words);
  float* tiles = scratch.take<float>(chunk_rows * dim);
  float* squares = scratch.take<float>(chunk_rows);
  auto* states = reinterpret_cast<LaneState*>(scratch.take<float>(chunk_rows * kStateWords));
  float* buffer = scratch.take<float>(buffer_words);

  for (int64_t chunk = task.row_begin; chunk < task.row_end; chunk += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, task.row_end - chunk);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - r);
      tile_for(count).load(task.x, chunk + r, count, frame, tiles + r * dim, squares + r);
    }
    for (int64_t r = 0; r < chunk_rows; ++r) {
      store(states[r].score, splat(kInfinity));
      store(states[r].code, splat(int32_t(0)));
    }
    for (int64_t begin = task.panel_begin; begin < task.panel_end; begin += block) {
      const int64_t end = std::min(begin + block, task.panel_end);
      const float* panels = block_panels(task, begin, end, buffer);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const TileShape shape = tile_for(std::min<int64_t>(kTileRows, rows - r));
        shape.scan(tiles + r * dim, panels, dim, int32_t(begin) * kPanelWidth, end - begin,
                   states + r);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = chunk + r - task.row_begin;
      resolve(states[r], score + at, index + at);
      if (!in_range(squares[r], task.book.metric)) score[at] = -kInfinity;
    }
  }
}

// ---- D <= 8: rows in lanes, codes broadcast ------------------------------------------------

// The code of `panel` that scores exactly `best` for one row, the first of equals.
inline int64_t find_in_panel(const float* panel, const float* row, int64_t row_stride,
                             int64_t dim, float best) {
  alignas(64) float scores[kPanelWidth];
  for (int v = 0; v < kVectors; ++v) {
    vf sum = load(panel + v * kLanes);
    for (int64_t d = 0; d < dim; ++d) {
      sum = multiply_add(load(panel + (d + 1) * kPanelWidth + v * kLanes),
                         splat(row[d * row_stride]), sum);
    }
    store(scores + v * kLanes, sum);
  }
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    if (scores[lane] == best) return lane;
  }
  return -1;
}

template <int D, int V>
void scan_small(const float* tile, const float* panels, int32_t first_panel, int64_t count,
                float* best, int32_t* panel_of_best) {
  constexpr int kRows = kLanes * V;
  vf x[V][D], score[V];
  vi label[V];
  for (int v = 0; v < V; ++v) {
    for (int d = 0; d < D; ++d) x[v][d] = load(tile + d * kRows + v * kLanes);
    score[v] = load(best + v * kLanes);
    label[v] = load(panel_of_best + v * kLanes);
  }
  const float* panel = panels;
  for (int64_t p = 0; p < count; ++p, panel += panel_words(D)) {
    vf least[V];
    for (int v = 0; v < V; ++v) least[v] = splat(kInfinity);
    for (int code = 0; code < kPanelWidth; ++code) {
      vf sums[V];
      for (int v = 0; v < V; ++v) sums[v] = splat(panel[code]);
      for (int d = 0; d < D; ++d) {
        const vf element = splat(panel[(d + 1) * kPanelWidth + code]);
        for (int v = 0; v < V; ++v) sums[v] = multiply_add(element, x[v][d], sums[v]);
      }
      for (int v = 0; v < V; ++v) least[v] = minimum(sums[v], least[v]);
    }
    const vi here = splat(int32_t(first_panel + p));
    for (int v = 0; v < V; ++v) keep_smaller(least[v], here, score[v], label[v]);
  }
  for (int v = 0; v < V; ++v) {
    store(best + v * kLanes, score[v]);
    store(panel_of_best + v * kLanes, label[v]);
  }
}

template <int D>
void nearest_small_dim(const NearestTask& task, float* score, int64_t* index) {
#if defined(__AVX512F__)
  constexpr int V = D <= 4 ? 4 : 2;
#else
  constexpr int V = D <= 4 ? 2 : 1;
#endif
  constexpr int64_t kRows = kLanes * V;
  constexpr int64_t kTiles = 1024 / kRows;
  const Frame& frame = *reinterpret_cast<const Frame*>(task.frame);
  const int64_t block = panels_per_block(D);
  const int64_t buffer_words = task.book.packed ? 0 : block * panel_words(D);
  Scratch scratch(kTiles * kRows * (D + 3) + buffer_words);
  float* tiles = scratch.take<float>(kTiles * kRows * D);
  float* squares = scratch.take<float>(kTiles * kRows);
  float* best = scratch.take<float>(kTiles * kRows);
  int32_t* panel_of_best = scratch.take<int32_t>(kTiles * kRows);
  float* buffer = scratch.take<float>(buffer_words);

  for (int64_t chunk = task.row_begin; chunk < task.row_end; chunk += kTiles * kRows) {
    const int64_t rows = std::min(kTiles * kRows, task.row_end - chunk);
    for (int64_t r = 0; r < rows; r += kRows) {
      load_tile<kRows>(task.x, chunk + r, std::min(kRows, rows - r), frame, tiles + r * D,
                       squares + r);
    }
    std::fill(best, best + kTiles * kRows, kInfinity);
    std::fill(panel_of_best, panel_of_best + kTiles * kRows, -1);
    std::fill(index + chunk - task.row_begin, index + chunk - task.row_begin + rows, -1);
    for (int64_t begin = task.panel_begin; begin < task.panel_end; begin += block) {
      const int64_t end = std::min(begin + block, task.panel_end);
      const float* panels = block_panels(task, begin, end, buffer);
      for (int64_t r = 0; r < rows; r += kRows) {
        scan_small<D, V>(tiles + r * D, panels, int32_t(begin), end - begin, best + r,
                         panel_of_best + r);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t panel = panel_of_best[r];
        if (panel < begin) continue;
        const float* row = tiles + r / kRows * kRows * D + r % kRows;
        index[chunk + r - task.row_begin] =
            panel * kPanelWidth +
            find_in_panel(panels + (panel - begin) * panel_words(D), row, kRows, D, best[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const bool ranked = in_range(squares[r], task.book.metric);
      score[chunk + r - task.row_begin] = ranked ? best[r] : -kInfinity;
    }
  }
}

inline void nearest_code(const NearestTask& task, float* score, int64_t* index) {
  switch (task.x.width) {
    case 1:
      return nearest_small_dim<1>(task, score, index);
    case 2:
      return nearest_small_dim<2>(task, score, index);
    case 3:
      return nearest_small_dim<3>(task, score, index);
    case 4:
      return nearest_small_dim<4>(task, score, index);
    case 5:
      return nearest_small_dim<5>(task, score, index);
    case 6:
      return nearest_small_dim<6>(task, score, index);
    case 7:
      return nearest_small_dim<7>(task, score, index);
    case kLargestSmallDim:
      return nearest_small_dim<8>(task, score, index);
    default:
      return nearest_large_dim(task, score, index);
  }
}

// ---- rows that fp32 cannot decide ----------------------------------------------------------

template <typename X, typename C>
int64_t nearest_in_float64(const Rows& x, const Rows& codes, Metric metric, int64_t row) {
  const X* a = static_cast<const X*>(x.data) + x.offset(row);
  for (int64_t d = 0; d < x.width; ++d) {
    if (!std::isfinite(to_float(a[d * x.col_stride]))) return -1;
  }
  double best = std::numeric_limits<double>::infinity();
  int64_t found = -1;
  for (int64_t code = 0; code < codes.count; ++code) {
    const C* b = static_cast<const C*>(codes.data) + codes.offset(code);
    double distance = 0, product = 0, square = 0;
    bool finite = true;
    for (int64_t d = 0; d < x.width; ++d) {
      const float element = to_float(b[d * codes.col_stride]);
      const double from = to_float(a[d * x.col_stride]), to = element;
      finite &= std::isfinite(element);
      distance += (from - to) * (from - to);
      product += from * to;
      square += to * to;
    }
    const double similarity =
        metric == Metric::dot ? product : square > 0 ? product / std::sqrt(square) : 0.0;
    const double score = metric == Metric::l2 ? distance : -similarity;
    if (finite && score < best) {
      best = score;
      found = code;
    }
  }
  return found;
}

inline void settle_rows(const NearestTask& task, const float* score, int64_t* index) {
  dispatch(task.x.dtype, [&](auto* x_type) {
    dispatch(task.book.codes.dtype, [&](auto* code_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using C = std::remove_pointer_t<decltype(code_type)>;
      for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        if (!std::isfinite(score[row - task.row_begin])) {
          index[row - task.row_begin] =
              nearest_in_float64<X, C>(task.x, task.book.codes, task.book.metric, row);
        }
      }
    });
  });
}

}  // namespace
}  // namespace vqkernels
