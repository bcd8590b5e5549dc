// The fp32 screen: scores of R rows against panels of codes, in registers.
//
// N K D multiply-adds; the epilogue is one minimum a vector of scores and one store a group. Each
// sum is one chain over d in ascending order whatever the tile's shape.
#pragma once

#include "candidates.h"

namespace vqkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(VQKERNELS_NEON) || defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif

// Rows [begin, begin + count) as x' = (x - centre) * scale in [dim][R], zeros past count, and
// |x'|^2 of each. A NaN or an infinity makes its row's square NaN or infinite.
template <int R>
void load_tile(const Rows& rows, int64_t begin, int64_t count, const Frame& frame, float* tile,
               float* squares) {
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

// One framed row, contiguous, padded with zeros to whole vectors of 16; returns |x'|^2.
inline float load_framed_row(const Rows& rows, int64_t index, const Frame& frame, float* row) {
  const float* centre = frame.centre();
  const float scale = frame.scale;
  dispatch(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(rows.data) + rows.offset(index);
    if (rows.col_stride == 1) {
      for (int64_t d = 0; d < rows.width; ++d) row[d] = (to_float(from[d]) - centre[d]) * scale;
    } else {
      for (int64_t d = 0; d < rows.width; ++d) {
        row[d] = (to_float(from[d * rows.col_stride]) - centre[d]) * scale;
      }
    }
  });
  const int64_t padded = round_up(rows.width, 16);
  for (int64_t d = rows.width; d < padded; ++d) row[d] = 0;
  float parts[16] = {};
  for (int64_t d = 0; d < padded; d += 16) {
    for (int i = 0; i < 16; ++i) parts[i] += row[d + i] * row[d + i];
  }
  float square = 0;
  for (float part : parts) square += part;
  return square;
}

// P panels at once. least: [panel][R][kLanes].
template <int R, int P>
void score_panels(const float* tile, const float* panels, int64_t dim, int64_t count,
                  float* least) {
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
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) {
        vf group = sums[r][p * kVectors];
        for (int v = 1; v < kVectors; ++v) group = minimum(group, sums[r][p * kVectors + v]);
        store(least + ((panel + p) * R + r) * kLanes, group);
      }
    }
  }
}

// R rows by as many panels at once as keep the multiply-add units busy.
template <int R>
void score_tile(const float* tile, const float* panels, int64_t dim, int64_t count, float* least) {
  constexpr int kAtOnce = R == 1 ? 8 / kVectors : R <= 4 && kLanes == 16 ? 2 : 1;
  const int64_t whole = count / kAtOnce * kAtOnce;
  score_panels<R, kAtOnce>(tile, panels, dim, whole, least);
  if (whole < count) {
    score_panels<R, 1>(tile, panels + whole * panel_words(dim), dim, count - whole,
                       least + whole * R * kLanes);
  }
}

// The narrowest tile that holds `rows` rows.
struct TileShape {
  int rows;
  void (*load)(const Rows&, int64_t, int64_t, const Frame&, float*, float*);
  void (*score)(const float*, const float*, int64_t, int64_t, float*);
};

template <int R>
constexpr TileShape kTileShape = {R, load_tile<R>, score_tile<R>};

inline const TileShape& tile_for(int64_t rows) {
  if (rows == 1) return kTileShape<1>;
  if (rows <= 3) return kTileShape<3>;
#if defined(__AVX512F__)
  if (rows <= 8) return kTileShape<8>;
#endif
  return kTileShape<kTileRows>;
}

}  // namespace
}  // namespace vqkernels
