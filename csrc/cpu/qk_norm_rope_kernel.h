// Heads of q and k, normalized and turned by their positions; and the gradients of that.
// Bytes: x (and the gradient) read once, the result written once. Four tokens are taken at a time
// through all heads: a packed qkv is then read in memory's order, a table's rows once.
#pragma once

#include <cmath>

#include "modulation_rows.h"
#include "qk_norm_rope_task.h"

namespace vqkernels {
namespace {

// Neighbouring lanes change places.
inline vf swapped_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#elif defined(VQKERNELS_NEON)
  return (vf)vrev64q_f32((float32x4_t)v);
#else
  return vf{v[1], v[0], v[3], v[2]};
#endif
}

template <typename T>
inline T* head_row(const HeadTensor& heads, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride +
         token * heads.row_stride;
}

// Asks for the rows of the next kRows tokens: those of a packed qkv, and of a result whose heads
// come first, are too far apart for the processor to foresee.
template <typename T, bool kWritten, int kRows>
VQKERNELS_INLINE inline void fetch_next(const NormRope& task, const HeadTensor& heads,
                                        int64_t batch, int64_t head, int64_t token) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  if (token + 2 * kRows > task.tokens) return;
  const T* row = head_row<const T>(heads, batch, head, token + kRows);
  for (int r = 0; r < kRows; ++r, row += heads.row_stride) {
    for (int64_t i = 0; i < task.dim; i += kLine) __builtin_prefetch(row + i, kWritten);
  }
}

struct NormRopeRoom {
  float *cos, *sin, *ones, *grads;
  int64_t stride;

  explicit NormRopeRoom(int64_t dim) : stride(padded(dim)) {
    Scratch scratch((1 + 3 * kTogether) * stride);
    cos = scratch.take<float>(kTogether * stride);
    sin = scratch.take<float>(kTogether * stride);
    grads = scratch.take<float>(kTogether * stride);
    ones = scratch.take<float>(stride);
    std::fill(ones, ones + dim, 1.0f);
  }
};

// The tables' rows of kRows tokens: as they are for halves; for pairs each number twice, and sines
// with the sign that their column needs.
template <int kRows>
struct TurnTables {
  const float *cos[kRows], *sin[kRows];

  TurnTables(const NormRope& task, int64_t batch, int64_t token, bool back,
             const NormRopeRoom& room) {
    const int64_t half = task.dim / 2;
    const float sign = back ? 1.0f : -1.0f;
    for (int r = 0; r < kRows; ++r) {
      const int64_t offset = batch * task.table_stride + (token + r) * half;
      cos[r] = task.cos + offset;
      sin[r] = task.sin + offset;
      if (task.turn != Turn::pairs) continue;
      float *cosines = room.cos + r * room.stride, *sines = room.sin + r * room.stride;
      for (int64_t i = 0; i < half; ++i) {
        cosines[2 * i] = cosines[2 * i + 1] = cos[r][i];
        sines[2 * i] = sign * sin[r][i];
        sines[2 * i + 1] = -sign * sin[r][i];
      }
      cos[r] = cosines;
      sin[r] = sines;
    }
  }
};

// Reads columns of kRows rows, turns them, or turns them back, and hands them to
// write(column, count, values).
template <Turn kTurn, bool kBack, int kRows, typename Read, typename Write>
VQKERNELS_INLINE inline void turn_rows(int64_t dim, const TurnTables<kRows>& tables,
                                       const Read& read, const Write& write) {
  if constexpr (kTurn == Turn::halves) {
    const int64_t half = dim / 2;
    each_vector(half, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
      vf a[kRows], b[kRows];
      read(column, count, a);
      read(half + column, count, b);
      for (int r = 0; r < kRows; ++r) {
        const vf c = load_at(tables.cos[r], column, count);
        vf s = load_at(tables.sin[r], column, count);
        if constexpr (kBack) s = -s;
        const vf turned = multiply_add(-b[r], s, a[r] * c);
        b[r] = multiply_add(a[r], s, b[r] * c);
        a[r] = turned;
      }
      write(column, count, a);
      write(half + column, count, b);
    });
  } else {
    each_vector(dim, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
      vf values[kRows];
      read(column, count, values);
      for (int r = 0; r < kRows && kTurn == Turn::pairs; ++r) {
        const vf c = load_at(tables.cos[r], column, count);
        const vf s = load_at(tables.sin[r], column, count);
        values[r] = multiply_add(swapped_pairs(values[r]), s, values[r] * c);
      }
      write(column, count, values);
    });
  }
}

// Rows of one head and how they are normalized. As in `Deviations`, what rounding left of the mean
// counts.
template <typename T, int kRows>
struct NormedRows {
  const T* x[kRows];
  vf mean[kRows], rest[kRows], inverse[kRows];

  VQKERNELS_INLINE NormedRows(const NormRope& task, const T* first, int64_t row_stride) {
    for (int r = 0; r < kRows; ++r) {
      x[r] = first + r * row_stride;
      mean[r] = rest[r] = vf{};
      inverse[r] = splat(1.0f);
    }
    if (!task.normed) return;
    const float share = 1.0f / float(task.dim);
    Sums<kRows> squares, rests;
    if (task.centered) {
      Sums<kRows> sums;
      each_vector_in_two(task.dim, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
        for (int r = 0; r < kRows; ++r) sums.parts[r][part] += load_at(x[r], column, count);
      });
      for (int r = 0; r < kRows; ++r) mean[r] = splat(sums.of(r) * share);
      each_vector_in_two(task.dim, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
        for (int r = 0; r < kRows; ++r) {
          const vf away = first_lanes(load_at(x[r], column, count) - mean[r], count);
          squares.parts[r][part] = multiply_add(away, away, squares.parts[r][part]);
          rests.parts[r][part] += away;
        }
      });
    } else {
      each_vector_in_two(task.dim, [&](int64_t column, int64_t count, int part) VQKERNELS_INLINE {
        for (int r = 0; r < kRows; ++r) {
          const vf value = load_at(x[r], column, count);
          squares.parts[r][part] = multiply_add(value, value, squares.parts[r][part]);
        }
      });
    }
    for (int r = 0; r < kRows; ++r) {
      const float square = squares.of(r) * share;
      const float left = task.centered ? rests.of(r) * share : 0.0f;
      const float variance = square - left * left;
      const float scale = 1.0f / std::sqrt((variance < 0 ? 0.0f : variance) + task.eps);
      rest[r] = splat(-left * scale);
      inverse[r] = splat(scale);
    }
  }

  VQKERNELS_INLINE vf at(int row, int64_t column, int64_t count) const {
    return multiply_add(load_at(x[row], column, count) - mean[row], inverse[row], rest[row]);
  }
};

// kRows tokens of every head of q or k.
template <typename T, Turn kTurn, int kRows>
inline void norm_rope_heads(const NormRope& task, const NormRopeSide& side, int64_t batch,
                            int64_t token, const TurnTables<kRows>& tables,
                            const NormRopeRoom& room) {
  const float* weight = side.weight != nullptr ? side.weight : room.ones;
  for (int64_t head = 0; head < side.x.heads; ++head) {
    const NormedRows<T, kRows> normed(task, head_row<const T>(side.x, batch, head, token),
                                      side.x.row_stride);
    T* const out = head_row<T>(side.out, batch, head, token);
    fetch_next<T, false, kRows>(task, side.x, batch, head, token);
    fetch_next<T, true, kRows>(task, side.out, batch, head, token);
    turn_rows<kTurn, false>(
        task.dim, tables,
        [&](int64_t column, int64_t count, vf(&values)[kRows]) VQKERNELS_INLINE {
          const vf factor = load_at(weight, column, count);
          for (int r = 0; r < kRows; ++r) values[r] = normed.at(r, column, count) * factor;
        },
        [&](int64_t column, int64_t count, const vf(&values)[kRows]) VQKERNELS_INLINE {
          for (int r = 0; r < kRows; ++r) {
            store_at(out + r * side.out.row_stride, column, count, values[r]);
          }
        });
  }
}

// As `norm_rope_heads`, the gradients; adds to the weight's sums of this chunk.
template <typename T, Turn kTurn, int kRows>
inline void norm_rope_backward_heads(const NormRope& task, const NormRopeSide& side, int64_t batch,
                                     int64_t token, const TurnTables<kRows>& tables,
                                     const NormRopeRoom& room, float* weight_sums) {
  const float* weight = side.weight != nullptr ? side.weight : room.ones;
  for (int64_t head = 0; head < side.x.heads; ++head) {
    const NormedRows<T, kRows> normed(task, head_row<const T>(side.x, batch, head, token),
                                      side.x.row_stride);
    const T* const grad = head_row<const T>(side.grad, batch, head, token);
    T* const out = head_row<T>(side.out, batch, head, token);
    fetch_next<T, false, kRows>(task, side.x, batch, head, token);
    fetch_next<T, false, kRows>(task, side.grad, batch, head, token);
    fetch_next<T, true, kRows>(task, side.out, batch, head, token);

    vf along[kRows], along_normed[kRows];
    for (int r = 0; r < kRows; ++r) along[r] = along_normed[r] = vf{};
    turn_rows<kTurn, true>(
        task.dim, tables,
        [&](int64_t column, int64_t count, vf(&values)[kRows]) VQKERNELS_INLINE {
          for (int r = 0; r < kRows; ++r) {
            values[r] = load_at(grad + r * side.grad.row_stride, column, count);
          }
        },
        [&](int64_t column, int64_t count, const vf(&values)[kRows]) VQKERNELS_INLINE {
          const vf factor = load_at(weight, column, count);
          vf times_normed[kRows];
          for (int r = 0; r < kRows; ++r) {
            const vf n = normed.at(r, column, count), h = values[r] * factor;
            times_normed[r] = values[r] * n;
            along[r] += h;
            along_normed[r] = multiply_add(h, n, along_normed[r]);
            store_at(room.grads + r * room.stride, column, count, h);
          }
          if (weight_sums != nullptr) add_to(weight_sums, column, count, times_normed);
        });

    vf constant[kRows], slope[kRows];
    const float share = 1.0f / float(task.dim);
    for (int r = 0; r < kRows; ++r) {
      constant[r] = splat(task.centered ? -share * sum_of(along[r]) : 0.0f);
      slope[r] = splat(-share * sum_of(along_normed[r]));
    }
    each_vector(task.dim, [&](int64_t column, int64_t count) VQKERNELS_INLINE {
      for (int r = 0; r < kRows; ++r) {
        vf value = load_at(room.grads + r * room.stride, column, count);
        if (task.normed) {
          const vf n = normed.at(r, column, count);
          value = multiply_add(n, slope[r], value + constant[r]) * normed.inverse[r];
        }
        store_at(out + r * side.out.row_stride, column, count, value);
      }
    });
  }
}

// Calls f(element type, integral_constant of the turn) with null pointers.
template <typename F>
inline void dispatch_turn(DType dtype, Turn turn, const F& f) {
  dispatch(dtype, [&](auto* type) {
    if (turn == Turn::halves) return f(type, std::integral_constant<Turn, Turn::halves>());
    if (turn == Turn::pairs) return f(type, std::integral_constant<Turn, Turn::pairs>());
    return f(type, std::integral_constant<Turn, Turn::none>());
  });
}

template <typename F>
inline void each_chunk_group(const NormRope& task, int64_t chunk, const F& f) {
  const int64_t batch = chunk / task.chunks_each();
  const int64_t begin = chunk % task.chunks_each() * NormRope::kTokens;
  each_group(
      begin, std::min(begin + NormRope::kTokens, task.tokens), task.tokens, [](int64_t) {},
      [&](int64_t token, auto rows) { f(batch, token, rows); });
}

inline void qk_norm_rope(const NormRope& task, int64_t chunk_begin, int64_t chunk_end) {
  const NormRopeRoom room(task.dim);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    each_chunk_group(task, chunk, [&](int64_t batch, int64_t token, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      const TurnTables<kRows> tables(task, batch, token, false, room);
      for (const NormRopeSide& side : task.sides) {
        dispatch_turn(side.x.dtype, task.turn, [&](auto* type, auto turn) {
          using T = std::remove_pointer_t<decltype(type)>;
          norm_rope_heads<T, decltype(turn)::value, kRows>(task, side, batch, token, tables, room);
        });
      }
    });
  }
}

inline void qk_norm_rope_backward(const NormRope& task, int64_t chunk_begin, int64_t chunk_end) {
  const NormRopeRoom room(task.dim);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    for (const NormRopeSide& side : task.sides) {
      float* sums = side.weight_sums;
      if (sums != nullptr) std::fill(sums + chunk * task.dim, sums + (chunk + 1) * task.dim, 0.0f);
    }
    each_chunk_group(task, chunk, [&](int64_t batch, int64_t token, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      const TurnTables<kRows> tables(task, batch, token, true, room);
      for (const NormRopeSide& side : task.sides) {
        float* sums = side.weight_sums;
        if (sums != nullptr) sums += chunk * task.dim;
        dispatch_turn(side.x.dtype, task.turn, [&](auto* type, auto turn) {
          using T = std::remove_pointer_t<decltype(type)>;
          norm_rope_backward_heads<T, decltype(turn)::value, kRows>(task, side, batch, token,
                                                                    tables, room, sums);
        });
      }
    });
  }
}

}  // namespace
}  // namespace vqkernels
