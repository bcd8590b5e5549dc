// Attention of one head: blocks of keys packed once, tiles of queries against them, softmax online.
//
// Operations: 2 N M (d + e) multiply-adds' flops in bf16 pairs or fp32, and for each of the N M
// scores about 12 for the exponential. Bytes: K and V packed once a task, in blocks that stay in
// L2; the scores of a tile stay in L1.
#pragma once

#include "attention_dropout.h"
#include "attention_pack.h"
#include "scratch.h"

namespace vqkernels {
namespace {

constexpr int64_t kKeyBlock = 512;
constexpr int64_t kQueryTile = 2 * kProductRows;

inline int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// No score of a row is above |q| |k| scale, none below its negative. Where twice that is less than
// this many powers of two, the bound serves in place of the largest score and no weight is lost.
constexpr float kNarrow = 100.0f;

template <typename Words>
class AttentionHead {
 public:
  explicit AttentionHead(const AttentionTask& task)
      : task_(task),
        queries_(task.query_end - task.query_begin),
        block_(std::clamp<int64_t>(whole_lanes(task.keys), kLanes, kKeyBlock)),
        dim_words_(words_of<Words>(task.dim)),
        key_words_(words_of<Words>(block_)),
        value_floats_(whole_lanes(task.value_dim)),
        kept_(task.keys > block_ ? queries_ : kQueryTile),
        scratch_(Panels::floats(block_, dim_words_) + Panels::floats(task.value_dim, key_words_) +
                 kQueryTile * (dim_words_ + block_ + key_words_) + kept_ * (value_floats_ + 2)),
        k_(scratch_.take<float>(Panels::floats(block_, dim_words_))),
        v_(scratch_.take<float>(Panels::floats(task.value_dim, key_words_))),
        q_words_(scratch_.take<Word>(kQueryTile * dim_words_)),
        scores_(scratch_.take<float>(kQueryTile * block_)),
        weights_(scratch_.take<Word>(kQueryTile * key_words_)),
        sums_(scratch_.take<float>(kept_ * value_floats_)),
        most_(scratch_.take<float>(kept_)),
        total_(scratch_.take<float>(kept_)) {}

  void run() {
    for (key_ = 0; key_ < task_.keys || key_ == 0; key_ += block_) {
      keys_ = std::min(block_, task_.keys - key_);
      if (task_.causal && key_ > task_.query_end - 1) keys_ = 0;
      pack_keys();
      const bool last = key_ + block_ >= task_.keys;
      for (int64_t tile = 0; tile < queries_; tile += kQueryTile) {
        const int64_t rows = std::min<int64_t>(kQueryTile, queries_ - tile);
        const int64_t query = task_.query_begin + tile, at = kept_ == queries_ ? tile : 0;
        if (key_ == 0) start(rows, at);
        const bool hidden = task_.causal && key_ > query + rows - 1;
        if (!hidden && keys_ > 0) add_block(query, rows, at);
        if (last) finish(query, rows, at);
      }
    }
  }

 private:
  using Word = typename Words::Word;

  void pack_keys() {
    if (keys_ == 0) return;
    prefetch_rows(task_.dtype, task_.v, key_, keys_, task_.value_dim);
    pack_transposed<Words>(task_.dtype, task_.k, key_, keys_, task_.dim, k_panels());
    pack_straight<Words>(task_.dtype, task_.v, key_, keys_, task_.value_dim, v_panels());
    largest_key_ = largest_column_norm<Words>(k_panels());
  }

  Panels k_panels() const { return Panels(k_, whole_lanes(keys_), dim_words_); }
  Panels v_panels() const { return Panels(v_, task_.value_dim, words_of<Words>(keys_)); }

  // The first block of keys, which no query is hidden from, sets the sums; the others add to them.
  void start(int64_t rows, int64_t at) {
    std::fill(most_ + at, most_ + at + rows, -INFINITY);
    std::fill(total_ + at, total_ + at + rows, 0.0f);
    if (keys_ > 0) return;
    std::fill(sums_ + at * value_floats_, sums_ + (at + rows) * value_floats_, 0.0f);
  }

  // Folds this block of keys into the sums of `rows` queries.
  void add_block(int64_t query, int64_t rows, int64_t at) {
    const int64_t next = std::min<int64_t>(kQueryTile, task_.query_end - query - rows);
    prefetch_rows(task_.dtype, task_.q, query + rows, next, task_.dim);
    prefetch_rows<1>(task_.dtype, task_.out, query, rows, task_.value_dim);
    const float factor = task_.scale * kLog2E;
    const bool masked =
        task_.mask_kind != MaskKind::none || (task_.causal && key_ + keys_ - 1 > query);
    const int64_t width = whole_lanes(keys_);
    float norms[kQueryTile] = {};
    if (!masked) row_norms(task_.dtype, task_.q, query, rows, task_.dim, norms);
    int64_t apart = dim_words_;
    const Word* left = rows_as_words<Words>(task_.dtype, task_.q, query, task_.dim, &apart);
    if (left == nullptr) {
      pack_left<Words>(task_.dtype, task_.q, query, rows, task_.dim, q_words_);
      left = q_words_;
    }
    multiply<Words>({left, apart, scores_, block_, false}, rows, k_panels());
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = scores_ + r * block_;
      const float bound = std::ceil(norms[r] * largest_key_ * std::fabs(factor) * 1.001f);
      const bool narrow = !masked && 2 * bound < kNarrow;
      float most = bound;
      if (!narrow) {
        for (int64_t i = 0; i < width; i += kLanes) {
          store(scores + i, load(scores + i) * splat(factor));
        }
        if (masked) add_mask(task_, query + r, key_, false, keys_, scores);
        most = std::ceil(largest_of(scores));
      }
      const float shift = shifted(at + r, most), slope = narrow ? factor : 1.0f;
      Word* const words = weights_ + r * key_words_;
      total_[at + r] += narrow && bound + shift < kNarrow
                            ? exponentials<true>(scores, slope, shift, words)
                            : exponentials<false>(scores, slope, shift, words);
      if (task_.drop_below > 0) drop_keys(task_, query + r, key_, keys_, words);
    }
    multiply<Words>({weights_, key_words_, sums_ + at * value_floats_, value_floats_, key_ > 0},
                    rows, v_panels());
  }

  // Of this block's scaled scores; a NaN among them may be passed over, and its weight will not.
  float largest_of(float* scores) const {
    std::fill(scores + keys_, scores + whole_lanes(keys_), -INFINITY);
    vf most = splat(-INFINITY);
    for (int64_t i = 0; i < whole_lanes(keys_); i += kLanes) most = maximum(load(scores + i), most);
    return largest(most);
  }

  // exp2(slope * score - shift) as words; returns their sum, of the weights as rounded: a lone key
  // has the weight 1. `shift` is an integer; kWithin says that no weight leaves fp32's range.
  template <bool kWithin>
  float exponentials(const float* scores, float slope, float shift, Word* words) const {
    const vf factor = splat(slope), away = splat(shift == -INFINITY ? 0.0f : -shift);
    const auto weights_at = [&](int64_t i) {
      const vf score = load(scores + i);
      if constexpr (kWithin) return exp2_within<Words::kExpTerms>(score, factor, shift);
      return exp2<Words::kExpTerms>(multiply_add(score, factor, away));
    };
    WeightSum<Words> sum;
    int64_t i = 0;
    for (; i + 2 * kLanes <= keys_; i += 2 * kLanes) {
      sum.put(words, i, weights_at(i), weights_at(i + kLanes));
    }
    for (; i < keys_; i += kLanes) {
      vf weight = weights_at(i);
      if (keys_ - i < kLanes) weight = first_lanes(weight, keys_ - i);
      sum.put(words, i, weight);
    }
    return sum.total();
  }

  // What is to be taken off a row's scores so that none is above 0; brings earlier sums to it.
  float shifted(int64_t at, float most) {
    const float before = most_[at], now = std::max(before, most);
    most_[at] = now;
    if (before != now && before != -INFINITY) {
      const float keep = std::exp2(before - now);
      total_[at] *= keep;
      float* sums = sums_ + at * value_floats_;
      for (int64_t i = 0; i < value_floats_; i += kLanes) store(sums + i, load(sums + i) * keep);
    }
    return now;
  }

  void finish(int64_t query, int64_t rows, int64_t at) {
    float factors[kQueryTile];
    for (int64_t r = 0; r < rows; ++r) {
      const float total = total_[at + r];
      // Not `total > 0`: what is no number has to show.
      factors[r] = total == 0 ? 0.0f : task_.kept_factor / total;
      if (task_.lse == nullptr) continue;
      task_.lse[query + r] = total == 0 ? -INFINITY : (most_[at + r] + std::log2(total)) / kLog2E;
    }
    write_rows(task_.dtype, task_.out, query, rows, sums_ + at * value_floats_, value_floats_,
               task_.value_dim, factors);
  }

  const AttentionTask& task_;
  const int64_t queries_, block_, dim_words_, key_words_, value_floats_, kept_;
  int64_t key_ = 0, keys_ = 0;
  float largest_key_ = 0;
  Scratch scratch_;
  float *k_, *v_;
  Word* q_words_;
  float* scores_;
  Word* weights_;
  float *sums_, *most_, *total_;
};

inline void attention(const AttentionTask& task) {
#if defined(__AVX512BF16__)
  if (task.dtype == DType::bf16) return AttentionHead<Bf16Words>(task).run();
#endif
  AttentionHead<Fp32Words>(task).run();
}

}  // namespace
}  // namespace vqkernels
