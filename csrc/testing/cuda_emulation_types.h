// CUDA's vector and half types.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtypes.h"

#define EMULATION_VECTOR2(name, type, bytes) \
  struct alignas(bytes) name {               \
    type x, y;                               \
  };                                         \
  inline name make_##name(type x, type y) { return {x, y}; }
#define EMULATION_VECTOR4(name, type, bytes) \
  struct alignas(bytes) name {               \
    type x, y, z, w;                         \
  };                                         \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

EMULATION_VECTOR2(char2, signed char, 2)
EMULATION_VECTOR2(uchar2, unsigned char, 2)
EMULATION_VECTOR2(short2, short, 4)
EMULATION_VECTOR2(ushort2, unsigned short, 4)
EMULATION_VECTOR2(int2, int, 8)
EMULATION_VECTOR2(uint2, unsigned, 8)
EMULATION_VECTOR2(float2, float, 8)
EMULATION_VECTOR2(longlong2, long long, 16)
EMULATION_VECTOR2(ulonglong2, unsigned long long, 16)
EMULATION_VECTOR2(double2, double, 16)
EMULATION_VECTOR4(char4, signed char, 4)
EMULATION_VECTOR4(uchar4, unsigned char, 4)
EMULATION_VECTOR4(short4, short, 8)
EMULATION_VECTOR4(ushort4, unsigned short, 8)
EMULATION_VECTOR4(int4, int, 16)
EMULATION_VECTOR4(uint4, unsigned, 16)
EMULATION_VECTOR4(float4, float, 16)

#undef EMULATION_VECTOR2
#undef EMULATION_VECTOR4

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half value) {
  return vqkernels::to_float(vqkernels::half_t{value.bits});
}
inline __half __float2half_rn(float value) {
  return {vqkernels::from_float<vqkernels::half_t>(value).bits};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }

inline float __bfloat162float(__nv_bfloat16 value) {
  return vqkernels::to_float(vqkernels::bfloat16_t{value.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {vqkernels::from_float<vqkernels::bfloat16_t>(value).bits};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return __floats2bfloat162_rn(value.x, value.y);
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}
inline float __low2float(__nv_bfloat162 value) { return __bfloat162float(value.x); }
inline float __high2float(__nv_bfloat162 value) { return __bfloat162float(value.y); }
