// From approximate scores to the exact answer.
//
// A screen computes scores with a known error: |approximate - exact| <= E for every code of a
// panel. With U an upper bound of the row's smallest exact score, a code can only be the answer if
// approximate - E <= U. Those few are scored in float64, lowest bound first, and every exact score
// lowers U. So whatever screens, the answer is the float64 minimum, and of equal codes the first.
//
// The exact score is sum_d c'_d (c'_d / 2 - x'_d) for l2 (half the squared distance, less
// |x'|^2 / 2), -x.c for dot, -x.c / |c| for cosine, all in float64 from the original numbers.
#pragma once

#include "codebook_panels.h"

namespace vqkernels {
namespace {

constexpr int kListed = 24;

struct Candidate {
  float lower;
  int32_t code;  // the first of a group: code, code + kLanes, ... of one panel
};

struct RowSearch {
  float upper;
  int32_t listed;
  double score;
  int64_t index;
  Candidate list[kListed];

  void reset() {
    upper = kInfinity;
    listed = 0;
    score = std::numeric_limits<double>::infinity();
    index = -1;
  }

  bool better(double other, int64_t code) const {
    return other < score || (other == score && code < index);
  }
};

// One row against the book in float64.
class ExactRow {
 public:
  // `x` and `code` are scratch of one row each.
  ExactRow(const NearestTask& task, double* x, double* centre)
      : task_(task), frame_(*reinterpret_cast<const Frame*>(task.frame)), x_(x), centre_(centre) {
    for (int64_t d = 0; d < width(); ++d) centre_[d] = frame_.centre()[d];
    unit_ = double(frame_.scale) * frame_.scale;
  }

  void load(int64_t row) {
    if (row == row_) return;
    row_ = row;
    dispatch(task_.x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* from = static_cast<const T*>(task_.x.data) + task_.x.offset(row);
      const int64_t stride = task_.x.col_stride;
      if (stride == 1) {
        for (int64_t d = 0; d < width(); ++d) x_[d] = double(to_float(from[d])) - centre_[d];
      } else {
        for (int64_t d = 0; d < width(); ++d) {
          x_[d] = double(to_float(from[d * stride])) - centre_[d];
        }
      }
    });
  }

  // What a screen multiplied the row by, beyond the frame; its scores are larger by as much.
  void set_screen_scale(float scale) { screen_scale_ = scale; }
  double screen_scale() const { return screen_scale_; }

  int64_t codebook_size() const { return task_.book.codes.count; }

  // The exact score in units of the frame, or +infinity if the code is not finite.
  double score(int64_t code) const {
    return dispatch(task_.book.codes.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const Rows& codes = task_.book.codes;
      const T* c = static_cast<const T*>(codes.data) + codes.offset(code);
      return codes.col_stride == 1 ? sum<T, true>(c, 1) : sum<T, false>(c, codes.col_stride);
    });
  }

  // The answer for a row whose scores fp32 cannot hold: every code in float64. To a zero row all
  // codes are equally similar, so the first will do.
  void search_all(int64_t row, RowSearch* result) {
    result->reset();
    load(row);
    bool finite = true, zero = task_.book.metric != Metric::l2;
    for (int64_t d = 0; d < width(); ++d) {
      finite &= std::isfinite(x_[d]);
      zero &= x_[d] == 0;
    }
    if (!finite) return;
    for (int64_t code = 0; code < task_.book.codes.count; ++code) {
      const double exact = score(code);
      if (exact < result->score) {
        result->score = exact;
        result->index = code;
        if (zero) return;
      }
    }
  }

 private:
  int64_t width() const { return task_.x.width; }

  template <typename T, bool kContiguous>
  double sum(const T* c, int64_t stride) const {
    constexpr int kParts = 16;
    const bool l2 = task_.book.metric == Metric::l2;
    const double half = l2 ? 0.5 : 0.0;
    double total = 0, squares = 0;
    int64_t d = 0;
    if (width() >= kParts) {
      double products[kParts] = {};
      for (; d + kParts <= width(); d += kParts) {
        for (int i = 0; i < kParts; ++i) {
          const double element =
              double(to_float(c[kContiguous ? d + i : (d + i) * stride])) - centre_[d + i];
          products[i] += element * (half * element - x_[d + i]);
        }
      }
      for (double part : products) total += part;
    }
    for (; d < width(); ++d) {
      const double element = double(to_float(c[kContiguous ? d : d * stride])) - centre_[d];
      total += element * (half * element - x_[d]);
    }
    if (!l2) {
      for (d = 0; d < width(); ++d) {
        const double element = to_float(c[kContiguous ? d : d * stride]);
        squares += element * element;
      }
      if (task_.book.metric == Metric::cosine) {
        total = squares > 0 ? total / std::sqrt(squares) : 0.0;
      }
      if (!std::isfinite(squares)) total = std::numeric_limits<double>::infinity();
    }
    return std::isfinite(total) ? total * unit_ : std::numeric_limits<double>::infinity();
  }

  const NearestTask& task_;
  const Frame& frame_;
  double* x_;
  double* centre_;
  double unit_ = 1, screen_scale_ = 1;
  int64_t row_ = -1;
};

// Scores the listed groups exactly, lowest bound first, until no other can win. `ids` names the
// code at each position of the panels; null where panels are in the book's order.
inline int64_t settle(RowSearch* row, ExactRow* exact, int64_t x_row, const int32_t* ids) {
  int64_t scored = 0;
  while (row->listed > 0) {
    int lowest = 0;
    for (int i = 1; i < row->listed; ++i) {
      if (row->list[i].lower < row->list[lowest].lower) lowest = i;
    }
    const Candidate candidate = row->list[lowest];
    row->list[lowest] = row->list[--row->listed];
    if (!(candidate.lower <= row->upper)) break;
    exact->load(x_row);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t position = candidate.code + v * kLanes;
      if (position >= exact->codebook_size()) break;
      const int64_t code = ids == nullptr ? position : ids[position];
      const double score = exact->score(code);
      ++scored;
      if (row->better(score, code)) {
        row->score = score;
        row->index = code;
        const float rounded = float(score * exact->screen_scale());
        row->upper = std::min(row->upper, rounded + std::fabs(rounded) * 0x1p-22f);
      }
    }
  }
  row->listed = 0;
  return scored;
}

// Drops what can no longer win; scores everything if that makes no room.
inline int64_t make_room(RowSearch* row, ExactRow* exact, int64_t x_row, const int32_t* ids) {
  int kept = 0;
  for (int i = 0; i < row->listed; ++i) {
    if (row->list[i].lower <= row->upper) row->list[kept++] = row->list[i];
  }
  row->listed = kept;
  return kept < kListed ? 0 : settle(row, exact, x_row, ids);
}

// How far a row's approximate scores in a panel may be from the exact ones:
// per_code * |c'| + per_square * |c'|^2 + per_error * |c' - screened c'|, at the panel's largest.
struct RowError {
  float per_code, per_square, per_error;
};

// Relative error of a sum of `dim` rounded products, of the rounding of x', c' and |c'|^2, and of
// the comparisons that follow.
inline float rounding(int64_t dim) { return float(dim * kRoundings + 16) * 0x1p-24f; }

// errors[p] for `panels` panels; room for a whole number of vectors.
inline void panel_errors(const RowError& row, const PanelBounds& bounds, int64_t panels,
                         float* errors) {
  for (int64_t p = 0; p < panels; p += kLanes) {
    const vf code = load(bounds.code + p), error = load(bounds.error + p);
    const vf sum =
        code * (splat(row.per_code) + code * splat(row.per_square)) + error * splat(row.per_error);
    store(errors + p, sum + splat(1e-30f));
  }
}

// Lists the groups of one row that may hold the answer. `least` holds, for every panel, the least
// approximate score of each lane's group, `stride` floats from one panel to the next.
inline int64_t list_candidates(const float* least, int64_t stride, const float* errors,
                               int64_t panels, int64_t first_panel, int64_t x_row,
                               const int32_t* ids, RowSearch* row, ExactRow* exact) {
  vf upper = splat(kInfinity), lowest = splat(kInfinity);
  for (int64_t p = 0; p < panels; ++p) {
    const vf scores = load(least + p * stride), error = splat(errors[p]);
    upper = minimum(upper, scores + error);
    lowest = minimum(lowest, scores - error);
  }
  if (lanes_not_above(lowest, splat(row->upper)) == 0) return 0;
  row->upper = std::min(row->upper, smallest(upper));
  int64_t scored = 0;
  vf bound = splat(row->upper);
  for (int64_t p = 0; p < panels; ++p) {
    const vf lower = load(least + p * stride) - splat(errors[p]);
    uint32_t hits = lanes_not_above(lower, bound);
    while (hits != 0) {
      const int lane = __builtin_ctz(hits);
      hits &= hits - 1;
      if (row->listed == kListed) {
        scored += make_room(row, exact, x_row, ids);
        bound = splat(row->upper);
      }
      row->list[row->listed++] = {lower[lane], int32_t((first_panel + p) * kPanelWidth + lane)};
    }
  }
  return scored;
}

}  // namespace
}  // namespace vqkernels
