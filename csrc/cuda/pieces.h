// Elements as kernels move them: in pieces of 16 bytes, or one by one, of a type known at run time.
#pragma once

#include <algorithm>

#include "rows.h"

namespace vqkernels::cuda {

// Neighbouring elements, read at once.
template <typename T, int kCount>
struct alignas(std::min(size_t(16), sizeof(T) * kCount)) Packed {
  T values[kCount];
};

template <typename T>
constexpr int kPiece = 16 / int(sizeof(T));

template <int kCount, typename T>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, kCount>*>(from);
}

template <typename T, int kCount>
__device__ __forceinline__ void load(const T* from, float (&values)[kCount]) {
  const auto packed = load_packed<kCount>(from);
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] = element(packed.values[e]);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const float (&values)[kCount]) {
  Packed<T, kCount> packed;
#pragma unroll
  for (int e = 0; e < kCount; ++e) packed.values[e] = rounded<T>(values[e]);
  *reinterpret_cast<Packed<T, kCount>*>(to) = packed;
}

// Calls f with the Type that `dtype` names, in a kernel.
template <typename F>
__device__ __forceinline__ void on_type(DType dtype, const F& f) {
  if (dtype == DType::f16) return f(Type<__half>());
  if (dtype == DType::bf16) return f(Type<__nv_bfloat16>());
  f(Type<float>());
}

__device__ __forceinline__ float element_of(const void* data, DType dtype, int64_t at) {
  float value = 0;
  on_type(dtype, [&](auto type) {
    value = element(static_cast<const typename decltype(type)::type*>(data)[at]);
  });
  return value;
}

__device__ __forceinline__ void set_element(void* data, DType dtype, int64_t at, float value) {
  on_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(data)[at] = rounded<T>(value);
  });
}

}  // namespace vqkernels::cuda
