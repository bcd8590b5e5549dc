// The floating formats that kernels read and write, and their conversions. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

namespace vqkernels {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

struct half_t {
  uint16_t bits;
};

struct bfloat16_t {
  uint16_t bits;
};

namespace {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float value) { return value; }

inline float to_float(bfloat16_t value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

// Moves exponent and mantissa into place and lets one multiplication fix the exponent's bias,
// subnormals included; infinities and NaN then need their exponent filled up.
inline float to_float(half_t value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

template <typename T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16_t from_float<bfloat16_t>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {                                   // subnormal half
    const float shifted = bit_cast<float>(magnitude) + 0.5f;      // rounds at 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}

// Calls f with a null pointer of the element type that `dtype` names.
template <typename F>
inline auto dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16:
      return f(static_cast<half_t*>(nullptr));
    case DType::bf16:
      return f(static_cast<bfloat16_t*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace vqkernels
