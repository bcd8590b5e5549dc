// Tensor-core tiles and asynchronous copies: PTX on the device, the emulation elsewhere.
//
// mma_16816 multiplies a 16x16 tile (row-major) by a 16x8 tile (column-major). Each lane holds,
// with g = lane / 4 and t = lane % 4 and two halves a register, the lower column or row first:
//   a[0], a[1]: rows g, g + 8 at columns 2t, 2t + 1;   a[2], a[3]: the same at columns + 8
//   b[0], b[1]: rows 2t, 2t + 1 and those + 8 of column g
//   c, d:       [0], [1]: row g at columns 2t, 2t + 1;  [2], [3]: row g + 8
#pragma once

#include "language.h"

namespace vqkernels::cuda {

#ifdef __CUDACC__

// d = a * b + c for `Half` = __half or __nv_bfloat16. d may be c.
template <typename Half>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2], const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2],
                                                         const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Loads four 8x8 tiles of halves: lane l gives the address of row l % 8 of tile l / 8, and gets
// in r[i] of tile i the columns 2t and 2t + 1 of row g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same for two tiles; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Copies source_bytes (0 to 16) to 16 bytes of shared memory and fills the rest with zero. Both
// addresses are multiples of 16. The copy is done after a cp_async_wait that covers its group.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global,
                                            int source_bytes = 16) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `groups_left` of this thread's groups are unfinished. Other threads see the
// data after a barrier.
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

#else

template <typename Half>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4], emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_same_v<Half, __half> || std::is_same_v<Half, __nv_bfloat16>);
  emulation::mma_16816(std::is_same_v<Half, __nv_bfloat16>, d, a, b, c, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                        emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix(r, 4, shared_row, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row,
                        emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix(r, 2, shared_row, site);
}

inline void cp_async_16(void* shared, const void* global, int source_bytes = 16,
                        emulation::Site site = emulation::Site::here()) {
  emulation::cp_async_16(shared, global, source_bytes, site);
}

inline void cp_async_commit() { emulation::cp_async_commit(); }

template <int groups_left>
inline void cp_async_wait(emulation::Site site = emulation::Site::here()) {
  emulation::cp_async_wait(groups_left, site);
}

#endif

}  // namespace vqkernels::cuda
