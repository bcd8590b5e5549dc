// From candidates to indices: most rows have one; the others are decided in float64.
#pragma once

#include "search_terms.h"

namespace vqkernels::cuda {

constexpr int kDecideThreads = 128;
constexpr int kChooseThreads = 256;
constexpr int kChooseWarps = kChooseThreads / kWarp;
constexpr int kResolveThreads = 1024;
constexpr int kLanes = 8;  // threads that share a code where there are many
constexpr int kGroups = kResolveThreads / kLanes;

struct Decision {
  const Record* records;  // `[splits, books, rows]`
  const RowTerms* row_terms;
  Rows x, codebook;
  Metric metric;
  Labels labels;
  int64_t* indices;
  int32_t* weighed;  // optional: how many codes were compared in float64
  int splits, split_codes;
  // Rows that are not decided, book * rows + row in any order: those with some candidates from the
  // list's beginning on, those of which slots are to be searched from its end on.
  int* undecided;  // how many there are of either
  int32_t* list;
};

constexpr int kMostListed = 2 * kCandidates;

// What all splits together leave of a row.
struct Left {
  float lower;  // what a code must reach
  bool open;    // whether slots are to be searched, of the splits whose `open` reaches `lower`
  int count;    // candidates that are listed
};

// The first kMostListed candidates are given to `list`; where there are more, all slots are open.
template <typename List>
__device__ __forceinline__ Left left_of(const Decision& call, int64_t row, const List& list) {
  const int64_t all_rows = call.x.books * call.x.count;
  Left left{-INFINITY, false, 0};
  float open = -INFINITY;
  for (int split = 0; split < call.splits; ++split) {
    const Record& record = call.records[split * all_rows + row];
    left.lower = fmaxf(left.lower, record.lower);
    open = fmaxf(open, record.open);
  }
  for (int split = 0; split < call.splits; ++split) {
    const Record& record = call.records[split * all_rows + row];
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      if (i >= record.count || !(record.upper[i] >= left.lower)) continue;
      if (left.count < kMostListed) list(left.count, record.index[i]);
      ++left.count;
    }
  }
  // Bounds that are not numbers decide nothing.
  const bool unknown = !is_finite(left.lower) || left.count > kMostListed;
  if (unknown) left = {-INFINITY, true, 0};
  left.open = unknown || !(open < left.lower);
  return left;
}

// One thread a row.
__global__ void __launch_bounds__(kDecideThreads) decide(Decision call) {
  const int64_t row = int64_t(blockIdx.x) * kDecideThreads + threadIdx.x;
  if (row >= call.x.books * call.x.count) return;
  const int book = int(row / call.x.count), row_of_book = int(row % call.x.count);
  int64_t* index = call.indices + place(call.labels, call.x, book, row_of_book);
  if (call.weighed != nullptr) call.weighed[row] = 0;
  if (!is_finite(call.row_terms[row].scale)) {
    *index = -1;
    return;
  }
  int only = -1;
  const Left left = left_of(call, row, [&](int, int code) { only = code; });
  if (left.count == 1 && !left.open) {
    *index = only;
  } else {
    const int64_t last = call.x.books * call.x.count - 1;
    const int at = atomicAdd(call.undecided + left.open, 1);
    call.list[left.open ? last - at : at] = int32_t(row);
  }
}

// How bad a code is for a row, in float64; the kSharing threads that stand side by side share its
// columns. Not finite for a code that is not.
template <int kSharing, typename T, typename C>
__device__ double badness(const Decision& call, const T* x, int book, int code) {
  const C* c = row_of<C>(call.codebook, book, code);
  const int lane = threadIdx.x % kSharing;
  double sum = 0, squares = 0;
#pragma unroll 4
  for (int d = lane; d < int(call.x.width); d += kSharing) {
    const double of_x = element(x[d * call.x.col_stride]);
    const double of_c = element(c[d * call.codebook.col_stride]);
    sum += call.metric == Metric::l2 ? (of_x - of_c) * (of_x - of_c) : -of_x * of_c;
    squares += of_c * of_c;
  }
  const unsigned sharing = (kWholeWarp >> (kWarp - kSharing))
                           << (threadIdx.x % kWarp / kSharing * kSharing);
  for (int step = kSharing / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(sharing, sum, step);
    squares += __shfl_xor_sync(sharing, squares, step);
  }
  return call.metric == Metric::cosine && squares > 0 ? sum / sqrt(squares) : sum;
}

// The best of several codes in float64, the first of equals.
struct Best {
  double badness;
  int index;

  __device__ void offer(double bad, int code) {
    if (!(fabs(bad) < INFINITY)) return;
    if (index < 0 || bad < badness || (bad == badness && code < index)) {
      badness = bad;
      index = code;
    }
  }
};

__device__ __forceinline__ void conclude(const Decision& call, int64_t row, int index,
                                         int weighed) {
  const int book = int(row / call.x.count), row_of_book = int(row % call.x.count);
  call.indices[place(call.labels, call.x, book, row_of_book)] = index;
  if (call.weighed != nullptr) call.weighed[row] = weighed;
}

// One warp a row at a time: rows with some candidates.
template <typename T, typename C>
__global__ void __launch_bounds__(kChooseThreads) choose(Decision call) {
  const int warp = blockIdx.x * kChooseWarps + threadIdx.x / kWarp;
  const int rows = call.undecided[0];
  for (int item = warp; item < rows; item += gridDim.x * kChooseWarps) {
    const int64_t row = call.list[item];
    const int book = int(row / call.x.count);
    const T* x = row_of<T>(call.x, book, int(row % call.x.count));
    int listed[kMostListed];
    const Left left = left_of(call, row, [&](int i, int code) {
#pragma unroll
      for (int at = 0; at < kMostListed; ++at) {
        if (at == i) listed[at] = code;
      }
    });
    Best best{INFINITY, -1};
#pragma unroll
    for (int i = 0; i < kMostListed; ++i) {
      if (i < left.count) best.offer(badness<kWarp, T, C>(call, x, book, listed[i]), listed[i]);
    }
    if (threadIdx.x % kWarp == 0) conclude(call, row, best.index, left.count);
  }
}

// One block a row at a time, kLanes threads a code: rows of which slots are to be searched.
template <typename T, typename C>
__global__ void __launch_bounds__(kResolveThreads) resolve(Decision call) {
  __shared__ int listed[kMostListed];
  __shared__ Left left;
  __shared__ double badness_of_group[kGroups];
  __shared__ int index_of_group[kGroups], weighed_by_group[kGroups];
  const int group = threadIdx.x / kLanes, size = int(call.codebook.count);
  const int64_t all_rows = call.x.books * call.x.count;
  const int rows = call.undecided[1];
  for (int item = blockIdx.x; item < rows; item += gridDim.x) {
    const int64_t row = call.list[all_rows - 1 - item];
    const int book = int(row / call.x.count);
    const T* x = row_of<T>(call.x, book, int(row % call.x.count));
    if (threadIdx.x == 0) {
      left = left_of(call, row, [&](int i, int code) { listed[i] = code; });
    }
    __syncthreads();

    Best best{INFINITY, -1};
    int weighed = 0;
    const auto weigh = [&](int code) {
      best.offer(badness<kLanes, T, C>(call, x, book, code), code);
      ++weighed;
    };
    for (int i = group; i < left.count; i += kGroups) weigh(listed[i]);
    for (int split = 0; split < call.splits; ++split) {
      const Record& record = call.records[split * all_rows + row];
      if (record.open < left.lower) continue;
      const uint32_t slots = left.lower == -INFINITY ? (1u << kSlots) - 1 : record.open_slots;
      const int first = split * call.split_codes, end = min(first + call.split_codes, size);
      for (int i = group; first + i / kSlotCodes * kTileCodes < end; i += kGroups) {
        for (int slot = 0; slot < kSlots; ++slot) {
          const int of_tile = slot / 4 * 64 + i % kSlotCodes / 2 * 8 + slot % 4 * 2 + i % 2;
          const int code = first + i / kSlotCodes * kTileCodes + of_tile;
          if ((slots >> slot & 1) != 0 && code < end) weigh(code);
        }
      }
    }
    if (threadIdx.x % kLanes == 0) {
      badness_of_group[group] = best.badness;
      index_of_group[group] = best.index;
      weighed_by_group[group] = weighed;
    }
    __syncthreads();  // and `listed` and `left` are free for the next row
    if (threadIdx.x > 0) continue;
    for (int other = 1; other < kGroups; ++other) {
      best.offer(badness_of_group[other], index_of_group[other]);
      weighed += weighed_by_group[other];
    }
    conclude(call, row, best.index, weighed);
  }
}

}  // namespace vqkernels::cuda
