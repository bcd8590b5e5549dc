// From candidates to indices: most rows have one; the others are decided in float64.
#pragma once

#include "search_terms.h"

namespace vqkernels::cuda {

constexpr int kDecideThreads = 128;
constexpr int kResolveThreads = 256;
constexpr int kLanes = 8;  // threads that share one code
constexpr int kGroups = kResolveThreads / kLanes;

struct Decision {
  const Record* records;  // `[splits, books, rows]`
  const RowTerms* row_terms;
  Rows x, codebook;
  Metric metric;
  Labels labels;
  int64_t* indices;
  int splits;
  int* undecided;  // how many rows are in `list`
  int32_t* list;   // book * rows + row, in any order
};

// Beyond so many candidates of a row, all codes are.
constexpr int kMostListed = 2 * kCandidates;

// The candidates of one row over all splits, those below another's lower bound left out: how many,
// or kMostListed + 1 where any code may be the best. The first kMostListed are given to `list`.
template <typename List>
__device__ __forceinline__ int candidates_of(const Decision& call, int64_t row, const List& list) {
  const int64_t all_rows = call.x.books * call.x.count;
  float lower = -INFINITY, open = -INFINITY;
  for (int split = 0; split < call.splits; ++split) {
    const Record& record = call.records[split * all_rows + row];
    lower = fmaxf(lower, record.lower);
    open = fmaxf(open, record.open);
  }
  if (!is_finite(lower) || !(open < lower)) return kMostListed + 1;
  int count = 0;
  for (int split = 0; split < call.splits; ++split) {
    const Record& record = call.records[split * all_rows + row];
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      if (i >= record.count || !(record.upper[i] >= lower)) continue;
      if (count < kMostListed) list(count, record.index[i]);
      count = min(count + 1, kMostListed + 1);
    }
  }
  return count > 0 ? count : kMostListed + 1;
}

// One thread a row.
__global__ void __launch_bounds__(kDecideThreads) decide(Decision call) {
  const int64_t row = int64_t(blockIdx.x) * kDecideThreads + threadIdx.x;
  if (row >= call.x.books * call.x.count) return;
  const int book = int(row / call.x.count), row_of_book = int(row % call.x.count);
  int64_t* index = call.indices + place(call.labels, call.x, book, row_of_book);
  if (isnan(call.row_terms[row].scale)) {
    *index = -1;
    return;
  }
  int last = -1;
  if (candidates_of(call, row, [&](int, int code) { last = code; }) == 1) {
    *index = last;
  } else {
    call.list[atomicAdd(call.undecided, 1)] = int32_t(row);
  }
}

// How bad a code is for a row, in float64; kLanes threads share the columns. Not finite for a code
// that is not.
template <typename T, typename C>
__device__ double badness(const Decision& call, const T* x, int book, int code) {
  const C* c = row_of<C>(call.codebook, book, code);
  const int lane = threadIdx.x % kLanes;
  double sum = 0, squares = 0;
  for (int d = lane; d < int(call.x.width); d += kLanes) {
    const double of_x = element(x[d * call.x.col_stride]);
    const double of_c = element(c[d * call.codebook.col_stride]);
    sum += call.metric == Metric::l2 ? (of_x - of_c) * (of_x - of_c) : -of_x * of_c;
    squares += of_c * of_c;
  }
  const unsigned sharing = ((1u << kLanes) - 1) << (threadIdx.x % kWarp / kLanes * kLanes);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(sharing, sum, step);
    squares += __shfl_xor_sync(sharing, squares, step);
  }
  return call.metric == Metric::cosine && squares > 0 ? sum / sqrt(squares) : sum;
}

// One block a row of the list at a time.
template <typename T, typename C>
__global__ void __launch_bounds__(kResolveThreads) resolve(Decision call) {
  __shared__ int listed[kMostListed], count;
  __shared__ double least_of_group[kGroups];
  __shared__ int index_of_group[kGroups];
  const int group = threadIdx.x / kLanes, size = int(call.codebook.count);
  const int rows = *call.undecided;
  for (int item = blockIdx.x; item < rows; item += gridDim.x) {
    const int64_t row = call.list[item];
    const int book = int(row / call.x.count), row_of_book = int(row % call.x.count);
    const T* x = row_of<T>(call.x, book, row_of_book);
    if (threadIdx.x == 0) {
      count = candidates_of(call, row, [&](int i, int code) { listed[i] = code; });
    }
    __syncthreads();
    const bool any = count > kMostListed;

    double least = INFINITY;
    int index = -1;
    for (int i = group; i < (any ? size : count); i += kGroups) {
      const int code = any ? i : listed[i];
      const double bad = badness<T, C>(call, x, book, code);
      if (!(fabs(bad) < INFINITY)) continue;
      if (index < 0 || bad < least || (bad == least && code < index)) {
        least = bad;
        index = code;
      }
    }
    if (threadIdx.x % kLanes == 0) {
      least_of_group[group] = least;
      index_of_group[group] = index;
    }
    __syncthreads();  // and the list is free for the next row
    if (threadIdx.x == 0) {
      for (int other = 1; other < kGroups; ++other) {
        const int code = index_of_group[other];
        const double bad = least_of_group[other];
        if (code >= 0 && (index < 0 || bad < least || (bad == least && code < index))) {
          least = bad;
          index = code;
        }
      }
      call.indices[place(call.labels, call.x, book, row_of_book)] = index;
    }
  }
}

}  // namespace vqkernels::cuda
