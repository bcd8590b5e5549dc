// CUDA C++ for the compiler of the CPU: keywords, built-in variables, intrinsics. Each CUDA thread
// is a fiber; what a GPU leaves undefined is a fault with the kernel's file and line.
//
// Not here: texture, streams and events, dynamic parallelism, cooperative groups, inline PTX.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_emulation_core.h"
#include "cuda_emulation_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after another, so one copy serves them all. The guard keeps what lies beyond an
// array's end from being another array, and by its name memory checks know the functions whose
// static variables are shared memory.
#define __shared__ EMULATION_GUARD(__COUNTER__) static
#define EMULATION_GUARD(number) EMULATION_GUARD_NAMED(number)
#define EMULATION_GUARD_NAMED(number) \
  static __attribute__((used)) char emulation_guard_##number[256];

#define threadIdx (static_cast<const ::emulation::Builtins&>(::emulation::builtins).thread)
#define blockIdx (static_cast<const ::emulation::Builtins&>(::emulation::builtins).block)
#define blockDim (static_cast<const ::emulation::Builtins&>(::emulation::builtins).block_size)
#define gridDim (static_cast<const ::emulation::Builtins&>(::emulation::builtins).grid_size)
static constexpr int warpSize = 32;

using cudaStream_t = CUstream_st*;

// Barriers and collectives ----------------------------------------------------------------------

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
  emulation::barrier(emulation::Vote::none, false, site);
}
inline int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::barrier(emulation::Vote::all, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::barrier(emulation::Vote::any, predicate != 0, site);
}
inline int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::barrier(emulation::Vote::count, predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulation::Site site = emulation::Site::here()) {
  emulation::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Site site = emulation::Site::here()) {
  return emulation::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::here()) {
  return emulation::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::here()) {
  return emulation::ballot("__all_sync", mask, predicate != 0, site) == mask;
}

namespace emulation {
template <typename T>
inline T shuffle_value(Shuffle mode, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mode, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                     emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle_value(emulation::Shuffle::index, mask, value, lane, width, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle_value(emulation::Shuffle::up, mask, value, int(delta), width, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle_value(emulation::Shuffle::down, mask, value, int(delta), width, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle_value(emulation::Shuffle::exclusive_or, mask, value, lane_mask, width,
                                  site);
}

// Fences order nothing that the emulation leaves out of order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// Atomics ---------------------------------------------------------------------------------------

namespace emulation {
template <typename T, typename Update>
EMULATION_UNCHECKED T atomic(T* address, Site site, Update update) {
  access(address, sizeof(T), Access::atomic, {site, nullptr}, -1, sizeof(T));
  const T before = *address;
  *address = update(before);
  return before;
}
}  // namespace emulation

#define EMULATION_ATOMIC(name, type, result)                                                    \
  inline type name(type* address, type value, emulation::Site site = emulation::Site::here()) { \
    return emulation::atomic(address, site, [value](type before) -> type { return result; });   \
  }
#define EMULATION_ATOMICS(type)                                      \
  EMULATION_ATOMIC(atomicAdd, type, before + value)                  \
  EMULATION_ATOMIC(atomicMin, type, value < before ? value : before) \
  EMULATION_ATOMIC(atomicMax, type, before < value ? value : before) \
  EMULATION_ATOMIC(atomicAnd, type, before& value)                   \
  EMULATION_ATOMIC(atomicOr, type, before | value)                   \
  EMULATION_ATOMIC(atomicXor, type, before ^ value)                  \
  EMULATION_ATOMIC(atomicExch, type, ((void)before, value))

EMULATION_ATOMICS(int)
EMULATION_ATOMICS(unsigned)
EMULATION_ATOMICS(unsigned long long)
EMULATION_ATOMIC(atomicAdd, float, before + value)
EMULATION_ATOMIC(atomicAdd, double, before + value)
EMULATION_ATOMIC(atomicExch, float, ((void)before, value))
EMULATION_ATOMIC(atomicSub, int, before - value)
EMULATION_ATOMIC(atomicSub, unsigned, before - value)
#undef EMULATION_ATOMICS
#undef EMULATION_ATOMIC

template <typename T>
inline T atomicCAS(T* address, T expected, T value,
                   emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return emulation::atomic(address, site,
                           [=](T before) { return before == expected ? value : before; });
}

template <typename T>
inline __attribute__((always_inline)) T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline __attribute__((always_inline)) void __stwb(T* address, T value) {
  *address = value;
}

// Numbers ---------------------------------------------------------------------------------------

namespace emulation {
template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace emulation

inline int __float_as_int(float value) { return emulation::bits<int>(value); }
inline unsigned __float_as_uint(float value) { return emulation::bits<unsigned>(value); }
inline float __int_as_float(int value) { return emulation::bits<float>(value); }
inline float __uint_as_float(unsigned value) { return emulation::bits<float>(value); }
inline long long __double_as_longlong(double value) { return emulation::bits<long long>(value); }
inline double __longlong_as_double(long long value) { return emulation::bits<double>(value); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __double2float_rn(double a) { return float(a); }
// Of both signs at once the next float away from what rounding to nearest gave, where it fell on
// the wrong side.
inline float __double2float_ru(double a) {
  const float nearest = float(a);
  return double(nearest) < a ? std::nextafter(nearest, INFINITY) : nearest;
}
inline float __double2float_rd(double a) {
  const float nearest = float(a);
  return double(nearest) > a ? std::nextafter(nearest, -INFINITY) : nearest;
}
// A double holds the exact product of two floats; of a sum it holds the rounding's direction.
inline float __fmul_ru(float a, float b) { return __double2float_ru(double(a) * double(b)); }
inline float __fmul_rd(float a, float b) { return __double2float_rd(double(a) * double(b)); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

#define EMULATION_MIN_MAX(type)                             \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX
// The other operand where one is NaN, as on the device.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// The runtime -----------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
EMULATION_UNCHECKED inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes,
                                                       cudaStream_t) {
  emulation::fill(data, value, bytes);
  return cudaSuccess;
}
