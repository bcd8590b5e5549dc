// What a vector quantizer does around its search: codes, losses and counts, and the gradients.
//
// Floors: write_codes reads x and the chosen codes once and writes the result once; grad_x the same
// with the incoming gradient; the book's gradient reads each row once, and 12 bytes that say where
// it belongs. Losses and sums of gradients are formed in float64 and in one order that the shapes
// fix; counts are integers. So the bits are the same on every run and every device.
#include <algorithm>
#include <type_traits>

#include "quantize.h"
#include "rows.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockRows = 64;  // of write_codes and grad_x
constexpr int kChunk = 64;      // rows of one partial sum of a book's gradient

// Several neighbouring elements, read at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T values[kCount];
};
constexpr int kPiece = 4;

template <int kCount, typename T>
__device__ __forceinline__ void read(const T* row, int64_t stride, int column,
                                     float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = element(row[column * stride]);
  } else {
    const auto piece = *reinterpret_cast<const Piece<T, kCount>*>(row + column);
    for (int i = 0; i < kCount; ++i) values[i] = element(piece.values[i]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void write(T* row, int64_t stride, int column,
                                      const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    row[column * stride] = rounded<T>(values[0]);
  } else {
    Piece<T, kCount> piece;
    for (int i = 0; i < kCount; ++i) piece.values[i] = rounded<T>(values[i]);
    *reinterpret_cast<Piece<T, kCount>*>(row + column) = piece;
  }
}

// Calls f with kPiece or 1 as a constant.
template <typename F>
void with_pieces(bool pieces, const F& f) {
  if (pieces) return f(std::integral_constant<int, kPiece>());
  f(std::integral_constant<int, 1>());
}

bool has_pieces(const Rows& rows) {
  if (rows.data == nullptr) return true;
  const int64_t bytes = kPiece * (rows.dtype == DType::f32 ? 4 : 2);
  const bool even = rows.width % kPiece == 0 && rows.book_stride % kPiece == 0 &&
                    rows.strides[0] % kPiece == 0 && rows.strides[1] % kPiece == 0 &&
                    rows.strides[2] % kPiece == 0;
  return even && rows.col_stride == 1 && reinterpret_cast<uintptr_t>(rows.data) % bytes == 0;
}

// Threads that share a row: a power of two that holds its pieces, at most a warp.
int sharing(int64_t width, int piece) {
  int lanes = 4;
  while (lanes < kWarp && lanes * piece < width) lanes *= 2;
  return lanes;
}

// The same sum in each of `lanes` neighbouring threads.
template <typename T>
__device__ __forceinline__ T shared_sum(T value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

struct WriteCodes {
  Rows x, codebook, quantized;
  Labels labels;
  int64_t* indices;
  const uint8_t* mask;
  int* counts;           // `[books, K]`, zeros
  double* partial_loss;  // one a block
  int* partial_rows;
  int lanes;
};

template <typename T, typename C, int kCount>
__global__ void __launch_bounds__(kThreads) write_codes(WriteCodes call) {
  __shared__ double loss_of_group[kThreads / 4];
  __shared__ int rows_of_group[kThreads / 4];
  const int lane = threadIdx.x % call.lanes, group = threadIdx.x / call.lanes;
  const int groups = kThreads / call.lanes, book = blockIdx.y;
  const int width = int(call.x.width);
  double loss = 0;
  int found = 0;
  for (int i = group; i < kBlockRows; i += groups) {
    const int64_t row = int64_t(blockIdx.x) * kBlockRows + i;
    const bool inside = row < call.x.count;
    const int64_t at = inside ? place(call.labels, call.x, book, int(row)) : 0;
    const bool kept = !inside || call.mask == nullptr || call.mask[at] != 0;
    const int64_t index = inside && kept ? call.indices[at] : -1;
    if (!kept && lane == 0) call.indices[at] = -1;
    float sum = 0;
    if (inside) {
      const T* x = row_of<T>(call.x, book, int(row));
      T* out = row_of<T>(call.quantized, book, int(row));
      const C* code = row_of<C>(call.codebook, book, int(max(index, int64_t(0))));
      for (int d = lane * kCount; d < width; d += call.lanes * kCount) {
        float from[kCount], to[kCount];
        read<kCount>(x, call.x.col_stride, d, from);
        if (index >= 0) read<kCount>(code, call.codebook.col_stride, d, to);
        for (int e = 0; e < kCount; ++e) {
          if (index < 0) {
            to[e] = kept ? NAN : 0.0f;
          } else {
            sum = fmaf(from[e] - to[e], from[e] - to[e], sum);
          }
        }
        write<kCount>(out, call.quantized.col_stride, d, to);
      }
    }
    loss += shared_sum(sum, call.lanes);
    if (index < 0) continue;
    ++found;
    if (lane == 0) atomicAdd(call.counts + int64_t(book) * call.codebook.count + index, 1);
  }
  if (lane == 0) {
    loss_of_group[group] = loss;
    rows_of_group[group] = found;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < groups; ++other) {
      loss += loss_of_group[other];
      found += rows_of_group[other];
    }
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    call.partial_loss[block] = loss;
    call.partial_rows[block] = found;
  }
}

struct Close {
  const int* integer_counts;
  float* counts;
  int64_t codes;  // of all books
  const double* partial_loss;
  const int* partial_rows;
  int partials;
  int64_t width;
  float *commitment_loss, *codebook_loss;
};

// Counts as floats; the first block also adds up the losses.
__global__ void __launch_bounds__(kThreads) close_losses(Close call) {
  __shared__ double losses[kThreads];
  __shared__ int rows[kThreads];
  const int64_t code = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (code < call.codes) call.counts[code] = float(call.integer_counts[code]);
  if (blockIdx.x > 0) return;
  double loss = 0;
  int found = 0;
  for (int i = threadIdx.x; i < call.partials; i += kThreads) {
    loss += call.partial_loss[i];
    found += call.partial_rows[i];
  }
  losses[threadIdx.x] = loss;
  rows[threadIdx.x] = found;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int other = 1; other < kThreads; ++other) {
    loss += losses[other];
    found += rows[other];
  }
  const float mean = float(loss / (double(max(found, 1)) * double(call.width)));
  *call.commitment_loss = mean;
  *call.codebook_loss = mean;
}

__global__ void __launch_bounds__(kThreads)
    count_rows(Rows x, Labels labels, const int64_t* indices, int* found) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool has = row < x.count && indices[place(labels, x, blockIdx.y, int(row))] >= 0;
  const unsigned votes = __ballot_sync(kWholeWarp, has);
  if (threadIdx.x % kWarp == 0 && votes != 0) atomicAdd(found, __popc(votes));
}

struct GradX {
  QuantizeBackwardX of;
  const int* found;
  int lanes;
};

// What turns the gradient of a code into that of its row: passed * g + of_x * x + of_code * code.
struct Mixture {
  float passed, of_x, of_code;
};

// lambda (g - 2 w (w.g) + 2 u (v.g)), as vqkernels/reference/quantize.py writes it, from the sums
// over a row's columns.
__device__ __forceinline__ Mixture rotation(double xx, double cc, double xc, double gx, double gc) {
  const double size = sqrt(cc);
  const double norm_x = fmax(sqrt(xx), 1e-6), norm_c = fmax(size, 1e-6);
  const double ux = 1 / norm_x, vc = 1 / norm_c, lambda = size * ux;
  const double between = xx * ux * ux + 2 * xc * ux * vc + cc * vc * vc;
  const double norm_w = fmax(sqrt(fmax(between, 0.0)), 1e-6);
  const double along = (gx * ux + gc * vc) / (norm_w * norm_w);
  return {float(lambda), float(lambda * 2 * (gc * vc - along) * ux),
          float(-lambda * 2 * along * vc)};
}

template <typename T, typename C, int kCount>
__global__ void __launch_bounds__(kThreads) grad_x(GradX call) {
  const QuantizeBackwardX& of = call.of;
  const int lane = threadIdx.x % call.lanes, group = threadIdx.x / call.lanes;
  const int groups = kThreads / call.lanes, book = blockIdx.y, width = int(of.x.width);
  const bool passed = of.grad_quantized.data != nullptr && of.gradient != Gradient::none;
  const bool turned = passed && of.gradient == Gradient::rotation;
  float pull = 0;
  if (of.grad_commitment != nullptr) {
    pull = float(2.0 * double(*of.grad_commitment) / (double(max(*call.found, 1)) * double(width)));
  }
  for (int i = group; i < kBlockRows; i += groups) {
    const int64_t row = int64_t(blockIdx.x) * kBlockRows + i;
    const bool inside = row < of.x.count;
    const int64_t index = inside ? of.indices[place(of.labels, of.x, book, int(row))] : -1;
    const bool used = index >= 0;
    const T* x = nullptr;
    const T* gradient = nullptr;
    const C* code = nullptr;
    if (used) {
      x = row_of<T>(of.x, book, int(row));
      code = row_of<C>(of.codebook, book, int(index));
      if (passed) gradient = row_of<T>(of.grad_quantized, book, int(row));
    }
    float of_x[kCount], of_code[kCount], of_gradient[kCount];
    Mixture mix{passed ? 1.0f : 0.0f, 0, 0};
    if (turned) {
      double xx = 0, cc = 0, xc = 0, gx = 0, gc = 0;
      for (int d = lane * kCount; used && d < width; d += call.lanes * kCount) {
        read<kCount>(x, of.x.col_stride, d, of_x);
        read<kCount>(code, of.codebook.col_stride, d, of_code);
        read<kCount>(gradient, of.grad_quantized.col_stride, d, of_gradient);
        for (int e = 0; e < kCount; ++e) {
          const double a = of_x[e], b = of_code[e], g = of_gradient[e];
          xx += a * a;
          cc += b * b;
          xc += a * b;
          gx += g * a;
          gc += g * b;
        }
      }
      mix = rotation(shared_sum(xx, call.lanes), shared_sum(cc, call.lanes),
                     shared_sum(xc, call.lanes), shared_sum(gx, call.lanes),
                     shared_sum(gc, call.lanes));
    }
    if (!inside) continue;
    T* out = row_of<T>(of.grad_x, book, int(row));
    for (int d = lane * kCount; d < width; d += call.lanes * kCount) {
      float result[kCount] = {};
      if (used) {
        read<kCount>(x, of.x.col_stride, d, of_x);
        read<kCount>(code, of.codebook.col_stride, d, of_code);
        if (passed) read<kCount>(gradient, of.grad_quantized.col_stride, d, of_gradient);
        for (int e = 0; e < kCount; ++e) {
          result[e] = pull * (of_x[e] - of_code[e]);
          if (passed) result[e] = fmaf(mix.passed, of_gradient[e], result[e]);
          if (turned) result[e] = fmaf(mix.of_x, of_x[e], fmaf(mix.of_code, of_code[e], result[e]));
        }
      }
      write<kCount>(out, of.grad_x.col_stride, d, result);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    write_keys(Rows x, Labels labels, const int64_t* indices, int codebook_size, int32_t* keys) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= x.count) return;
  const int book = blockIdx.y;
  const int64_t index = indices[place(labels, x, book, int(row))];
  const bool valid = index >= 0 && index < codebook_size;
  keys[book * x.count + row] = valid ? int32_t(book * int64_t(codebook_size) + index) : -1;
}

struct BookGradient {
  QuantizeBackwardCodebook of;
  int rows, chunks;     // of all books
  float* factor;        // grad_codebook_loss * 2 / elements
  double *head, *tail;  // `[chunks, D]`: sums of a chunk's first rows that belong to a code begun
                        // before it, and of its last rows whose code goes on behind it
};

__global__ void __launch_bounds__(kThreads) book_factor(BookGradient call) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= call.rows) return;
  const int32_t* keys = call.of.keys;
  // The rows that have a code are those from the first key that is not -1 on.
  const bool first = keys[i] >= 0 && (i == 0 || keys[i - 1] < 0);
  const bool none = i == call.rows - 1 && keys[i] < 0;
  if (!first && !none) return;
  const double elements = double(call.rows - i) * double(call.of.x.width);
  *call.factor = none ? 0.0f : float(2.0 * double(*call.of.grad_codebook_loss) / elements);
}

template <typename C>
__device__ __forceinline__ void write_gradient(const BookGradient& call, int key, int column,
                                               double sum) {
  C* grad = static_cast<C*>(call.of.grad_codebook.data);
  grad[int64_t(key) * call.of.x.width + column] = rounded<C>(float(sum * double(*call.factor)));
}

// One chunk of sorted rows and a column a thread.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) sum_chunks(BookGradient call) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= call.of.x.width) return;
  const int32_t* keys = call.of.keys;
  const int begin = blockIdx.x * kChunk, end = min(begin + kChunk, call.rows);
  const int size = int(call.of.codebook.count);
  const int64_t out = int64_t(blockIdx.x) * call.of.x.width + column;
  const bool goes_on = end < call.rows && keys[end] == keys[end - 1];
  bool began_before = begin > 0 && keys[begin - 1] == keys[begin];
  int key = -1;
  float code = 0;
  double sum = 0;
  const auto close = [&] {
    if (began_before) {
      call.head[out] = sum;
    } else if (key >= 0) {
      write_gradient<C>(call, key, column, sum);
    }
    began_before = false;
  };
  for (int at = begin; at < end; ++at) {
    const int next = keys[at];
    if (at > begin && next != key) close();
    if (at == begin || next != key) {
      key = next;
      sum = 0;
      if (key >= 0) {
        const C* row = row_of<C>(call.of.codebook, key / size, key % size);
        code = element(row[column * call.of.codebook.col_stride]);
      }
    }
    if (key < 0) continue;
    const int64_t place_of_row = call.of.order[at];
    const int64_t count = call.of.x.count;
    const T* x = row_of<T>(call.of.x, int(place_of_row / count), int(place_of_row % count));
    sum += double(code) - double(element(x[column * call.of.x.col_stride]));
  }
  if (goes_on && !began_before) {
    call.tail[out] = sum;
  } else {
    close();
  }
}

// Adds up the codes whose rows lie in several chunks; the chunk that has the first rows does it.
template <typename C>
__global__ void __launch_bounds__(kThreads) join_chunks(BookGradient call) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= call.of.x.width) return;
  const int32_t* keys = call.of.keys;
  const int begin = blockIdx.x * kChunk, end = begin + kChunk;
  if (end >= call.rows) return;
  const int key = keys[end];
  const bool begins_here = keys[begin] != key || begin == 0 || keys[begin - 1] != key;
  if (key < 0 || keys[end - 1] != key || !begins_here) return;
  double sum = call.tail[int64_t(blockIdx.x) * call.of.x.width + column];
  for (int chunk = blockIdx.x + 1; chunk < call.chunks; ++chunk) {
    if (keys[chunk * kChunk] != key) break;
    sum += call.head[int64_t(chunk) * call.of.x.width + column];
    const int next = (chunk + 1) * kChunk;
    if (next >= call.rows || keys[next - 1] != key) break;
  }
  write_gradient<C>(call, key, column, sum);
}

int column_threads(int64_t width) {
  return int(std::min<int64_t>(kThreads, (width + kWarp - 1) / kWarp * kWarp));
}

}  // namespace

void quantize(const Quantize& problem, const Context& context) {
  const NearestCode& search = problem.search;
  const Rows &x = search.x, &codebook = search.codebook;
  nearest_code(search, context);

  const int64_t codes = x.books * codebook.count;
  const dim3 grid(blocks_for(x.count, kBlockRows), unsigned(x.books));
  const int blocks = int(grid.x * grid.y);
  const bool pieces = has_pieces(x) && has_pieces(codebook) && has_pieces(problem.quantized);
  WriteCodes write{x, codebook, problem.quantized, search.labels, search.indices, problem.mask};
  write.counts = context.array<int>(codes);
  write.partial_loss = context.array<double>(blocks);
  write.partial_rows = context.array<int>(blocks);
  write.lanes = sharing(x.width, pieces ? kPiece : 1);
  check(cudaMemsetAsync(write.counts, 0, codes * sizeof(int), context.stream), "counts");
  with_types(x.dtype, codebook.dtype, [&](auto row, auto code) {
    using T = typename decltype(row)::type;
    using C = typename decltype(code)::type;
    if (blocks == 0) return;
    with_pieces(pieces, [&](auto count) {
      VQKERNELS_LAUNCH((write_codes<T, C, decltype(count)::value>), grid, dim3(kThreads), 0,
                       context.stream)
      (write);
    });
  });
  const Close close{write.counts,         problem.counts, codes,   write.partial_loss,
                    write.partial_rows,   blocks,         x.width, problem.commitment_loss,
                    problem.codebook_loss};
  VQKERNELS_LAUNCH(close_losses, dim3(blocks_for(codes, kThreads)), dim3(kThreads), 0,
                   context.stream)
  (close);
}

void quantize_backward_x(const QuantizeBackwardX& problem, const Context& context) {
  const Rows& x = problem.x;
  if (x.books * x.count == 0) return;
  const unsigned books = unsigned(x.books);
  const bool pieces = has_pieces(x) && has_pieces(problem.codebook) &&
                      has_pieces(problem.grad_quantized) && has_pieces(problem.grad_x);
  int* found = context.array<int>(1);
  if (problem.grad_commitment != nullptr) {
    check(cudaMemsetAsync(found, 0, sizeof(int), context.stream), "found");
    VQKERNELS_LAUNCH(count_rows, dim3(blocks_for(x.count, kThreads), books), dim3(kThreads), 0,
                     context.stream)
    (x, problem.labels, problem.indices, found);
  }
  const GradX call{problem, found, sharing(x.width, pieces ? kPiece : 1)};
  with_types(x.dtype, problem.codebook.dtype, [&](auto row, auto code) {
    using T = typename decltype(row)::type;
    using C = typename decltype(code)::type;
    with_pieces(pieces, [&](auto count) {
      VQKERNELS_LAUNCH((grad_x<T, C, decltype(count)::value>),
                       dim3(blocks_for(x.count, kBlockRows), books), dim3(kThreads), 0,
                       context.stream)
      (call);
    });
  });
}

void code_keys(const Rows& x, const Labels& labels, const int64_t* indices, int64_t codebook_size,
               int32_t* keys, const Context& context) {
  if (x.books * x.count == 0) return;
  VQKERNELS_LAUNCH(write_keys, dim3(blocks_for(x.count, kThreads), unsigned(x.books)),
                   dim3(kThreads), 0, context.stream)
  (x, labels, indices, int(codebook_size), keys);
}

void quantize_backward_codebook(const QuantizeBackwardCodebook& problem, const Context& context) {
  const Rows& x = problem.x;
  const Rows& grad = problem.grad_codebook;
  const int64_t rows = x.books * x.count;
  const int64_t bytes = grad.books * grad.count * grad.width * (grad.dtype == DType::f32 ? 4 : 2);
  check(cudaMemsetAsync(grad.data, 0, bytes, context.stream), "grad_codebook");
  if (rows == 0) return;
  BookGradient call{problem, int(rows), blocks_for(rows, kChunk), context.array<float>(1)};
  call.head = context.array<double>(call.chunks * x.width);
  call.tail = context.array<double>(call.chunks * x.width);
  VQKERNELS_LAUNCH(book_factor, dim3(blocks_for(rows, kThreads)), dim3(kThreads), 0, context.stream)
  (call);
  const int threads = column_threads(x.width);
  const dim3 grid(unsigned(call.chunks), unsigned(blocks_for(x.width, threads)));
  with_types(x.dtype, problem.codebook.dtype, [&](auto row, auto code) {
    using T = typename decltype(row)::type;
    using C = typename decltype(code)::type;
    VQKERNELS_LAUNCH((sum_chunks<T, C>), grid, dim3(threads), 0, context.stream)(call);
    VQKERNELS_LAUNCH(join_chunks<C>, grid, dim3(threads), 0, context.stream)(call);
  });
}

}  // namespace vqkernels::cuda
