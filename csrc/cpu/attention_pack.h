// What of attention depends on the dtype of its tensors: rows into words and panels, masks, norms
// and the way back. Each is one function that looks at the dtype, so that the products and the
// softmax are compiled once for a kind of words.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention_task.h"
#include "tile_product.h"

namespace vqkernels {
namespace {

#define VQKERNELS_OUTLINE __attribute__((noinline))

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLeastBias = -3e38f;

// Calls f with a typed null pointer. bf16 pairs are made of bf16 rows alone.
template <typename Words, typename F>
inline void dispatch_for(DType dtype, const F& f) {
  if constexpr (Words::kNumbers == 2) {
    f(static_cast<bfloat16_t*>(nullptr));
  } else {
    dispatch(dtype, f);
  }
}

template <typename T>
inline T* row_at(const HeadRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Asks for rows that are needed soon: those of one head of a packed qkv lie too far apart for the
// processor to see them coming.
template <int kWritten = 0>
inline void prefetch_rows(DType dtype, const HeadRows& rows, int64_t first, int64_t count,
                          int64_t columns) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(rows.data) + first * rows.stride * bytes;
  for (int64_t i = 0; i < count; ++i, row += rows.stride * bytes) {
    for (int64_t at = 0; at < columns * bytes; at += kLine) __builtin_prefetch(row + at, kWritten);
  }
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
#if defined(__AVX512BW__)
      const __mmask32 some = __mmask32((uint64_t(1) << count) - 1);
      words = (vu)_mm512_maskz_loadu_epi16(some, row + column);
#else
      std::memcpy(&words, row + column, size_t(count) * sizeof(T));
#endif
    }
    return words;
  }
}

// Rows as words along their columns, `words_of(columns)` apart: the left operand. An odd column has
// a zero beside it.
template <typename Words>
VQKERNELS_OUTLINE void pack_left(DType dtype, const HeadRows& rows, int64_t first, int64_t count,
                                 int64_t columns, typename Words::Word* out) {
  const int64_t words = words_of<Words>(columns);
  dispatch_for<Words>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < count; ++i, out += words) {
      const T* row = row_at<T>(rows, first + i);
      for (int64_t word = 0; word < words; word += kLanes) {
        const vf packed = (vf)words_at<Words>(row, word, columns);
        store_at(reinterpret_cast<float*>(out) + word, 0, std::min<int64_t>(kLanes, words - word),
                 packed);
      }
    }
  });
}

// Panels whose columns are rows of a matrix and whose steps run along its columns: K for q k^T.
template <typename Words>
VQKERNELS_OUTLINE void pack_transposed(DType dtype, const HeadRows& rows, int64_t first,
                                       int64_t count, int64_t columns, const Panels& panels) {
  dispatch_for<Words>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t vector = 0; vector < panels.vectors; ++vector) {
      const int64_t row = vector * kLanes, here = std::min<int64_t>(kLanes, count - row);
      float* to = panels.at(vector);
      const int64_t apart = panels.apart(vector);
      const int64_t next = std::min<int64_t>(kLanes, count - row - kLanes);
      prefetch_rows(dtype, rows, first + row + kLanes, next, columns);
      for (int64_t step = 0; step < panels.steps; step += kLanes) {
        vu words[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          words[lane] = vu{};
          if (lane < here) {
            words[lane] = words_at<Words>(row_at<T>(rows, first + row + lane), step, columns);
          }
        }
        transpose(words);
        const int64_t steps = std::min<int64_t>(kLanes, panels.steps - step);
        for (int64_t i = 0; i < steps; ++i) store(to + (step + i) * apart, (vf)words[i]);
      }
    }
  });
}

// Panels whose columns are columns of a matrix and whose steps run along its rows: V for p v.
template <typename Words>
VQKERNELS_OUTLINE void pack_straight(DType dtype, const HeadRows& rows, int64_t first,
                                     int64_t count, int64_t columns, const Panels& panels) {
  dispatch_for<Words>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t vector = 0; vector < panels.vectors; ++vector) {
      const int64_t column = vector * kLanes, width = std::min<int64_t>(kLanes, columns - column);
      float* to = panels.at(vector);
      const int64_t apart = panels.apart(vector);
      for (int64_t step = 0; step < panels.steps; ++step, to += apart) {
        const int64_t row = step * Words::kNumbers;
        const auto at = [&](int64_t i) {
          return i < count ? load_at(row_at<T>(rows, first + i), column, width) : splat(0.0f);
        };
        if constexpr (Words::kNumbers == 1) {
          store(to, at(row));
        } else {
          store(to, (vf)((vu)at(row) >> 16 | (vu)at(row + 1)));
        }
      }
    }
  });
}

// Rows as columns of words: `[columns, words_of(count)]`, rows of words `stride` apart.
template <typename Words>
VQKERNELS_OUTLINE void pack_across(DType dtype, const HeadRows& rows, int64_t first, int64_t count,
                                   int64_t columns, typename Words::Word* out, int64_t stride) {
  dispatch_for<Words>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t word = 0; word < words_of<Words>(count); word += kLanes) {
      const int64_t here = std::min<int64_t>(kLanes, words_of<Words>(count) - word);
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, columns - column);
        const auto at = [&](int64_t i) {
          return i < count ? load_at(row_at<T>(rows, first + i), column, width) : splat(0.0f);
        };
        vu words[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t row = (word + lane) * Words::kNumbers;
          if constexpr (Words::kNumbers == 1) {
            words[lane] = (vu)at(row);
          } else {
            words[lane] = (vu)at(row) >> 16 | (vu)at(row + 1);
          }
        }
        transpose(words);
        for (int64_t i = 0; i < width; ++i) {
          store_at(reinterpret_cast<float*>(out) + (column + i) * stride + word, 0, here,
                   (vf)words[i]);
        }
      }
    }
  });
}

// Adds the mask to `count` scaled scores, in powers of two: those of one query and the keys from
// `key` on, or (`of_key`) of one key and the queries from `query` on.
VQKERNELS_OUTLINE inline void add_mask(const AttentionTask& task, int64_t query, int64_t key,
                                       bool of_key, int64_t count, float* scores) {
  const int64_t at = query * task.mask_row + key * task.mask_col;
  const int64_t step = of_key ? task.mask_row : task.mask_col;
  if (task.mask_kind == MaskKind::boolean) {
    const bool* mask = static_cast<const bool*>(task.mask) + at;
    for (int64_t i = 0; i < count; ++i) scores[i] = mask[i * step] ? scores[i] : -INFINITY;
  } else if (task.mask_kind == MaskKind::additive) {
    dispatch(task.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* mask = static_cast<const T*>(task.mask) + at;
      for (int64_t i = 0; i < count; ++i) {
        const float bias = to_float(mask[i * step]), scaled = bias * kLog2E;
        // finfo.min, a usual "no", stays finite: a row of nothing else has equal weights.
        scores[i] += scaled < kLeastBias && bias != -INFINITY ? kLeastBias : scaled;
      }
    });
  }
  if (!task.causal) return;
  if (of_key) {
    std::fill(scores, scores + std::clamp<int64_t>(key - query, 0, count), -INFINITY);
  } else {
    std::fill(scores + std::clamp<int64_t>(query + 1 - key, 0, count), scores + count, -INFINITY);
  }
}

// The largest |column| of a right operand; NaN where a column holds one.
template <typename Words>
VQKERNELS_OUTLINE float largest_column_norm(const Panels& panels) {
  vf most = {}, broken = {};
  for (int64_t vector = 0; vector < panels.vectors; ++vector) {
    const float* column = panels.at(vector);
    const int64_t apart = panels.apart(vector);
    vf even = {}, odd = {};
    int64_t step = 0;
    for (; step + 1 < panels.steps; step += 2, column += 2 * apart) {
      even = Words::add_squares(even, load(column));
      odd = Words::add_squares(odd, load(column + apart));
    }
    if (step < panels.steps) even = Words::add_squares(even, load(column));
    most = maximum(even + odd, most);
    broken += even + odd;
  }
  const float sum = sum_of(broken);
  return sum != sum ? sum : std::sqrt(largest(most));
}

// |row| of some rows.
VQKERNELS_OUTLINE inline void row_norms(DType dtype, const HeadRows& rows, int64_t first,
                                        int64_t count, int64_t columns, float* norms) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = row_at<T>(rows, first + i);
      vf squares = {};
      each_vector(columns, [&](int64_t column, int64_t count) {
        const vf values = load_at(row, column, count);
        squares = multiply_add(values, values, squares);
      });
      norms[i] = std::sqrt(sum_of(squares));
    }
  });
}

VQKERNELS_OUTLINE inline float dot(DType dtype, const HeadRows& a, const HeadRows& b, int64_t row,
                                   int64_t columns) {
  float sum = 0;
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *one = row_at<T>(a, row), *other = row_at<T>(b, row);
    vf sums = {};
    each_vector(columns, [&](int64_t column, int64_t count) {
      sums = multiply_add(load_at(one, column, count), load_at(other, column, count), sums);
    });
    sum = sum_of(sums);
  });
  return sum;
}

// Rows of floats, `stride` apart, each times a factor (or 1), as rows of the dtype.
VQKERNELS_OUTLINE inline void write_rows(DType dtype, const HeadRows& rows, int64_t first,
                                         int64_t count, const float* from, int64_t stride,
                                         int64_t columns, const float* factors) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < count; ++i, from += stride) {
      T* to = row_at<T>(rows, first + i);
      const vf factor = splat(factors == nullptr ? 1.0f : factors[i]);
      each_vector(columns, [&](int64_t column, int64_t count) {
        store_at(to, column, count, load(from + column) * factor);
      });
    }
  });
}

// The mean of the first `count` rows, whole vectors of it.
VQKERNELS_OUTLINE inline void mean_row(DType dtype, const HeadRows& rows, int64_t count,
                                       int64_t columns, float* mean) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    each_vector(columns, [&](int64_t column, int64_t width) {
      vf sum = {};
      for (int64_t i = 0; i < count; ++i) sum += load_at(row_at<T>(rows, i), column, width);
      store(mean + column, sum / splat(float(count)));
    });
  });
}

// Where rows can be read as words in place: the left operand and how far its rows are apart.
template <typename Words>
inline const typename Words::Word* rows_as_words(DType dtype, const HeadRows& rows, int64_t first,
                                                 int64_t columns, int64_t* apart) {
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  const auto* data = static_cast<const char*>(rows.data) + first * rows.stride * bytes;
  const bool whole = columns % Words::kNumbers == 0 && rows.stride % Words::kNumbers == 0;
  if (bytes * Words::kNumbers != 4 || !whole || reinterpret_cast<uintptr_t>(data) % 4 != 0) {
    return nullptr;
  }
  *apart = rows.stride / Words::kNumbers;
  return reinterpret_cast<const typename Words::Word*>(data);
}

// A vector of weights as words, at number `i` of a row of words. Returns them as rounded.
template <typename Word>
inline vf put_weights(Word* words, int64_t i, vf weights) {
  if constexpr (std::is_same_v<Word, float>) {
    store(words + i, weights);
    return weights;
  } else {
#if defined(__AVX512BF16__)
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(words + i / 2, &halves, sizeof(halves));
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    return weights;
#endif
  }
}

// Puts vectors of weights into a row of words, from number `i` on, and sums them as rounded.
template <typename Words>
struct WeightSum {
  void put(float* words, int64_t i, vf weights) { sum += put_weights(words, i, weights); }
  void put(float* words, int64_t i, vf first, vf second) {
    put(words, i, first);
    put(words, i + kLanes, second);
  }
  float total() const { return sum_of(sum); }

  vf sum = {};
};

#if defined(__AVX512BF16__)
template <>
struct WeightSum<Bf16Words> {
  void put(uint32_t* words, int64_t i, vf weights) { sum += put_weights(words, i, weights); }
  void put(uint32_t* words, int64_t i, vf first, vf second) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(words + i / 2, &pairs, sizeof(pairs));
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    pair_sum = (vf)_mm512_dpbf16_ps((__m512)pair_sum, pairs, ones);
  }
  float total() const { return sum_of(sum + pair_sum); }

  vf sum = {}, pair_sum = {};
};
#endif

}  // namespace
}  // namespace vqkernels
