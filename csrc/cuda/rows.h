// Rows of a `Rows` as kernels reach them: addresses, elements, and warp-wide sums.
#pragma once

#include "language.h"
#include "problem.h"

namespace vqkernels::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float element(float value) { return value; }
__device__ __forceinline__ float element(__half value) { return __half2float(value); }
__device__ __forceinline__ float element(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Half>
__device__ __forceinline__ Half half_of_bits(uint16_t bits) {
  Half half;
  memcpy(&half, &bits, sizeof(half));
  return half;
}

template <typename Half>
__device__ __forceinline__ uint16_t bits_of(Half half) {
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ T rounded(float value);
template <>
__device__ __forceinline__ float rounded<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two halves as a register of a tensor-core operand has them, the first one low.
template <typename Half>
__device__ __forceinline__ uint32_t pair_of(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair_of<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pair_of<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Where row `row` of book `book` lies, in elements. Evenly spaced rows cost no division.
__device__ __forceinline__ int64_t place(const int64_t (&strides)[3], int64_t book_stride,
                                         int64_t middle, int64_t inner, int book, int row) {
  const int64_t start = book * book_stride;
  if (middle == 1 && inner == 1) return start + row * strides[0];
  const unsigned n = unsigned(inner), m = unsigned(middle), rest = unsigned(row) / n;
  return start + int64_t(rest / m) * strides[0] + int64_t(rest % m) * strides[1] +
         int64_t(unsigned(row) % n) * strides[2];
}

__device__ __forceinline__ int64_t place(const Rows& rows, int book, int row) {
  return place(rows.strides, rows.book_stride, rows.middle, rows.inner, book, row);
}

// Labels lie on the grid of `rows`.
__device__ __forceinline__ int64_t place(const Labels& labels, const Rows& rows, int book,
                                         int row) {
  return place(labels.strides, labels.book_stride, rows.middle, rows.inner, book, row);
}

template <typename T>
__device__ __forceinline__ T* row_of(const Rows& rows, int book, int row) {
  return static_cast<T*>(rows.data) + place(rows, book, row);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, step));
  }
  return value;
}

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < INFINITY; }

inline int blocks_for(int64_t count, int64_t each) { return int((count + each - 1) / each); }

template <typename T>
struct Type {
  using type = T;
};

// Calls f with the Type that `dtype` names.
template <typename F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::f16) return f(Type<__half>());
  if (dtype == DType::bf16) return f(Type<__nv_bfloat16>());
  return f(Type<float>());
}

// Calls f with the types of rows and codes: one type, or a float book.
template <typename F>
void with_types(DType rows, DType codes, const F& f) {
  with_type(rows, [&](auto type) {
    if (codes == DType::f32) return f(type, Type<float>());
    f(type, type);
  });
}

}  // namespace vqkernels::cuda
