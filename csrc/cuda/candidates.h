// What a search keeps of a row's scores: the code that may be the best, and a bound on all others.
//
// A thread sees some of a tile's codes, 16 of each row that it shares with three others. It looks
// for their largest score, one maximum a score, and compares that with the best
// lower bound that the four threads know. Only where an upper bound reaches it (the first tiles,
// then about one tile in t) the columns are looked at one by one: those within the uncertainty of
// the largest are named, unless there are more than two; then nobody is, and `open` rises to their
// bound. A thread keeps the two names with the largest upper bounds. Nothing is lost: a code that
// may be the best is either named or not above `open`.
#pragma once

#include "search_terms.h"

namespace vqkernels::cuda {

constexpr int kBucket = 16;  // columns of a row that one thread folds at a time

// A thread's knowledge of its rows' candidates, in shared memory: six numbers a row and thread.
constexpr int kNames = 2;
struct CandidateState {
  float* base;
  int threads, slots;

  static constexpr __host__ __device__ int bytes(int threads, int slots) {
    return (2 + 2 * kNames) * slots * threads * 4;
  }
  __device__ float& lower(int slot, int thread) const { return at(0, slot, thread); }
  __device__ float& open(int slot, int thread) const { return at(1, slot, thread); }
  __device__ float& upper(int name, int slot, int thread) const {
    return at(2 + name, slot, thread);
  }
  __device__ int& index(int name, int slot, int thread) const {
    return reinterpret_cast<int&>(at(2 + kNames + name, slot, thread));
  }
  __device__ void clear(int slot, int thread) const {
    open(slot, thread) = -INFINITY;
    for (int name = 0; name < kNames; ++name) {
      upper(name, slot, thread) = -INFINITY;
      index(name, slot, thread) = -1;
    }
  }
  // Names a code, in place of the lower of two; whatever is left out stays below `open`.
  __device__ void offer(int slot, int thread, float high, int code) const {
    const float first = upper(0, slot, thread), second = upper(1, slot, thread);
    open(slot, thread) = fmaxf(open(slot, thread), fminf(second, high));
    if (!(high > second)) return;
    const bool leads = high > first;
    upper(1, slot, thread) = leads ? first : high;
    index(1, slot, thread) = leads ? index(0, slot, thread) : code;
    if (!leads) return;
    upper(0, slot, thread) = high;
    index(0, slot, thread) = code;
  }

 private:
  __device__ float& at(int what, int slot, int thread) const {
    return base[(what * slots + slot) * threads + thread];
  }
};

// How far the score of a row and a code may be off, in the tile's units; +inf where the search must
// not decide. `weight` is w, 0 where the units of row and tile lie too far apart.
__device__ __forceinline__ float uncertainty(const RowTerms& row, float weight,
                                             const CodeTerms& code) {
  float of_bias = fmaf(weight, code.bias, kTiny);
  of_bias = fmaf(weight * bias_lost(weight), code.norm * code.norm, of_bias);
  return weight > 0 ? fmaf(row.error, code.norm, fmaf(row.norm, code.error, of_bias)) : INFINITY;
}

// Column n * 8 + j of a bucket, n < 8 and j < 2, as the number n * 2 + j.
__device__ __forceinline__ int column_of(int number) { return number / 2 * 8 + number % 2; }

// Folds buckets of kSlots rows into the candidates. `score(slot, number)` is that of a row and a
// column, `row_of_slot(slot)` are a row's terms, `first_column` is that of the thread's bucket in
// the tile, `terms_of_codes` are its codes' in global memory. kScreened: of forms; what is searched
// as it is has units of one.
template <bool kScreened, int kSlots, typename Score, typename RowOfSlot>
__device__ __forceinline__ void fold_buckets(const Score& score, const RowOfSlot& row_of_slot,
                                             float (&lower)[kSlots], const TileTerms& all,
                                             const CodeTerms* terms_of_codes, int first_column,
                                             const CandidateState& state, int first_code,
                                             float inverse_reference) {
  const float unit = kScreened ? all.scale * inverse_reference : 1.0f;
  const bool in_range = unit >= 0x1p-100f && unit <= 0x1p100f;
  float best[kSlots], of_odd[kSlots];
#pragma unroll
  for (int number = 0; number < kBucket; ++number) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float& largest = number % 2 == 0 ? best[slot] : of_odd[slot];
      largest = number < 2 ? score(slot, number) : fmaxf(largest, score(slot, number));
    }
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    best[slot] = fmaxf(best[slot], of_odd[slot]);
    const RowTerms row = row_of_slot(slot);
    const float weight = in_range ? kScreened ? bias_weight(row, all) : 1.0f : 0.0f;
    const float off = uncertainty(row, weight, all.most);
    // A comparison with NaN, which an unbounded error may make, is not "below".
    const bool below = (best[slot] + off) * unit < lower[slot];
    if (!__any_sync(kWholeWarp, !below)) continue;

    unsigned rivals = 0;
    float high = off < INFINITY ? (best[slot] + off) * unit : INFINITY;
    float low = (best[slot] - off) * unit;
    if (all.mixed == 0) {
      // Of two codes whose scores differ by twice the uncertainty the larger is the better one; the
      // rest of the factor covers the rounding of this bound.
      const float rivals_from = fmaf(-2.5f, off, best[slot]);
#pragma unroll
      for (int number = 0; number < kBucket; ++number) {
        if (score(slot, number) >= rivals_from) rivals |= 1u << number;
      }
    } else {
      float least = -INFINITY;
      high = -INFINITY;
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
        for (int number = 0; number < kBucket; ++number) {
          // One at a time: loads that run ahead take registers from the paths that matter.
          const volatile CodeTerms& at = terms_of_codes[first_column + column_of(number)];
          const CodeTerms code{at.bias, at.norm, at.error, 0};
          if (!(code.bias < INFINITY)) continue;
          const float own = uncertainty(row, weight, code), value = score(slot, number);
          if (pass == 0) least = fmaxf(least, value - own);
          if (pass == 1 && !(value + own < least)) {
            rivals |= 1u << number;
            high = own < INFINITY ? fmaxf(high, (value + own) * unit) : INFINITY;
          }
        }
      }
      low = least * unit;
    }
    const int thread = threadIdx.x;
    if (!below) {
      const int count = __popc(rivals);
      if (count > kNames || count == 0) {
        state.open(slot, thread) = fmaxf(state.open(slot, thread), high);
      } else {
        for (; rivals != 0; rivals &= rivals - 1) {
          const int column = column_of(__ffs(int(rivals)) - 1);
          state.offer(slot, thread, high, first_code + first_column + column);
        }
      }
    }
    low = fmaxf(lower[slot], low);
    low = fmaxf(low, __shfl_xor_sync(kWholeWarp, low, 1));
    lower[slot] = fmaxf(low, __shfl_xor_sync(kWholeWarp, low, 2));
  }
}

// What the kThreads threads that share a row know of it, as one record. `thread_of(i)` is the
// i-th of them, which sees the slots `slots_of(i)` of every tile.
template <int kThreads, typename ThreadOf, typename SlotsOf>
__device__ __forceinline__ Record record_of(const CandidateState& state, int slot,
                                            const ThreadOf& thread_of, const SlotsOf& slots_of) {
  Record record{-INFINITY, -INFINITY, 0, 0, {}, {}};
#pragma unroll
  for (int i = 0; i < kThreads; ++i) {
    record.lower = fmaxf(record.lower, state.lower(slot, thread_of(i)));
  }
#pragma unroll
  for (int i = 0; i < kThreads; ++i) {
    float open = state.open(slot, thread_of(i));
    for (int name = 0; name < kNames; ++name) {
      const float upper = state.upper(name, slot, thread_of(i));
      if (!(upper >= record.lower) || upper == -INFINITY) continue;
      if (record.count == kCandidates) open = fmaxf(open, upper);
#pragma unroll
      for (int at = 0; at < kCandidates; ++at) {
        if (at != record.count) continue;
        record.upper[at] = upper;
        record.index[at] = state.index(name, slot, thread_of(i));
      }
      record.count = min(record.count + 1, kCandidates);
    }
    if (open >= record.lower) record.open_slots |= slots_of(i);
    record.open = fmaxf(record.open, open);
  }
  return record;
}

}  // namespace vqkernels::cuda
