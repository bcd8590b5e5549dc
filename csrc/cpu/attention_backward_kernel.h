// The backward pass of attention: blocks of keys against tiles of queries, all products with keys
// as rows, so that a query's lse and delta lie along the lanes.
//
// Operations: five products of 2 N M d flops, one exponential a score. A block of keys adds up its
// dk and dv over all queries; dq is kept transposed, `[dim, queries]`, and turned at the end.
#pragma once

#include "attention_kernel.h"

namespace vqkernels {
namespace {

constexpr int64_t kBackwardKeys = 128;
constexpr int64_t kBackwardQueries = 128;

template <typename Words, typename T>
class AttentionBackward {
 public:
  explicit AttentionBackward(const AttentionBackwardTask& task)
      : task_(task),
        head_(task.heads[0]),
        dim_(head_.dim),
        value_dim_(head_.value_dim),
        dim_words_(words_of<Words>(dim_)),
        value_words_(words_of<Words>(value_dim_)),
        padded_queries_((head_.queries + kBackwardQueries - 1) / kBackwardQueries *
                        kBackwardQueries),
        dim_floats_(Panels::vectors_of(dim_) * kLanes),
        value_floats_(Panels::vectors_of(value_dim_) * kLanes),
        large_(task.count * padded_queries_ * (dim_ + 2)),
        scratch_(kBackwardKeys * (dim_words_ + value_words_ + dim_floats_ + value_floats_) +
                 dim_ * kKeyWords + kBackwardKeys * (kBackwardQueries + 3 * kQueryWords) +
                 kBackwardQueries * (dim_words_ + value_words_ + dim_floats_ + value_floats_)) {
    dq_ = large_.data();
    lse_ = dq_ + task.count * padded_queries_ * dim_;
    delta_ = lse_ + task.count * padded_queries_;
    k_words_ = scratch_.take<Word>(kBackwardKeys * (dim_words_ + value_words_));
    v_words_ = k_words_ + kBackwardKeys * dim_words_;
    k_across_ = scratch_.take<Word>(dim_ * kKeyWords);
    dk_ = scratch_.take<float>(kBackwardKeys * (dim_floats_ + value_floats_));
    dv_ = dk_ + kBackwardKeys * dim_floats_;
    tile_ = scratch_.take<float>(kBackwardKeys * kBackwardQueries);
    p_words_ = scratch_.take<Word>(kBackwardKeys * kQueryWords);
    ds_words_ = scratch_.take<Word>(kBackwardKeys * kQueryWords);
    ds_panels_ = scratch_.take<float>(kKeyWords * kBackwardQueries);
    q_side_ = scratch_.take<float>(kBackwardQueries *
                                   (dim_words_ + value_words_ + dim_floats_ + value_floats_));
  }

  void run() {
    for (int64_t head = 0; head < task_.count; ++head) prepare(head);
    for (key_ = task_.key_begin; key_ < task_.key_end; key_ += kBackwardKeys) {
      keys_ = std::min(kBackwardKeys, task_.key_end - key_);
      pack_keys();
      std::fill(dk_, dk_ + kBackwardKeys * (dim_floats_ + value_floats_), 0.0f);
      for (int64_t head = 0; head < task_.count; ++head) {
        for (int64_t query = 0; query < head_.queries; query += kBackwardQueries) {
          const int64_t queries = std::min(kBackwardQueries, head_.queries - query);
          if (head_.causal && key_ > query + queries - 1) continue;
          add_tile(head, query, queries);
        }
      }
      for (int64_t i = 0; i < keys_; ++i) {
        write(row(task_.dk, key_ + i), dk_ + i * dim_floats_, dim_);
        write(row(task_.dv, key_ + i), dv_ + i * value_floats_, value_dim_);
      }
    }
    for (int64_t head = 0; head < task_.count; ++head) turn(head);
  }

 private:
  using Word = typename Words::Word;
  static constexpr int64_t kKeyWords = kBackwardKeys / Words::kNumbers;
  static constexpr int64_t kQueryWords = kBackwardQueries / Words::kNumbers;

  static T* row(const HeadRows& rows, int64_t row) {
    return static_cast<T*>(rows.data) + row * rows.stride;
  }

  static void write(T* to, const float* from, int64_t columns) {
    each_vector(columns, [&](int64_t column, int64_t count) {
      store_at(to, column, count, load(from + column));
    });
  }

  // lse in powers of two and delta of each query. An infinite lse makes weights zero: that of a
  // query without keys, and of those that fill up the last tile.
  void prepare(int64_t head) {
    const AttentionTask& of = task_.heads[head];
    float* lse = lse_ + head * padded_queries_;
    float* delta = delta_ + head * padded_queries_;
    for (int64_t i = 0; i < padded_queries_; ++i) {
      lse[i] = INFINITY;
      delta[i] = 0;
      if (i >= of.queries) continue;
      if (of.lse[i] != -INFINITY) lse[i] = of.lse[i] * kLog2E;
      const T *out = row(of.out, i), *grad = row(task_.grads[head], i);
      vf sum = {};
      each_vector(value_dim_, [&](int64_t column, int64_t count) {
        sum = multiply_add(load_at(out, column, count), load_at(grad, column, count), sum);
      });
      delta[i] = sum_of(sum);
    }
  }

  void pack_keys() {
    for (int64_t i = 0; i < keys_; ++i) {
      pack_left<Words>(row(head_.k, key_ + i), dim_, k_words_ + i * dim_words_);
      pack_left<Words>(row(head_.v, key_ + i), value_dim_, v_words_ + i * value_words_);
    }
    // K^T, words along the keys, through one column of panels at a time.
    for (int64_t d = 0; d < dim_; ++d) {
      Word* to = k_across_ + d * kKeyWords;
      for (int64_t w = 0; w < kKeyWords; ++w) to[w] = key_pair(w * Words::kNumbers, d);
    }
  }

  // One or two neighbouring keys' entries in column d, as a word.
  Word key_pair(int64_t key, int64_t d) const {
    const auto at = [&](int64_t i) { return row(head_.k, key_ + i)[d]; };
    if constexpr (Words::kNumbers == 1) {
      return key < keys_ ? to_float(at(key)) : 0.0f;
    } else {
      const uint32_t low = key < keys_ ? at(key).bits : 0;
      const uint32_t high = key + 1 < keys_ ? at(key + 1).bits : 0;
      return low | high << 16;
    }
  }

  void add_tile(int64_t head, int64_t query, int64_t queries) {
    const AttentionTask& of = task_.heads[head];
    const int64_t width = (queries + kLanes - 1) / kLanes * kLanes;
    const int64_t words = words_of<Words>(width);
    float* memory = q_side_;
    const auto panels = [&](int64_t columns, int64_t steps) {
      const Panels made(memory, columns, steps);
      memory += Panels::floats(columns, steps);
      return made;
    };
    const HeadRows& grads = task_.grads[head];
    const Panels q_down = panels(width, dim_words_), grad_down = panels(width, value_words_);
    const Panels q_across = panels(dim_, words), grad_across = panels(value_dim_, words);
    pack_transposed<Words>(row(of.q, query), of.q.stride, queries, dim_, q_down);
    pack_transposed<Words>(row(grads, query), grads.stride, queries, value_dim_, grad_down);
    pack_straight<Words>(row(of.q, query), of.q.stride, queries, dim_, q_across);
    pack_straight<Words>(row(grads, query), grads.stride, queries, value_dim_, grad_across);

    const float* lse = lse_ + head * padded_queries_ + query;
    const float* delta = delta_ + head * padded_queries_ + query;
    weigh(of, query, queries, q_down, lse);
    const vf scale = splat(of.scale);
    multiply<Words>(v_words_, value_words_, keys_, grad_down,
                    [&](int64_t r, int64_t vector, vf sum) {
                      const int64_t i = vector * kLanes;
                      float* at = tile_ + r * kBackwardQueries + i;
                      const vf ds = load(at) * (sum - load(delta + i)) * scale;
                      store(at, ds);
                      put_weights(ds_words_ + r * kQueryWords, i, ds);
                    });
    add_products(p_words_, words, grad_across, dv_, value_floats_);
    add_products(ds_words_, words, q_across, dk_, dim_floats_);

    const Panels ds(ds_panels_, width, words_of<Words>(keys_));
    interleave(ds);
    float* dq = dq_ + head * dim_ * padded_queries_ + query;
    multiply<Words>(k_across_, kKeyWords, dim_, ds, [&](int64_t r, int64_t vector, vf sum) {
      float* to = dq + r * padded_queries_ + vector * kLanes;
      store(to, load(to) + sum);
    });
  }

  // p in the tile, and as words.
  void weigh(const AttentionTask& of, int64_t query, int64_t queries, const Panels& q,
             const float* lse) {
    const vf factor = splat(of.scale * kLog2E);
    const bool masked = of.mask_kind != MaskKind::none || (of.causal && key_ + keys_ - 1 > query);
    multiply<Words>(k_words_, dim_words_, keys_, q, [&](int64_t r, int64_t vector, vf sum) {
      const int64_t i = vector * kLanes;
      vf score = sum * factor;
      if (masked) {
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, queries - i); ++lane) {
          float one = score[lane];
          add_mask<T>(of, query + i + lane, key_ + r, 1, &one);
          score[lane] = one;
        }
      }
      const vf weight = exp2<Words::kExpTerms>(score - load(lse + i));
      store(tile_ + r * kBackwardQueries + i, weight);
      put_weights(p_words_ + r * kQueryWords, i, weight);
    });
  }

  void add_products(const Word* left, int64_t words, const Panels& right, float* sums,
                    int64_t stride) {
    (void)words;
    multiply<Words>(left, kQueryWords, keys_, right, [&](int64_t r, int64_t vector, vf sum) {
      float* to = sums + r * stride + vector * kLanes;
      store(to, load(to) + sum);
    });
  }

  // The tile as panels whose steps run along its keys.
  void interleave(const Panels& panels) {
    for (int64_t vector = 0; vector < panels.vectors; ++vector) {
      float* to = panels.at(vector, 0);
      const int64_t apart = panels.at(vector, 1) - to;
      for (int64_t step = 0; step < panels.steps; ++step, to += apart) {
        const int64_t key = step * Words::kNumbers;
        const float* at = tile_ + key * kBackwardQueries + vector * kLanes;
        if constexpr (Words::kNumbers == 1) {
          store(to, load(at));
        } else {
          const vf high = key + 1 < keys_ ? load(at + kBackwardQueries) : splat(0.0f);
          store(to, paired(load(at), high));
        }
      }
    }
  }

  // Two vectors as one of words, lane by lane.
  static vf paired(vf low, vf high) {
#if defined(__AVX512BF16__)
    const __m256i l = (__m256i)_mm512_cvtneps_pbh((__m512)low);
    const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)high);
    return (vf)_mm512_or_si512(_mm512_cvtepu16_epi32(l),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#else
    return low + high;
#endif
  }

  // dq `[dim, queries]` becomes the task's `[queries, dim]`.
  void turn(int64_t head) {
    const float* from = dq_ + head * dim_ * padded_queries_;
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
        for (int64_t i = 0; i < queries; ++i) {
          store_at(to + (query + i) * dim_, d, columns, (vf)words[i]);
        }
      }
    }
  }

  const AttentionBackwardTask& task_;
  const AttentionTask& head_;
  const int64_t dim_, value_dim_, dim_words_, value_words_, padded_queries_;
  const int64_t dim_floats_, value_floats_;
  std::vector<float> large_;
  Scratch scratch_;
  int64_t key_ = 0, keys_ = 0;
  float *dq_, *lse_, *delta_;
  Word *k_words_, *v_words_, *k_across_;
  float *dk_, *dv_, *tile_;
  Word *p_words_, *ds_words_;
  float *ds_panels_, *q_side_;
};

inline void attention_backward(const AttentionBackwardTask& task) {
  dispatch(task.heads[0].dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bfloat16_t>) {
      return AttentionBackward<Bf16Words, T>(task).run();
    }
#endif
    AttentionBackward<Fp32Words, T>(task).run();
  });
}

}  // namespace
}  // namespace vqkernels
