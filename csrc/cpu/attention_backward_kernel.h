// The backward pass of attention: blocks of keys against tiles of queries, all products with keys
// as rows, so that a query's lse and delta lie along the lanes.
//
// Operations: five products of 2 N M d flops, one exponential a score. A block of keys adds up its
// dk and dv over all queries; dq is kept transposed, `[dim, queries]`, and turned at the end.
//
// Rounding makes a query's ds sum to something that is not zero, which keys of a large mean would
// carry into dq. So that sum times a vector near the keys' mean, in truth zero whatever the vector,
// is taken out of dq.
#pragma once

#include <vector>

#include "attention_kernel.h"

namespace vqkernels {
namespace {

constexpr int64_t kBackwardKeys = 128;
constexpr int64_t kBackwardQueries = 128;
constexpr int64_t kMeanKeys = 64;  // from the first on

template <typename Words>
class AttentionBackward {
 public:
  explicit AttentionBackward(const AttentionBackwardTask& task)
      : task_(task),
        head_(task.heads[0]),
        dtype_(head_.dtype),
        dim_(head_.dim),
        value_dim_(head_.value_dim),
        dim_words_(words_of<Words>(dim_)),
        value_words_(words_of<Words>(value_dim_)),
        padded_queries_(whole_lanes(head_.queries)),
        dim_floats_(whole_lanes(dim_)),
        value_floats_(whole_lanes(value_dim_)),
        large_(size_t(task.count * padded_queries_ * (dim_ + 3))),
        scratch_(kBackwardKeys * (dim_words_ + value_words_ + dim_floats_ + value_floats_) +
                 dim_ * kKeyWords + dim_floats_ +
                 kBackwardKeys * (2 * kBackwardQueries + 3 * kQueryWords) +
                 kBackwardQueries * (dim_words_ + value_words_ + dim_floats_ + value_floats_)) {
    dq_ = large_.data();
    lse_ = dq_ + task.count * padded_queries_ * dim_;
    delta_ = lse_ + task.count * padded_queries_;
    slopes_ = delta_ + task.count * padded_queries_;
    k_words_ = scratch_.take<Word>(kBackwardKeys * (dim_words_ + value_words_));
    v_words_ = k_words_ + kBackwardKeys * dim_words_;
    k_across_ = scratch_.take<Word>(dim_ * kKeyWords);
    dk_ = scratch_.take<float>(kBackwardKeys * (dim_floats_ + value_floats_) + dim_floats_);
    dv_ = dk_ + kBackwardKeys * dim_floats_;
    mean_ = dv_ + kBackwardKeys * value_floats_;
    weights_ = scratch_.take<float>(2 * kBackwardKeys * kBackwardQueries);
    ds_ = weights_ + kBackwardKeys * kBackwardQueries;
    p_words_ = scratch_.take<Word>(kBackwardKeys * kQueryWords);
    ds_words_ = scratch_.take<Word>(kBackwardKeys * kQueryWords);
    ds_panels_ = scratch_.take<float>(kKeyWords * kBackwardQueries);
    q_side_ = scratch_.take<float>(kBackwardQueries *
                                   (dim_words_ + value_words_ + dim_floats_ + value_floats_));
  }

  void run() {
    const int64_t mean_keys = std::min(kMeanKeys, head_.keys);
    mean_row(dtype_, head_.k, mean_keys, dim_, mean_);
    for (int64_t head = 0; head < task_.count; ++head) prepare(head);
    for (key_ = task_.key_begin; key_ < task_.key_end; key_ += kBackwardKeys) {
      keys_ = std::min(kBackwardKeys, task_.key_end - key_);
      pack_left<Words>(dtype_, head_.k, key_, keys_, dim_, k_words_);
      pack_left<Words>(dtype_, head_.v, key_, keys_, value_dim_, v_words_);
      pack_across<Words>(dtype_, head_.k, key_, keys_, dim_, k_across_, kKeyWords);
      std::fill(dk_, dk_ + keys_ * dim_floats_, 0.0f);
      std::fill(dv_, dv_ + keys_ * value_floats_, 0.0f);
      for (int64_t head = 0; head < task_.count; ++head) {
        for (int64_t query = 0; query < head_.queries; query += kBackwardQueries) {
          const int64_t queries = std::min(kBackwardQueries, head_.queries - query);
          if (head_.causal && key_ > query + queries - 1) continue;
          add_tile(head, query, queries);
        }
      }
      write_rows(dtype_, task_.dk, key_, keys_, dk_, dim_floats_, dim_, nullptr);
      write_rows(dtype_, task_.dv, key_, keys_, dv_, value_floats_, value_dim_, nullptr);
    }
    for (int64_t head = 0; head < task_.count; ++head) turn(head);
  }

 private:
  using Word = typename Words::Word;
  static constexpr int64_t kKeyWords = kBackwardKeys / Words::kNumbers;
  static constexpr int64_t kQueryWords = kBackwardQueries / Words::kNumbers;

  // lse in powers of two and delta of each query. An infinite lse makes weights zero: that of a
  // query without keys (fp32 does not hold what weights differ by where all are at finfo.min), and
  // of those that fill up the last tile.
  void prepare(int64_t head) {
    const AttentionTask& of = task_.heads[head];
    float* lse = lse_ + head * padded_queries_;
    float* delta = delta_ + head * padded_queries_;
    for (int64_t i = 0; i < padded_queries_; ++i) {
      lse[i] = INFINITY;
      if (i >= of.queries) continue;
      if (!(of.lse[i] < -1e38f)) lse[i] = of.lse[i] * kLog2E;
      delta[i] = dot(dtype_, of.out, task_.grads[head], i, value_dim_);
    }
  }

  void add_tile(int64_t head, int64_t query, int64_t queries) {
    const AttentionTask& of = task_.heads[head];
    const HeadRows& grad = task_.grads[head];
    const int64_t width = whole_lanes(queries), words = words_of<Words>(width);
    float* memory = q_side_;
    const auto panels = [&](int64_t columns, int64_t steps) {
      const Panels made(memory, columns, steps);
      memory += Panels::floats(columns, steps);
      return made;
    };
    const Panels q_down = panels(width, dim_words_), grad_down = panels(width, value_words_);
    const Panels q_across = panels(dim_, words), grad_across = panels(value_dim_, words);
    pack_transposed<Words>(dtype_, of.q, query, queries, dim_, q_down);
    pack_transposed<Words>(dtype_, grad, query, queries, value_dim_, grad_down);
    pack_straight<Words>(dtype_, of.q, query, queries, dim_, q_across);
    pack_straight<Words>(dtype_, grad, query, queries, value_dim_, grad_across);

    const int64_t at = head * padded_queries_ + query;
    multiply<Words>({k_words_, dim_words_, weights_, kBackwardQueries, false}, keys_, q_down);
    weigh(of, query, queries);
    multiply<Words>({v_words_, value_words_, ds_, kBackwardQueries, false}, keys_, grad_down);
    if (of.drop_below > 0) drop(of, query, width);
    differentiate(width, delta_ + at, slopes_ + at, of.scale);
    multiply<Words>({p_words_, kQueryWords, dv_, value_floats_, true}, keys_, grad_across);
    multiply<Words>({ds_words_, kQueryWords, dk_, dim_floats_, true}, keys_, q_across);

    const Panels ds(ds_panels_, width, words_of<Words>(keys_));
    interleave(ds);
    float* dq = dq_ + head * dim_ * padded_queries_ + query;
    multiply<Words>({k_across_, kKeyWords, dq, padded_queries_, true}, dim_, ds);
  }

  // Scores become weights, and words.
  void weigh(const AttentionTask& of, int64_t query, int64_t queries) {
    const float* lse = lse_ + (&of - task_.heads) * padded_queries_ + query;
    const bool masked = of.mask_kind != MaskKind::none || (of.causal && key_ + keys_ - 1 > query);
    const int64_t width = whole_lanes(queries);
    vf factor = splat(of.scale * kLog2E);
    for (int64_t r = 0; r < keys_; ++r) {
      float* row = weights_ + r * kBackwardQueries;
      Word* words = p_words_ + r * kQueryWords;
      if (masked) {
        for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * factor);
        add_mask(of, query, key_ + r, true, queries, row);
      }
      const vf slope = masked ? splat(1.0f) : factor;
      for (int64_t i = 0; i < width; i += kLanes) {
        const vf power = multiply_add(load(row + i), slope, -load(lse + i));
        const vf weight = exp2<Words::kExpTerms>(power);
        store(row + i, weight);
        put_weights(words, i, weight);
      }
    }
  }

  // Words of the weights that were kept, and grad v^T of them alone.
  void drop(const AttentionTask& of, int64_t query, int64_t width) {
    for (int64_t r = 0; r < keys_; r += kKeysOfCounter) {
      for (int64_t i = 0; i < width; i += kLanes) {
        each_dropped(of, query + i, key_ + r, [&](int64_t key, vf factor) {
          if (r + key >= keys_) return;
          const int64_t at = (r + key) * kBackwardQueries + i;
          store(ds_ + at, load(ds_ + at) * factor);
          put_weights(p_words_ + (r + key) * kQueryWords, i, load(weights_ + at) * factor);
        });
      }
    }
  }

  // grad v^T becomes ds, and words.
  void differentiate(int64_t width, const float* delta, float* slopes, float scale) {
    for (int64_t r = 0; r < keys_; ++r) {
      const float* weights = weights_ + r * kBackwardQueries;
      float* ds = ds_ + r * kBackwardQueries;
      Word* words = ds_words_ + r * kQueryWords;
      for (int64_t i = 0; i < width; i += kLanes) {
        const vf exact = load(weights + i) * (load(ds + i) - load(delta + i)) * splat(scale);
        const vf rounded = put_weights(words, i, exact);
        store(ds + i, rounded);
        store(slopes + i, load(slopes + i) + rounded);
      }
    }
  }

  // ds as panels whose steps run along its keys.
  void interleave(const Panels& panels) {
    for (int64_t vector = 0; vector < panels.vectors; ++vector) {
      float* to = panels.at(vector);
      const int64_t apart = panels.apart(vector);
      for (int64_t step = 0; step < panels.steps; ++step, to += apart) {
        const int64_t key = step * Words::kNumbers;
        const float* at = ds_ + key * kBackwardQueries + vector * kLanes;
        if constexpr (Words::kNumbers == 1) {
          store(to, load(at));
        } else {
          const vf high = key + 1 < keys_ ? load(at + kBackwardQueries) : splat(0.0f);
          store(to, (vf)((vu)load(at) >> 16 | (vu)high));  // rounded before
        }
      }
    }
  }

  // dq `[dim, queries]` becomes the task's `[queries, dim]`.
  void turn(int64_t head) {
    const float* from = dq_ + head * dim_ * padded_queries_;
    const float* slopes = slopes_ + head * padded_queries_;
    float* to = task_.dq + head * head_.queries * dim_;
    for (int64_t query = 0; query < head_.queries; query += kLanes) {
      const int64_t queries = std::min<int64_t>(kLanes, head_.queries - query);
      for (int64_t d = 0; d < dim_; d += kLanes) {
        const int64_t columns = std::min<int64_t>(kLanes, dim_ - d);
        vu words[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          words[i] = i < columns ? (vu)load(from + (d + i) * padded_queries_ + query) : vu{};
        }
        transpose(words);
        const vf mean = load(mean_ + d);
        for (int64_t i = 0; i < queries; ++i) {
          store_at(to + (query + i) * dim_, d, columns,
                   multiply_add(splat(-slopes[query + i]), mean, (vf)words[i]));
        }
      }
    }
  }

  const AttentionBackwardTask& task_;
  const AttentionTask& head_;
  const DType dtype_;
  const int64_t dim_, value_dim_, dim_words_, value_words_, padded_queries_;
  const int64_t dim_floats_, value_floats_;
  std::vector<float> large_;
  Scratch scratch_;
  int64_t key_ = 0, keys_ = 0;
  float *dq_, *lse_, *delta_, *slopes_;
  Word *k_words_, *v_words_, *k_across_;
  float *dk_, *dv_, *mean_, *weights_, *ds_;
  Word *p_words_, *ds_words_;
  float *ds_panels_, *q_side_;
};

inline void attention_backward(const AttentionBackwardTask& task) {
#if defined(__AVX512BF16__)
  if (task.heads[0].dtype == DType::bf16) return AttentionBackward<Bf16Words>(task).run();
#endif
  AttentionBackward<Fp32Words>(task).run();
}

inline void attention_query_sums(const AttentionQuerySums& task) {
  std::vector<float> row(size_t(whole_lanes(task.dim)));
  for (int64_t query = 0; query < task.queries; ++query) {
    const float* part = task.parts + query * task.dim;
    std::copy(part, part + task.dim, row.data());
    for (int64_t i = 1; i < task.count; ++i) {
      part += task.apart;
      for (int64_t d = 0; d < task.dim; ++d) row[size_t(d)] += part[d];
    }
    write_rows(task.dtype, task.dq, query, 1, row.data(), 0, task.dim, nullptr);
  }
}

}  // namespace
}  // namespace vqkernels
