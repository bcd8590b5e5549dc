// Tensor-core tiles and asynchronous copies: PTX on the device, the emulation elsewhere.
//
// mma_16816 multiplies a 16x16 tile (row-major) by a 16x8 tile (column-major). Each lane holds,
// with g = lane / 4 and t = lane % 4 and two halves a register, the lower column or row first:
//   a[0], a[1]: rows g, g + 8 at columns 2t, 2t + 1;   a[2], a[3]: the same at columns + 8
//   b[0], b[1]: rows 2t, 2t + 1 and those + 8 of column g
//   c, d:       [0], [1]: row g at columns 2t, 2t + 1;  [2], [3]: row g + 8
//
// mma_1688 has half the columns of A and rows of B: a[0], a[1] and b alone.
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

template <typename Half>
__device__ __forceinline__ void mma_1688(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                         const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_1688<__half>(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                                 const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_1688<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[2],
                                                        uint32_t b, const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 2^x, within 2^-22 of it; what is below the smallest normal float becomes zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
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

// The same, and each lane gets of tile i the rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
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

// Warpgroup products (sm_90a): 64 rows, 16 a warp, in registers times 64 codes in shared memory.
// `codes` is the first of 64 rows of 128 bytes, aligned to 1024, whose 16-byte pieces are permuted
// by the row's number as everywhere here (the 128-byte swizzle); `step` is one of its four steps of
// 16 columns. Registers are laid out as those of mma_16816, eight tiles of d side by side.
//
//   warpgroup_arrive    before the first of a group: registers are written
//   warpgroup_mma       d = a * codes, added to d where it `adds`; d and a are busy from here on
//   warpgroup_mma_packed  d += a * codes of 16 columns: of eight codes the first 8 columns lie
//                       together in 128 bytes, then their last 8, then the next eight codes
//   warpgroup_commit    ends a group
//   warpgroup_wait<n>   until at most n groups are unfinished
//   settle              after the wait: d is read only below
//
// They see shared memory as bulk copies do: what threads write there themselves they do not see
// without a fence, which would wait for all copies on their way.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VQKERNELS_WARPGROUPS 1

__device__ __forceinline__ void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int groups_left>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_left) : "memory");
}

__device__ __forceinline__ void settle(float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Copies by the copy engine, and the barriers in shared memory that say when they are there.
//
//   mbarrier_init              by one thread; seen after a __syncthreads
//   mbarrier_arrive_expecting  one arrival of the phase, which `bytes` of copies also belong to
//   bulk_copy                  `bytes`, a multiple of 16 as both addresses are
//   mbarrier_wait              until the phase of this parity has ended; phases count from 0
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* barrier, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(global), "r"(bytes), "r"(at)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address),
      "r"(parity)
      : "memory");
}

// The address in units of 16 bytes; 8 rows take 1024 bytes; 1 << 62: the 128-byte swizzle.
__device__ __forceinline__ uint64_t warpgroup_operand(const void* codes, int step) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(codes)) + step * 32;
  return uint64_t(address >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Without a swizzle: the two halves of eight codes' 16 columns stand 128 bytes apart, the next
// eight codes 256.
__device__ __forceinline__ uint64_t packed_operand(const void* codes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(codes));
  return uint64_t(address >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

template <typename Half>
__device__ __forceinline__ void warpgroup_mma(float (&d)[32], const uint32_t (&a)[4],
                                              uint64_t codes, bool adds);

#define VQKERNELS_WARPGROUP_MMA(name, type)                                                       \
  template <>                                                                                     \
  __device__ __forceinline__ void warpgroup_mma<name>(float (&d)[32], const uint32_t (&a)[4],     \
                                                      uint64_t codes, bool adds) {                \
    asm volatile(                                                                                 \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"                                        \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
        " "                                                                                       \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                      \
        "{%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n}"                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(codes), "r"(int(adds)));                \
  }

VQKERNELS_WARPGROUP_MMA(__half, "f16")
VQKERNELS_WARPGROUP_MMA(__nv_bfloat16, "bf16")
#undef VQKERNELS_WARPGROUP_MMA

template <typename Half>
__device__ __forceinline__ void warpgroup_mma(float (&d)[32], const uint32_t (&a)[4],
                                              const void* codes, int step, bool adds) {
  warpgroup_mma<Half>(d, a, warpgroup_operand(codes, step), adds);
}

template <typename Half>
__device__ __forceinline__ void warpgroup_mma_packed(float (&d)[32], const uint32_t (&a)[4],
                                                     const void* codes) {
  warpgroup_mma<Half>(d, a, packed_operand(codes), true);
}

#endif

#else

#define VQKERNELS_WARPGROUPS 1

template <typename Half>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4], emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_same_v<Half, __half> || std::is_same_v<Half, __nv_bfloat16>);
  emulation::mma_16816(std::is_same_v<Half, __nv_bfloat16>, d, a, b, c, site);
}

template <typename Half>
inline void mma_1688(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
                     emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_same_v<Half, __half> || std::is_same_v<Half, __nv_bfloat16>);
  emulation::mma_1688(std::is_same_v<Half, __nv_bfloat16>, d, a, b, c, site);
}

inline float exp2_approximate(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                        emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix(r, 4, shared_row, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row,
                        emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix(r, 2, shared_row, site);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row,
                                   emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix_transposed(r, 4, shared_row, site);
}

inline void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* shared_row,
                                   emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix_transposed(r, 2, shared_row, site);
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

inline void warpgroup_arrive() {}

template <typename Half>
inline void warpgroup_mma(float (&d)[32], const uint32_t (&a)[4], const void* codes, int step,
                          bool adds, emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_same_v<Half, __half> || std::is_same_v<Half, __nv_bfloat16>);
  emulation::warpgroup_mma(std::is_same_v<Half, __nv_bfloat16>, d, a, codes, step, adds, site);
}

template <typename Half>
inline void warpgroup_mma_packed(float (&d)[32], const uint32_t (&a)[4], const void* codes,
                                 emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_same_v<Half, __half> || std::is_same_v<Half, __nv_bfloat16>);
  emulation::warpgroup_mma(std::is_same_v<Half, __nv_bfloat16>, d, a, codes,
                           emulation::packed_codes, true, site);
}

inline void warpgroup_commit() { emulation::warpgroup_commit(); }

template <int groups_left>
inline void warpgroup_wait(emulation::Site site = emulation::Site::here()) {
  emulation::warpgroup_wait(groups_left, site);
}

inline void settle(float (&)[32]) {}

inline void mbarrier_init(uint64_t* barrier, int count,
                          emulation::Site site = emulation::Site::here()) {
  emulation::mbarrier_init(barrier, count, site);
}

inline void mbarrier_arrive_expecting(uint64_t* barrier, int bytes,
                                      emulation::Site site = emulation::Site::here()) {
  emulation::mbarrier_arrive_expecting(barrier, bytes, site);
}

inline void mbarrier_wait(uint64_t* barrier, int parity,
                          emulation::Site site = emulation::Site::here()) {
  emulation::mbarrier_wait(barrier, parity, site);
}

inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier,
                      emulation::Site site = emulation::Site::here()) {
  emulation::bulk_copy(shared, global, bytes, barrier, site);
}

#endif

}  // namespace vqkernels::cuda
