// Attention of one head: blocks of keys packed once, tiles of queries against them, softmax online.
//
// Operations: 2 N M (d + e) multiply-adds' flops in bf16 pairs or fp32, and for each of the N M
// scores about 12 for the exponential. Bytes: K and V packed once a task, in blocks that stay in
// L2; the scores of a tile stay in L1.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "attention_task.h"
#include "scratch.h"
#include "tile_product.h"

namespace vqkernels {
namespace {

constexpr int64_t kKeyBlock = 512;
constexpr int64_t kQueryTile = 2 * kProductRows;
constexpr float kLog2E = 1.44269504088896341f;

template <typename Words>
inline int64_t words_of(int64_t numbers) {
  return (numbers + Words::kNumbers - 1) / Words::kNumbers;
}

// A vector of words of a row from word `word` on; zeros behind its `columns` numbers.
template <typename Words, typename T>
inline vu words_at(const T* row, int64_t word, int64_t columns) {
  const int64_t column = word * Words::kNumbers;
  const int64_t count = std::min<int64_t>(kLanes * Words::kNumbers, columns - column);
  if constexpr (Words::kNumbers == 1) {
    return (vu)load_at(row, column, count);
  } else {
    vu words = {};
    if (count == 2 * kLanes) {
      std::memcpy(&words, row + column, sizeof(words));
    } else {
      std::memcpy(&words, row + column, size_t(count) * sizeof(T));
    }
    return words;
  }
}

// Rows as words along the columns: the left operand. An odd column has a zero beside it.
template <typename Words, typename T>
inline void pack_left(const T* row, int64_t columns, typename Words::Word* out) {
  const int64_t words = words_of<Words>(columns);
  for (int64_t word = 0; word < words; word += kLanes) {
    const vu packed = words_at<Words>(row, word, columns);
    std::memcpy(out + word, &packed, size_t(std::min<int64_t>(kLanes, words - word)) * 4);
  }
}

// Panels whose columns are rows of a matrix and whose steps run along its columns: K for q k^T.
template <typename Words, typename T>
inline void pack_transposed(const T* first, int64_t stride, int64_t rows, int64_t columns,
                            Panels panels) {
  for (int64_t vector = 0; vector < panels.vectors; ++vector) {
    const int64_t row = vector * kLanes, count = std::min<int64_t>(kLanes, rows - row);
    float* to = panels.at(vector, 0);
    const int64_t apart = panels.at(vector, 1) - to;
    for (int64_t step = 0; step < panels.steps; step += kLanes) {
      vu words[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        words[lane] = vu{};
        if (lane < count)
          words[lane] = words_at<Words>(first + (row + lane) * stride, step, columns);
      }
      transpose(words);
      const int64_t steps = std::min<int64_t>(kLanes, panels.steps - step);
      for (int64_t i = 0; i < steps; ++i) store(to + (step + i) * apart, (vf)words[i]);
    }
  }
}

// Panels whose columns are columns of a matrix and whose steps run along its rows: V for p v.
template <typename Words, typename T>
inline void pack_straight(const T* first, int64_t stride, int64_t rows, int64_t columns,
                          Panels panels) {
  for (int64_t vector = 0; vector < panels.vectors; ++vector) {
    const int64_t column = vector * kLanes, count = std::min<int64_t>(kLanes, columns - column);
    float* to = panels.at(vector, 0);
    const int64_t apart = panels.at(vector, 1) - to;
    const T* at = first + column;
    for (int64_t step = 0; step < panels.steps; ++step, to += apart) {
      const int64_t row = step * Words::kNumbers;
      vf word = row < rows ? load_at(at + row * stride, 0, count) : splat(0.0f);
      if constexpr (Words::kNumbers == 2) {
        vu pair = (vu)word >> 16;
        if (row + 1 < rows) pair |= (vu)load_at(at + (row + 1) * stride, 0, count);
        word = (vf)pair;
      }
      store(to, word);
    }
  }
}

// Adds a mask to `keys` scaled scores of one query, from key `key` on.
template <typename T>
inline void add_mask(const AttentionTask& task, int64_t query, int64_t key, int64_t keys,
                     float* scores) {
  const int64_t at = query * task.mask_row + key * task.mask_col;
  if (task.mask_kind == MaskKind::boolean) {
    const bool* mask = static_cast<const bool*>(task.mask) + at;
    for (int64_t i = 0; i < keys; ++i) {
      scores[i] = mask[i * task.mask_col] ? scores[i] : -INFINITY;
    }
  } else if (task.mask_kind == MaskKind::additive) {
    const T* mask = static_cast<const T*>(task.mask) + at;
    for (int64_t i = 0; i < keys; ++i) scores[i] += to_float(mask[i * task.mask_col]) * kLog2E;
  }
  if (task.causal) {
    for (int64_t i = std::max<int64_t>(0, query + 1 - key); i < keys; ++i) scores[i] = -INFINITY;
  }
}

inline float largest_of(const float* scores, int64_t padded) {
  vf most = splat(-INFINITY);
  for (int64_t i = 0; i < padded; i += kLanes) most = maximum(most, load(scores + i));
  return largest(most);
}

// A vector of weights as words, at number `i` of a row of words.
template <typename Word>
inline void put_weights(Word* words, int64_t i, vf weights) {
  if constexpr (std::is_same_v<Word, float>) {
    store(words + i, weights);
  } else {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(words + i / 2, &halves, sizeof(halves));
#endif
  }
}

// exp2(score - most) as words; returns their sum.
template <typename Words>
inline float exponentials(const float* scores, float most, int64_t padded,
                          typename Words::Word* words) {
  const vf shift = splat(most == -INFINITY ? 0.0f : most);
  vf sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vf weight = exp2<Words::kExpTerms>(load(scores + i) - shift);
    sum += weight;
    put_weights(words, i, weight);
  }
  return sum_of(sum);
}

template <typename T>
inline float norm_of(const T* row, int64_t columns) {
  vf squares = {};
  each_vector(columns, [&](int64_t column, int64_t count) {
    const vf values = load_at(row, column, count);
    squares = multiply_add(values, values, squares);
  });
  return std::sqrt(sum_of(squares));
}

// No score of a row is above |q| |k| scale, none below its negative. Where twice that is less than
// this many powers of two, the bound serves in place of the largest score: exponentials are taken
// as the products leave their registers, and no weight is lost.
constexpr float kNarrow = 100.0f;

template <typename Words, typename T>
class AttentionHead {
 public:
  explicit AttentionHead(const AttentionTask& task)
      : task_(task),
        queries_(task.query_end - task.query_begin),
        block_(std::min<int64_t>(kKeyBlock, padded(task.keys))),
        dim_words_(words_of<Words>(task.dim)),
        key_words_(words_of<Words>(block_)),
        value_floats_(padded(task.value_dim)),
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
      pack_keys();
      for (int64_t tile = 0; tile < queries_; tile += kQueryTile) {
        const int64_t rows = std::min<int64_t>(kQueryTile, queries_ - tile);
        const int64_t query = task_.query_begin + tile, at = kept_ == queries_ ? tile : 0;
        if (key_ == 0) start(rows, at);
        const bool hidden = task_.causal && key_ > query + rows - 1;
        if (!hidden && keys_ > 0) add_block(query, rows, at);
        if (key_ + block_ >= task_.keys) finish(query, rows, at);
      }
    }
  }

 private:
  using Word = typename Words::Word;

  static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  T* row(const HeadRows& rows, int64_t row) const {
    return static_cast<T*>(rows.data) + row * rows.stride;
  }

  void pack_keys() {
    const T *k = row(task_.k, key_), *v = row(task_.v, key_);
    const int64_t width = padded(keys_);
    pack_transposed<Words>(k, task_.k.stride, keys_, task_.dim, Panels(k_, width, dim_words_));
    pack_straight<Words>(v, task_.v.stride, keys_, task_.value_dim,
                         Panels(v_, task_.value_dim, words_of<Words>(width)));
    largest_norm_ = 0;
    for (int64_t i = 0; i < keys_; ++i) {
      largest_norm_ = std::max(largest_norm_, norm_of(k + i * task_.k.stride, task_.dim));
    }
  }

  void start(int64_t rows, int64_t at) {
    std::fill(most_ + at, most_ + at + rows, -INFINITY);
    std::fill(total_ + at, total_ + at + rows, 0.0f);
    std::fill(sums_ + at * value_floats_, sums_ + (at + rows) * value_floats_, 0.0f);
  }

  // Folds this block of keys into the sums of `rows` queries.
  void add_block(int64_t query, int64_t rows, int64_t at) {
    float bound = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = row(task_.q, query + r);
      pack_left<Words>(q, task_.dim, q_words_ + r * dim_words_);
      bound = std::max(bound, norm_of(q, task_.dim));
    }
    bound *= largest_norm_ * std::fabs(task_.scale) * kLog2E * 1.001f;
    const bool plain =
        task_.mask_kind == MaskKind::none && !(task_.causal && key_ + keys_ - 1 > query);
    if (plain && 2 * bound < kNarrow) {
      weigh_in_passing(rows, at, bound);
    } else {
      weigh(query, rows, at);
    }
    const Panels v(v_, task_.value_dim, words_of<Words>(padded(keys_)));
    float* sums = sums_ + at * value_floats_;
    multiply<Words>(weights_, key_words_, rows, v, [&](int64_t r, int64_t vector, vf sum) {
      float* to = sums + r * value_floats_ + vector * kLanes;
      store(to, load(to) + sum);
    });
  }

  // Weights of a block whose scores all lie within `bound` powers of two.
  void weigh_in_passing(int64_t rows, int64_t at, float bound) {
    vf sums[kQueryTile] = {};
    float shift[kQueryTile];
    for (int64_t r = 0; r < rows; ++r) shift[r] = shifted(at + r, bound);
    const vf factor = splat(task_.scale * kLog2E);
    const Panels k(k_, padded(keys_), dim_words_);
    const int64_t ragged = keys_ % kLanes;
    multiply<Words>(q_words_, dim_words_, rows, k, [&](int64_t r, int64_t vector, vf sum) {
      vf weight = exp2<Words::kExpTerms>(multiply_add(sum, factor, splat(-shift[r])));
      if (ragged != 0 && vector == k.vectors - 1) {
        for (int64_t lane = ragged; lane < kLanes; ++lane) weight[lane] = 0;
      }
      sums[r] += weight;
      put_weights(weights_ + r * key_words_, vector * kLanes, weight);
    });
    for (int64_t r = 0; r < rows; ++r) total_[at + r] += sum_of(sums[r]);
  }

  // Weights of any block: scores first, masks, then the exponentials.
  void weigh(int64_t query, int64_t rows, int64_t at) {
    const vf factor = splat(task_.scale * kLog2E);
    const int64_t width = padded(keys_);
    multiply<Words>(q_words_, dim_words_, rows, Panels(k_, width, dim_words_),
                    [&](int64_t r, int64_t vector, vf sum) {
                      store(scores_ + r * block_ + vector * kLanes, sum * factor);
                    });
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = scores_ + r * block_;
      std::fill(scores + keys_, scores + width, -INFINITY);
      add_mask<T>(task_, query + r, key_, keys_, scores);
      const float most = shifted(at + r, largest_of(scores, width));
      total_[at + r] += exponentials<Words>(scores, most, width, weights_ + r * key_words_);
    }
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
    for (int64_t r = 0; r < rows; ++r) {
      const float total = total_[at + r], inverse = total > 0 ? 1 / total : 0.0f;
      const float* sums = sums_ + (at + r) * value_floats_;
      T* out = row(task_.out, query + r);
      each_vector(task_.value_dim, [&](int64_t column, int64_t count) {
        store_at(out, column, count, load(sums + column) * inverse);
      });
      if (task_.lse == nullptr) continue;
      task_.lse[query + r] = total > 0 ? (most_[at + r] + std::log2(total)) / kLog2E : -INFINITY;
    }
  }

  const AttentionTask& task_;
  const int64_t queries_, block_, dim_words_, key_words_, value_floats_, kept_;
  int64_t key_ = 0, keys_ = 0;
  float largest_norm_ = 0;
  Scratch scratch_;
  float *k_, *v_;
  Word* q_words_;
  float* scores_;
  Word* weights_;
  float *sums_, *most_, *total_;
};

inline void attention(const AttentionTask& task) {
  dispatch(task.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bfloat16_t>) {
      return AttentionHead<Bf16Words, T>(task).run();
    }
#endif
    AttentionHead<Fp32Words, T>(task).run();
  });
}

}  // namespace
}  // namespace vqkernels
