// Nearest code for D <= kTreeDim in a large book: most of the book need not be looked at.
//
// Codes are ordered by a k-d tree (median splits of the widest side), so that a panel holds
// neighbours. Each panel, and each super of 16 panels, has a bounding box. For a row x' and a box,
//
//   start - x'.c' >= dist(x', box)^2 / 2 - |x'|^2 / 2 - slack
//
// with slack 0 for l2 and half the panel's largest |c'|^2 for dot and cosine (where x' is scaled
// to the length of a typical code, which changes no ranking and makes the bound tight). Panels
// whose bound exceeds the row's best are skipped; the others are scored as everywhere.
#pragma once

#include <memory>
#include <numeric>

#include "score_tiles.h"

namespace vqkernels {
namespace {

constexpr int64_t kSuper = 16;  // panels a super, and lanes of boxes that lie together

// The tree section of a packed book (see `packed_book.h`), boxes in groups of 16:
// lo of each dimension, hi of each dimension, slack.
struct Tree {
  int32_t* ids;   // code at each position
  float* panels;  // boxes of the panels
  float* supers;  // boxes of the supers

  static int64_t group_words(int64_t dim) { return kSuper * (2 * dim + 1); }

  static Tree of(const float* packed, const PackedLayout& layout) {
    float* ids = const_cast<float*>(packed) + layout.tree;
    return {reinterpret_cast<int32_t*>(ids), ids + layout.tree_ids,
            ids + layout.tree_ids + layout.tree_panels};
  }
};

struct BoxLane {
  float* group;
  int64_t dim, lane;

  BoxLane(float* boxes, int64_t width, int64_t index)
      : group(boxes + index / kSuper * Tree::group_words(width)),
        dim(width),
        lane(index % kSuper) {}
  float& lo(int64_t d) { return group[d * kSuper + lane]; }
  float& hi(int64_t d) { return group[(dim + d) * kSuper + lane]; }
  float& slack() { return group[2 * dim * kSuper + lane]; }

  void clear() {
    for (int64_t d = 0; d < dim; ++d) lo(d) = kInfinity, hi(d) = -kInfinity;
    slack() = 0;
  }
  void include(BoxLane other) {
    for (int64_t d = 0; d < dim; ++d) {
      lo(d) = std::min(lo(d), other.lo(d));
      hi(d) = std::max(hi(d), other.hi(d));
    }
    slack() = std::max(slack(), other.slack());
  }
};

// Orders framed codes so that every panel and every super holds neighbours: median splits of the
// widest side, on borders of supers while there are several, then of panels. Codes and ids move
// together, so that every pass over a part runs through memory in order.
class Splitter {
 public:
  Splitter(float* codes, int32_t* ids, int64_t count, int64_t dim)
      : codes_(codes),
        ids_(ids),
        dim_(dim),
        keys_(std::make_unique<Key[]>(count)),
        moved_codes_(std::make_unique<float[]>(count * dim)),
        moved_ids_(std::make_unique<int32_t[]>(count)) {}

  void split(int64_t begin, int64_t end) {
    if (end - begin <= kPanelWidth) return;
    const int64_t unit = end - begin > kSuper * kPanelWidth ? kSuper * kPanelWidth : kPanelWidth;
    const int64_t units = (end - begin + unit - 1) / unit;
    const int64_t middle = begin + (units + 1) / 2 * unit;
    const int64_t side = widest(begin, end);
    for (int64_t i = begin; i < end; ++i) keys_[i] = {codes_[i * dim_ + side], int32_t(i)};
    std::nth_element(&keys_[begin], &keys_[middle], &keys_[end],
                     [](const Key& a, const Key& b) { return a.value < b.value; });
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = keys_[i].from;
      moved_ids_[i] = ids_[from];
      std::copy(codes_ + from * dim_, codes_ + (from + 1) * dim_, &moved_codes_[i * dim_]);
    }
    std::copy(&moved_ids_[begin], &moved_ids_[end], ids_ + begin);
    std::copy(&moved_codes_[begin * dim_], &moved_codes_[end * dim_], codes_ + begin * dim_);
    split(begin, middle);
    split(middle, end);
  }

 private:
  struct Key {
    float value;
    int32_t from;
  };

  int64_t widest(int64_t begin, int64_t end) const {
    float lo[kTreeDim], hi[kTreeDim];
    std::fill(lo, lo + kTreeDim, kInfinity);
    std::fill(hi, hi + kTreeDim, -kInfinity);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t d = 0; d < dim_; ++d) {
        const float element = codes_[i * dim_ + d];
        lo[d] = element < lo[d] ? element : lo[d];
        hi[d] = element > hi[d] ? element : hi[d];
      }
    }
    int64_t side = 0;
    for (int64_t d = 1; d < dim_; ++d) {
      if (hi[d] - lo[d] > hi[side] - lo[side]) side = d;
    }
    return side;
  }

  float* codes_;
  int32_t* ids_;
  int64_t dim_;
  std::unique_ptr<Key[]> keys_;
  std::unique_ptr<float[]> moved_codes_;
  std::unique_ptr<int32_t[]> moved_ids_;
};

// The codes' order in a packed book, or null if its panels follow the book.
inline const int32_t* panel_order(const NearestTask& task) {
  const bool ordered =
      task.packed != nullptr && reinterpret_cast<const Frame*>(task.packed)->ordered != 0;
  if (!ordered) return nullptr;
  return Tree::of(task.packed, PackedLayout(task.book.codes.count, task.book.codes.width)).ids;
}

// Order, panels, boxes and supers of a whole book.
inline void pack_tree(const Codebook& book, float* packed) {
  const int64_t count = book.codes.count, dim = book.codes.width;
  const PackedLayout layout(count, dim);
  Frame& frame = *reinterpret_cast<Frame*>(packed);
  frame.ordered = 1;
  const Tree tree = Tree::of(packed, layout);
  const int64_t panels = (count + kPanelWidth - 1) / kPanelWidth;
  const int64_t supers = (panels + kSuper - 1) / kSuper;

  auto codes = std::make_unique<float[]>(count * dim);
  auto starts = std::make_unique<float[]>(count);
  auto norms = std::make_unique<float[]>(count);
  dispatch(book.codes.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    float row[16];
    for (int64_t code = 0; code < count; ++code) {
      starts[code] = read_code<T>(book, frame, code, row, &norms[code]);
      std::copy(row, row + dim, codes.get() + code * dim);
    }
  });
  for_each_duplicate(book.codes, [&](int64_t code) { starts[code] = kInfinity; });
  std::iota(tree.ids, tree.ids + count, 0);
  Splitter(codes.get(), tree.ids, count, dim).split(0, count);

  for (int64_t index = 0; index < round_up(panels, kSuper); ++index) {
    BoxLane(tree.panels, dim, index).clear();
  }
  for (int64_t index = 0; index < round_up(supers, kSuper); ++index) {
    BoxLane(tree.supers, dim, index).clear();
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    float* out = packed + layout.panels + panel * panel_words(dim);
    BoxLane box(tree.panels, dim, panel);
    float largest = 0;
    bool any_huge = false;
    for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
      const int64_t position = panel * kPanelWidth + lane;
      const int32_t code = position < count ? tree.ids[position] : -1;
      out[lane] = code < 0 ? kInfinity : starts[code];
      for (int64_t d = 0; d < dim; ++d) {
        const float element = code < 0 ? 0.0f : codes[position * dim + d];
        out[(d + 1) * kPanelWidth + lane] = -element;
        if (out[lane] == kInfinity) continue;
        const bool huge = out[lane] == -kInfinity;
        any_huge |= huge;
        box.lo(d) = std::min(box.lo(d), huge ? -kInfinity : element);
        box.hi(d) = std::max(box.hi(d), huge ? kInfinity : element);
      }
      if (out[lane] < kInfinity) largest = std::max(largest, norms[code]);
    }
    packed[layout.bounds + panel] = largest;
    packed[layout.bounds + layout.bound_stride + panel] = 0;
    if (book.metric != Metric::l2) {
      box.slack() = any_huge ? kInfinity : 0.5f * largest * largest;
    }
    BoxLane(tree.supers, dim, panel / kSuper).include(box);
  }
}

// Lower bounds of the scores in 16 boxes, less |x'|^2 / 2. An empty box gives +infinity.
template <int D>
inline void box_bounds(const float* group, const float* x, float* bounds) {
  for (int64_t v = 0; v < kSuper; v += kLanes) {
    vf sum = splat(0.0f);
    for (int d = 0; d < D; ++d) {
      const vf at = splat(x[d]);
      const vf below = load(group + d * kSuper + v) - at;
      const vf above = at - load(group + (D + d) * kSuper + v);
      const vf outside = maximum(maximum(below, above), splat(0.0f));
      sum = multiply_add(outside, outside, sum);
    }
    store(bounds + v, sum * splat(0.5f) - load(group + 2 * D * kSuper + v));
  }
}

// What a row's traversal needs beside the tree.
struct TreeRow {
  const float* x;
  float offset;  // |x'|^2 / 2 and the rounding of a bound
  int64_t row;
};

template <int D>
class TreeSearch {
 public:
  TreeSearch(const NearestTask& task, ExactRow* exact)
      : task_(task),
        layout_(task.book.codes.count, D),
        tree_(Tree::of(task.packed, layout_)),
        bounds_(task.packed + layout_.bounds),
        panels_((task.book.codes.count + kPanelWidth - 1) / kPanelWidth),
        supers_((panels_ + kSuper - 1) / kSuper),
        exact_(exact) {
    largest_ = *std::max_element(bounds_, bounds_ + panels_);
  }

  float largest() const { return largest_; }
  int64_t super_words() const { return round_up(supers_, kSuper); }

  // Lists and scores what the row needs; returns how many codes were looked at.
  int64_t run(const TreeRow& row, float error, float* super_bounds, RowSearch* search) {
    for (int64_t group = 0; group < supers_; group += kSuper) {
      box_bounds<D>(tree_.supers + group / kSuper * Tree::group_words(D), row.x,
                    super_bounds + group);
    }
    const int64_t nearest = std::min_element(super_bounds, super_bounds + supers_) - super_bounds;
    int64_t looked = visit(nearest, row, error, search);
    for (int64_t super = 0; super < supers_; ++super) {
      if (super != nearest && !(super_bounds[super] - row.offset > search->upper)) {
        looked += visit(super, row, error, search);
      }
    }
    return looked;
  }

 private:
  int64_t visit(int64_t super, const TreeRow& row, float error, RowSearch* search) {
    alignas(64) float bounds[kSuper], least[kLanes];
    box_bounds<D>(tree_.panels + super * Tree::group_words(D), row.x, bounds);
    const int64_t first = super * kSuper, count = std::min(kSuper, panels_ - first);
    const int64_t nearest = std::min_element(bounds, bounds + count) - bounds;
    int64_t looked = kSuper;
    for (int64_t i = 0; i < count; ++i) {
      // The nearest panel first: it lowers `upper` for the others.
      const int64_t at = i == 0 ? nearest : i <= nearest ? i - 1 : i;
      if (bounds[at] - row.offset > search->upper) continue;
      const int64_t panel = first + at;
      score_tile<1>(row.x, task_.packed + layout_.panels + panel * panel_words(D), D, 1, least);
      list_candidates(least, kLanes, &error, 1, panel, row.row, tree_.ids, search, exact_);
      looked += kPanelWidth;
    }
    return looked;
  }

  const NearestTask& task_;
  PackedLayout layout_;
  Tree tree_;
  const float* bounds_;
  int64_t panels_, supers_;
  ExactRow* exact_;
  float largest_ = 0;
};

}  // namespace
}  // namespace vqkernels
