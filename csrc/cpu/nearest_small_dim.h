// Nearest code for D <= 8: rows in lanes, codes broadcast.
//
// There a tile's epilogue would cost as much as its products. Here one code costs D multiply-adds
// and one minimum a vector of rows; per panel the least score and the second least panel are kept.
// If no other panel can hold the answer, scoring the winning panel once more finds it; otherwise
// all panels are listed for the row.
#pragma once

#include "score_tiles.h"

namespace vqkernels {
namespace {

constexpr int64_t kLargestSmallDim = 8;

// Least score a row over the block's panels, its panel, and the least of all other panels.
struct LaneBest {
  float* least;
  float* second;
  float* panel;
};

template <int D, int V>
void score_lanes(const float* tile, const float* panels, int64_t count, const LaneBest& best) {
  constexpr int kRows = kLanes * V;
  vf x[V][D], least[V], second[V], label[V];
  for (int v = 0; v < V; ++v) {
    for (int d = 0; d < D; ++d) x[v][d] = load(tile + d * kRows + v * kLanes);
    least[v] = load(best.least + v * kLanes);
    second[v] = load(best.second + v * kLanes);
    label[v] = load(best.panel + v * kLanes);
  }
  const float* panel = panels;
  for (int64_t p = 0; p < count; ++p, panel += panel_words(D)) {
    vf here[V];
    for (int v = 0; v < V; ++v) here[v] = splat(kInfinity);
    for (int code = 0; code < kPanelWidth; ++code) {
      vf sums[V];
      for (int v = 0; v < V; ++v) sums[v] = splat(panel[code]);
      for (int d = 0; d < D; ++d) {
        const vf element = splat(panel[(d + 1) * kPanelWidth + code]);
        for (int v = 0; v < V; ++v) sums[v] = multiply_add(element, x[v][d], sums[v]);
      }
      for (int v = 0; v < V; ++v) here[v] = minimum(sums[v], here[v]);
    }
    const vf number = splat(float(p));
    for (int v = 0; v < V; ++v) {
      second[v] = minimum(second[v], maximum(least[v], here[v]));
      label[v] = here[v] < least[v] ? number : label[v];
      least[v] = minimum(here[v], least[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    store(best.least + v * kLanes, least[v]);
    store(best.second + v * kLanes, second[v]);
    store(best.panel + v * kLanes, label[v]);
  }
}

}  // namespace
}  // namespace vqkernels
