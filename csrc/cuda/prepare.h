// Half-precision forms and terms of codes and rows (search_terms.h): one pass over each.
//
// Forms have `width` columns, D rounded up to a tensor-core step. For few dimensions three products
// lie side by side, and the one search computes them all:
//
//   row   high  low   high        x = high + low + dx,   |low| <= 2^-10.9 X
//   code  high  high  low         c = high + low + dc
//
// x.c less the sum is dx.c + (x - dx).dc + low.low: E = |dc| + 2^-10.9 |code's low|.
// Floor: rows and codes are read once (codes of a tile twice, the second time from a cache), 2
// bytes an element are written.
#pragma once

#include "search_terms.h"

namespace vqkernels::cuda {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / kWarp;
constexpr int kCodeWarps = 32;  // of a tile of codes
constexpr int kMostSampled = 512;
constexpr float kLowPart = 0x1p-10f;  // above 2^-10.9

// The dtype of a bias' parts beside codes that are searched as they are; fp32 never is.
template <typename T>
using HalfOf = std::conditional_t<std::is_same_v<T, float>, __half, T>;

// A vector in the middle of a book: for each column the median over kPrepareWarps means, of at most
// kMostSampled codes together. Any vector would do; this one is not drawn away by a few outliers. A
// block has 32 columns, a warp every eighth sampled code. The largest unit of the book's tiles is
// cleared for prepare_codes.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    book_centre(Rows codebook, float* centre, int* largest_unit) {
  __shared__ float means[kPrepareWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int book = blockIdx.y, column = blockIdx.x * kWarp + lane;
  if (blockIdx.x == 0 && threadIdx.x == 0) largest_unit[book] = 0;
  const int size = int(codebook.count), width = int(codebook.width);
  const int stride = (size + kMostSampled - 1) / kMostSampled;
  float sum = 0;
  int count = 0;
  if (column < width) {
    for (int64_t code = int64_t(warp) * stride; code < size; code += kPrepareWarps * stride) {
      const T* at = row_of<T>(codebook, book, int(code));
      const float value = element(at[column * codebook.col_stride]);
      if (fabsf(value) < 0x1p100f) {
        sum += value;
        ++count;
      }
    }
  }
  means[warp][lane] = count > 0 ? sum / float(count) : 0.0f;
  __syncthreads();
  if (warp > 0 || column >= width) return;
  for (int i = 0; i < kPrepareWarps; ++i) {
    int before = 0;  // means that stand before this one in order
    for (int other = 0; other < kPrepareWarps; ++other) {
      const float difference = means[other][lane] - means[i][lane];
      before += difference < 0 || (difference == 0 && other < i);
    }
    if (before == kPrepareWarps / 2) centre[int64_t(book) * width + column] = means[i][lane];
  }
}

struct CodeForms {
  Rows codebook;
  const float* centre;  // null: m = 0
  int* largest_unit;    // `[books]`, bits of the largest 2^f; null without biases or forms
  Metric metric;
  int terms;  // products side by side: 1 or 3; 0: codes are searched as they are, not for cosine
  int width;
  int chunks;  // 0: forms are rows of `width` columns; else tiles as search_warpgroups reads them
  uint16_t*
      forms;    // halves, `[books, tiles * kTileCodes, width]`; null where the book itself is read
  Tile* tiles;  // `[books, tiles]`
  CodeTerms* terms_of_codes;  // `[books, tiles * kTileCodes]`
  int* undecided;             // two counters to clear
};

// One entry of a code, less the centre, and divided by the norm under cosine.
struct CodeEntry {
  float centre;
  double inverse;

  __device__ float operator()(float entry) const {
    return float((double(entry) - centre) * inverse);
  }
};

// What is summed over the entries of a code, by one warp.
struct CodeSums {
  float largest = 0;
  double squares = 0;
  bool finite = true;
};

template <typename T>
__device__ CodeSums sums_of_code(const CodeForms& call, int book, int code) {
  CodeSums sums;
  const T* at = row_of<T>(call.codebook, book, code);
  const int dim = int(call.codebook.width);
#pragma unroll 4
  for (int d = threadIdx.x % kWarp; d < dim; d += kWarp) {
    const float entry = element(at[d * call.codebook.col_stride]);
    const float m = call.centre == nullptr ? 0.0f : call.centre[int64_t(book) * dim + d];
    const double centred = double(entry) - m;
    sums.finite = sums.finite && is_finite(entry);
    sums.largest = fmaxf(sums.largest, fabsf(float(centred)));
    sums.squares += centred * centred;
  }
  sums.finite = __all_sync(kWholeWarp, sums.finite && is_finite(sums.largest));
  sums.largest = warp_max(sums.largest);
  sums.squares = warp_sum(sums.squares);
  return sums;
}

// Where the columns of one code's form lie.
struct FormOfCode {
  uint16_t* forms;
  int64_t tile;  // of all books'
  int code, width, chunks;

  __device__ int columns() const { return chunks > 0 ? chunks * kChunk : width; }
  __device__ uint16_t& operator()(int column) const {
    if (chunks == 0) return forms[(tile * kTileCodes + code) * width + column];
    const int64_t chunk = tile * chunks + column / kChunk;
    const int piece = column % kChunk / kPiece ^ (code & 7);
    return forms[(chunk * kTileCodes + code) * kChunk + piece * kPiece + column % kPiece];
  }
};

// Writes a code's form, by one warp; returns its norm and error.
template <typename T>
__device__ CodeTerms write_form(const CodeForms& call, int book, int code, double inverse,
                                float scale, bool wins, const FormOfCode& form) {
  const T* at = row_of<T>(call.codebook, book, code);
  const int dim = int(call.codebook.width);
  const float down = 1.0f / scale;
  float norm = 0, error = 0, low_norm = 0;
  for (int d = threadIdx.x % kWarp; d < form.columns(); d += kWarp) {
    if (d >= dim) {
      if (d >= call.terms * dim) form(d) = 0;
      continue;
    }
    float value = 0;
    if (wins) {
      const float m = call.centre == nullptr ? 0.0f : call.centre[int64_t(book) * dim + d];
      value = CodeEntry{m, inverse}(element(at[d * call.codebook.col_stride])) * down;
    }
    const __half high = __float2half_rn(value);
    float rest = value - __half2float(high);
    form(d) = bits_of(high);
    if (call.terms == 3) {
      const __half low = __float2half_rn(rest);
      form(dim + d) = bits_of(high);
      form(2 * dim + d) = bits_of(low);
      low_norm += __half2float(low) * __half2float(low);
      rest -= __half2float(low);
    }
    norm += value * value;
    error += rest * rest;
  }
  norm = sqrtf(warp_sum(norm)) * kUp;
  // value itself is c' 2^-f but for one rounding.
  error = sqrtf(warp_sum(error)) * kUp + 0x1p-23f * norm + 0x1p-60f;
  if (call.terms == 3) error += kLowPart * kUp * sqrtf(warp_sum(low_norm));
  return {0, norm + error, error, 0};
}

// A code as it is, by one warp; -1: zeros.
template <typename T>
__device__ void copy_code(const CodeForms& call, int book, int code, const FormOfCode& form) {
  if constexpr (!std::is_same_v<T, float>) {
    const T* at = row_of<T>(call.codebook, book, max(code, 0));
    for (int d = threadIdx.x % kWarp; d < form.columns(); d += kWarp) {
      form(d) = code >= 0 && d < int(call.codebook.width) ? bits_of(at[d]) : uint16_t(0);
    }
  }
}

// Writes the parts of -bias of code i of a tile, by one warp; returns what they leave of it, +inf
// where they cannot hold it. A bias of +inf is one.
template <typename Half, bool kScreened>
__device__ float write_bias(Tile& tile, int i, double bias) {
  const int lane = threadIdx.x % kWarp;
  const bool finite = bias < double(INFINITY);
  double rest = finite ? bias : 0;
  float part_of_lane = !finite && lane == 0 ? -INFINITY : 0.0f;
#pragma unroll
  for (int part = 0; part < kBiasParts; ++part) {
    constexpr float kNone = 0.0f;
    const float multiplier = bias_multiplier<Half, kScreened>(part);
    if (multiplier == kNone || !finite) continue;
    const float value = element(rounded<Half>(float(rest / multiplier)));
    if (!is_finite(value)) return INFINITY;
    rest -= double(value) * multiplier;
    if (lane == part) part_of_lane = -value;
  }
  if (lane < kStep) tile.bias[bias_at(i, lane)] = bits_of(rounded<Half>(part_of_lane));
  return fabsf(float(rest));
}

// The largest terms of some codes, and whether they speak for the others.
struct TileSums {
  CodeTerms most, sum;
  int count;

  __device__ void add(const CodeTerms& terms) { add({terms, terms, 1}); }
  __device__ void add(const TileSums& other) {
    most = {fmaxf(most.bias, other.most.bias), fmaxf(most.norm, other.most.norm),
            fmaxf(most.error, other.most.error), 0};
    sum = {sum.bias + other.sum.bias, sum.norm + other.sum.norm, sum.error + other.sum.error, 0};
    count += other.count;
  }
  __device__ int mixed() const {
    const float most_of_mean = 8.0f / float(max(count, 1));
    return most.norm > most_of_mean * sum.norm || most.bias > 8 * most_of_mean * sum.bias ||
           most.error > most_of_mean * sum.error || !is_finite(most.error);
  }
};

// One block a tile of codes.
template <typename T>
__global__ void __launch_bounds__(kCodeWarps* kWarp) prepare_codes(CodeForms call) {
  __shared__ float largest_of_warp[kCodeWarps];
  __shared__ TileSums sums_of_warp[kCodeWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tile = blockIdx.x, book = blockIdx.y, size = int(call.codebook.count);
  Tile& out = call.tiles[int64_t(book) * gridDim.x + tile];
  if (tile == 0 && book == 0 && threadIdx.x < 2) call.undecided[threadIdx.x] = 0;
  const bool unit = call.metric == Metric::cosine;

  float largest = 0;
  if (call.terms > 0) {
    for (int i = warp; i < kTileCodes && tile * kTileCodes + i < size; i += kCodeWarps) {
      const CodeSums sums = sums_of_code<T>(call, book, tile * kTileCodes + i);
      if (!sums.finite) continue;
      const double norm = unit && sums.squares > 0 ? sqrt(sums.squares) : 1.0;
      largest = fmaxf(largest, float(sums.largest / norm));
    }
    if (lane == 0) largest_of_warp[warp] = largest;
    __syncthreads();
    for (int other = 0; other < kCodeWarps; ++other) {
      largest = fmaxf(largest, largest_of_warp[other]);
    }
  }
  const float scale = call.terms > 0 && largest > 0 ? power_below(largest) : 1.0f;

  TileSums all{};
  for (int i = warp; i < kTileCodes; i += kCodeWarps) {
    const int code = tile * kTileCodes + i;
    CodeSums sums;
    sums.finite = false;
    if (code < size) sums = sums_of_code<T>(call, book, code);
    const double norm = sqrt(sums.squares);
    const double inverse = unit && norm > 0 ? 1.0 / norm : 1.0;
    const FormOfCode form{call.forms, int64_t(book) * gridDim.x + tile, i, call.width, call.chunks};
    CodeTerms terms{};
    double bias = double(INFINITY);
    if (call.terms > 0) {
      const CodeTerms written = write_form<T>(call, book, code, inverse, scale, sums.finite, form);
      if (sums.finite) terms = written;
    } else {
      if (call.chunks > 0) copy_code<T>(call, book, code < size ? code : -1, form);
    }
    if (call.terms == 0 && sums.finite) {
      terms.norm = float(norm) * kUp;
      // Products with such a code may leave the range of fp32.
      terms.error = norm < kLargestNorm ? 0.0f : INFINITY;
    }
    if (sums.finite) {
      bias = call.metric == Metric::l2 ? sums.squares / 2 / (double(scale) * scale) : 0.0;
    }
    const float rest = call.terms > 0 ? write_bias<__half, true>(out, i, bias)
                                      : write_bias<HalfOf<T>, false>(out, i, bias);
    if (sums.finite) {
      if (!is_finite(rest)) terms.error = INFINITY;
      terms.bias = (kPerStep * float(fmin(bias, 3.0e38)) + fminf(rest, 1)) * kUp;
      all.add(terms);
    } else {
      terms.bias = INFINITY;
    }
    if (lane == 0) {
      call.terms_of_codes[(int64_t(book) * gridDim.x + tile) * kTileCodes + i] = terms;
    }
  }
  if (lane == 0) sums_of_warp[warp] = all;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kCodeWarps; ++other) all.add(sums_of_warp[other]);
    out.all = {all.most, scale, all.mixed(), {}};
    if (call.largest_unit != nullptr) {
      atomicMax(call.largest_unit + book, int(__float_as_uint(scale)));
    }
  }
}

struct RowForms {
  Rows x;
  const float* centre;
  const int* largest_unit;
  int terms;
  int width;
  __half* forms;  // `[books, rows, width]`; null for terms = 0
  RowTerms* terms_of_row;
};

// One warp a row.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows(RowForms call) {
  const int lane = threadIdx.x % kWarp, book = blockIdx.y;
  const int64_t row = int64_t(blockIdx.x) * kPrepareWarps + threadIdx.x / kWarp;
  if (row >= call.x.count) return;
  const T* at = row_of<T>(call.x, book, int(row));
  const float* centre = call.centre == nullptr ? nullptr : call.centre + book * call.x.width;
  const int dim = int(call.x.width);
  const int64_t place_of_row = int64_t(book) * call.x.count + row;

  bool finite = true;
  float largest = 0, norm = 0;
  for (int d = lane; d < dim; d += kWarp) {
    const float entry = element(at[d * call.x.col_stride]);
    const float value = centre == nullptr ? entry : entry - centre[d];
    finite = finite && is_finite(entry);
    largest = fmaxf(largest, fabsf(value));
    norm += value * value;
  }
  finite = __all_sync(kWholeWarp, finite);
  largest = warp_max(largest);
  const int steps = (call.width + kStep - 1) / kStep;
  if (call.terms == 0) {
    norm = warp_sum(norm);
    if (lane == 0) {
      call.terms_of_row[place_of_row] = terms_of_halves(norm, finite, largest == 0, steps);
    }
    return;
  }

  const bool known = finite && is_finite(largest);
  // A row that is far shorter than a code is left small beside it, so that halves hold w.
  float least = 0;
  if (call.largest_unit != nullptr) {
    least = __uint_as_float(unsigned(call.largest_unit[book])) / kMostWeight;
  }
  const float scale = fmaxf(largest > 0 ? power_below(largest) : 1.0f, least);
  const float down = 1.0f / scale;
  __half* form = call.forms + place_of_row * call.width;
  float error = 0;
  norm = 0;
  for (int d = lane; d < call.width; d += kWarp) {
    if (d >= dim) {
      if (d >= call.terms * dim) form[d] = __float2half_rn(0.0f);
      continue;
    }
    float value = 0;
    if (known) {
      const float entry = element(at[d * call.x.col_stride]);
      value = (centre == nullptr ? entry : entry - centre[d]) * down;
    }
    const __half high = __float2half_rn(value);
    float rest = value - __half2float(high);
    form[d] = high;
    if (call.terms == 3) {
      const __half low = __float2half_rn(rest);
      form[dim + d] = low;
      form[2 * dim + d] = high;
      rest -= __half2float(low);
    }
    norm += value * value;
    error += rest * rest;
  }
  norm = fmaxf(sqrtf(warp_sum(norm)) * kUp, 0x1p-60f);
  const float of_sum = kPerStep * float(steps + 1);
  error = sqrtf(warp_sum(error)) * kUp + (0x1p-23f + of_sum) * norm + 0x1p-60f;
  if (lane == 0) {
    call.terms_of_row[place_of_row] = {finite ? down : NAN, known ? error : INFINITY, norm, 0};
  }
}

}  // namespace vqkernels::cuda
