// Kernels with one planted fault each, and the same kernels without it: what the emulation must
// find, and what it must let pass. A line on which a fault may be reported ends in its name.
#include <cstring>

#include "../cuda/tensor_core.h"

using vqkernels::cuda::bulk_copy;
using vqkernels::cuda::cp_async_16;
using vqkernels::cuda::cp_async_commit;
using vqkernels::cuda::cp_async_wait;
using vqkernels::cuda::ldmatrix_x2;
using vqkernels::cuda::ldmatrix_x2_transposed;
using vqkernels::cuda::ldmatrix_x4;
using vqkernels::cuda::ldmatrix_x4_transposed;
using vqkernels::cuda::mbarrier_arrive_expecting;
using vqkernels::cuda::mbarrier_init;
using vqkernels::cuda::mbarrier_wait;
using vqkernels::cuda::mma_16816;
using vqkernels::cuda::mma_1688;
using vqkernels::cuda::warpgroup_commit;
using vqkernels::cuda::warpgroup_mma;
using vqkernels::cuda::warpgroup_mma_packed;
using vqkernels::cuda::warpgroup_wait;

namespace {

constexpr int block = 64;  // two warps
constexpr unsigned all = 0xffffffffu;

// Every kernel gets 256 floats to read and 128 to write, in two blocks unless said otherwise.
// Each block writes its half of `out`.
#define SELFTEST(name, grid, shared_bytes)                                                    \
  EMULATION_EXPORT const char* selftest_##name(const float* in, float* out, int64_t broken) { \
    return emulation::caught([&] {                                                            \
      VQKERNELS_LAUNCH(name, grid, block, shared_bytes, nullptr)(in, out, broken != 0);       \
    });                                                                                       \
  }

__device__ int place() { return int(blockIdx.x * block + threadIdx.x); }

// Barriers and collectives ----------------------------------------------------------------------

__global__ void __launch_bounds__(block)
    barrier_left_out(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = in[threadIdx.x];  // barrier_left_out
  if (!broken) __syncthreads();
  out[place()] = tile[block - 1 - threadIdx.x];  // barrier_left_out
}

__global__ void divergent_barrier(const float* in, float* out, bool broken) {
  if (broken && threadIdx.x < 32) {
    __syncthreads();  // divergent_barrier
  } else {
    __syncthreads();  // divergent_barrier
  }
  out[place()] = in[threadIdx.x];
}

__global__ void barrier_after_exit(const float* in, float* out, bool broken) {
  if (broken && threadIdx.x == 3) return;
  __syncthreads();  // barrier_after_exit
  out[place()] = in[threadIdx.x];
}

__global__ void exit_before_collective(const float* in, float* out, bool broken) {
  float value = in[threadIdx.x];
  if (broken && threadIdx.x == 37) return;
  value += __shfl_xor_sync(all, value, 1);  // exit_before_collective
  out[place()] = value;
}

__global__ void lane_in_barrier(const float* in, float* out, bool broken) {
  float value = in[threadIdx.x];
  if (!broken || threadIdx.x != 5) {
    value += __shfl_down_sync(all, value, 1);  // lane_in_barrier
  }
  __syncthreads();
  out[place()] = value;
}

__global__ void two_collectives(const float* in, float* out, bool broken) {
  float value = in[threadIdx.x];
  if (broken && threadIdx.x % 2 == 0) {
    value += __shfl_sync(all, value, 7);  // two_collectives
  } else {
    value += __shfl_sync(all, value, 7);  // two_collectives
  }
  out[place()] = value;
}

__global__ void shuffle_from_outside(const float* in, float* out, bool broken) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16)
    value += __shfl_sync(0xffffu, value, broken ? 16 : 15);  // shuffle_from_outside
  out[place()] = value;
}

__global__ void mask_without_caller(const float* in, float* out, bool broken) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp(broken ? 0xfffeu : 0xffffu);  // mask_without_caller
  }
  out[place()] = in[threadIdx.x];
}

__global__ void deadlock(const float* in, float* out, bool broken) {
  const unsigned lane = threadIdx.x % 32;
  if (broken && lane < 3) {
    // 0 waits for 1, 1 for 2, 2 for 0.
    __syncwarp(1u << lane | 1u << (lane + 1) % 3);  // deadlock
  }
  out[place()] = in[threadIdx.x];
}

__global__ void endless(const float* in, float* out, bool broken) {
  __shared__ volatile int done[block];
  done[threadIdx.x] = broken ? 0 : 1;
  while (done[threadIdx.x] == 0) continue;  // endless
  out[place()] = in[threadIdx.x];
}

// Memory ----------------------------------------------------------------------------------------

__global__ void global_read_out_of_bounds(const float* in, float* out, bool broken) {
  out[place()] = in[threadIdx.x + (broken ? 193 : 192)];  // global_read_out_of_bounds
}

__global__ void global_write_out_of_bounds(const float* in, float* out, bool broken) {
  out[place() - (broken ? 1 : 0)] = in[threadIdx.x];  // global_write_out_of_bounds
}

__global__ void dynamic_out_of_bounds(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + (broken ? 1 : 0)] = in[threadIdx.x];  // dynamic_out_of_bounds
  out[place()] = in[threadIdx.x];
}

__global__ void static_out_of_bounds(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  float* row = tile + (broken ? 1 : 0);
  row[threadIdx.x] = in[threadIdx.x];  // static_out_of_bounds
  out[place()] = row[threadIdx.x];
}

__global__ void misaligned_global(const float* in, float* out, bool broken) {
  const float* row = in + threadIdx.x * 2 / 4 * 4 + (broken ? 2 : 0);
  const float4 values = *reinterpret_cast<const float4*>(row);  // misaligned_global
  out[place()] = values.x + values.w;
}

__global__ void misaligned_shared(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float* pair = tile + (broken ? 1 : 2);
  const float2 values = *reinterpret_cast<const float2*>(pair);  // misaligned_shared
  out[place()] = values.x + values.y;
}

__global__ void uninitialized_global(const float* in, float* out, bool broken) {
  if (!broken) out[place()] = in[threadIdx.x];
  out[place()] += in[threadIdx.x];  // uninitialized_global
}

__global__ void uninitialized_shared(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  if (!broken || threadIdx.x < 63) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[place()] = tile[(threadIdx.x + 1) % block];  // uninitialized_shared
}

__global__ void left_by_the_block_before(const float* in, float* out, bool broken) {
  __shared__ float kept;
  if (threadIdx.x == 0 && (!broken || blockIdx.x == 0)) kept = in[0];
  __syncthreads();
  out[place()] = kept;  // left_by_the_block_before
}

// Races -----------------------------------------------------------------------------------------

__global__ void write_after_read(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float value = tile[(threadIdx.x + 33) % block];  // write_after_read
  if (!broken) __syncthreads();
  tile[threadIdx.x] = value;  // write_after_read
  out[place()] = value;
}

__global__ void read_after_write(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];  // read_after_write
  if (!broken) __syncthreads();
  out[place()] = tile[(threadIdx.x + 32) % block];  // read_after_write
}

__global__ void write_after_write(const float* in, float* out, bool broken) {
  __shared__ float best;
  if (!broken || threadIdx.x % 32 == 0) {
    if (broken || threadIdx.x == 0) best = in[threadIdx.x];  // write_after_write
  }
  __syncthreads();
  out[place()] = best;
}

__global__ void neighbours_in_one_word(const float* in, float* out, bool broken) {
  // Bytes side by side are no race; one byte for two threads is.
  __shared__ unsigned char flags[block];
  const int flag = broken ? threadIdx.x / 2 * 2 : threadIdx.x;
  flags[flag] = in[threadIdx.x] > 0;  // neighbours_in_one_word
  __syncthreads();
  out[place()] = flags[threadIdx.x / 2 * 2];
}

__global__ void warp_race(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];                     // warp_race
  float value = __shfl_xor_sync(all, in[threadIdx.x], 1);  // orders no memory
  if (!broken) __syncwarp();
  value += tile[threadIdx.x ^ 1];  // warp_race
  out[place()] = value;
}

__global__ void half_warp_race(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];  // half_warp_race
  __syncwarp(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u);
  out[place()] = tile[threadIdx.x ^ (broken ? 16 : 8)];  // half_warp_race
}

__global__ void warps_synced_apart(const float* in, float* out, bool broken) {
  __shared__ float tile[block];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];  // warps_synced_apart
  __syncwarp();
  out[place()] = tile[threadIdx.x ^ (broken ? 32 : 16)];  // warps_synced_apart
}

__global__ void race_between_blocks(const float* in, float* out, bool broken) {
  out[broken ? threadIdx.x : place()] = in[threadIdx.x];  // race_between_blocks
  if (broken) out[threadIdx.x + block] = 0;
}

__global__ void atomic_and_plain(const float* in, float* out, bool broken) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (broken && threadIdx.x == 40) {
    sum = in[0];  // atomic_and_plain
  } else {
    atomicAdd(&sum, in[threadIdx.x]);  // atomic_and_plain
  }
  __syncthreads();
  out[place()] = sum;
}

// Asynchronous copies -----------------------------------------------------------------------------

__global__ void copy_without_wait(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < 16) cp_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  __syncthreads();
  out[place()] = tile[threadIdx.x];  // copy_without_wait
}

__global__ void wait_for_the_wrong_group(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  float* rows[2] = {tile, tile + block / 2};
  for (float* row : rows) {
    if (threadIdx.x < 8) cp_async_16(row + threadIdx.x * 4, in + threadIdx.x * 4);
    cp_async_commit();
  }
  if (broken) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  __syncthreads();
  out[place()] = tile[threadIdx.x];  // wait_for_the_wrong_group
}

__global__ void copy_without_barrier(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 16)
    cp_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4);  // copy_without_barrier
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) __syncthreads();
  out[place()] = tile[threadIdx.x];  // copy_without_barrier
}

__global__ void copy_into_what_is_read(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float value = tile[block - 1 - threadIdx.x];  // copy_into_what_is_read
  if (!broken) __syncthreads();
  if (threadIdx.x < 16)
    cp_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4);  // copy_into_what_is_read
  cp_async_commit();
  cp_async_wait<0>();
  out[place()] = value;
}

__global__ void copy_from_out_of_bounds(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  // The last copy has one float left to read; the rest is zero.
  if (threadIdx.x < 16) {
    const bool last = threadIdx.x == 15;
    const float* from = in + (last ? 252 + (broken ? 4 : 0) : threadIdx.x * 4);
    cp_async_16(tile + threadIdx.x * 4, from, last ? 4 : 16);  // copy_from_out_of_bounds
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[place()] = tile[threadIdx.x];
}

__global__ void misaligned_copy(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < 8)
    cp_async_16(tile + threadIdx.x * 4 + (broken ? 1 : 0), in);  // misaligned_copy
  cp_async_commit();
  cp_async_wait<0>();
  out[place()] = in[threadIdx.x];
}

__global__ void misaligned_matrix_row(const float* in, float* out, bool broken) {
  __shared__ __align__(16) float tile[block * 4];
  for (int part = 0; part < 4; ++part) tile[threadIdx.x * 4 + part] = in[threadIdx.x * 4 + part];
  __syncthreads();
  uint32_t tiles[4];
  ldmatrix_x4(tiles, tile + threadIdx.x % 32 * 4 + (broken ? 2 : 0));  // misaligned_matrix_row
  out[place()] = __uint_as_float(tiles[3]);
}

// Bulk copies and warpgroups ----------------------------------------------------------------------

// Copies the first `block` floats of `in` to `tile`, which a barrier stands behind.
__device__ uint64_t* start_bulk_copy(float* tile, const float* in, int announced) {
  uint64_t* arrived = reinterpret_cast<uint64_t*>(tile + block);
  if (threadIdx.x == 0) mbarrier_init(arrived, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(arrived, announced);
    bulk_copy(tile, in, block * 4, arrived);
  }
  return arrived;
}

__global__ void bulk_copy_without_wait(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  uint64_t* arrived = start_bulk_copy(tile, in, block * 4);
  if (broken) __syncthreads();
  if (!broken) mbarrier_wait(arrived, 0);
  out[place()] = tile[threadIdx.x];  // bulk_copy_without_wait
}

__global__ void bulk_copy_into_what_is_read(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  uint64_t* arrived = reinterpret_cast<uint64_t*>(tile + block);
  tile[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 0) mbarrier_init(arrived, 1);
  __syncthreads();
  const float value = tile[block - 1 - threadIdx.x];  // bulk_copy_into_what_is_read
  if (!broken) __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(arrived, block * 4);
    bulk_copy(tile, in, block * 4, arrived);  // bulk_copy_into_what_is_read
  }
  mbarrier_wait(arrived, 0);
  out[place()] = value + tile[threadIdx.x];
}

__global__ void fewer_bytes_than_announced(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, tile);
  uint64_t* arrived = start_bulk_copy(tile, in, block * (broken ? 8 : 4));
  mbarrier_wait(arrived, 0);  // fewer_bytes_than_announced
  out[place()] = tile[threadIdx.x];
}

// 64 codes of 16 columns, 2048 bytes, by two copies.
__global__ void products_of_what_threads_wrote(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(float, codes);
  uint64_t* arrived = reinterpret_cast<uint64_t*>(codes + 512);
  if (threadIdx.x == 0) mbarrier_init(arrived, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(arrived, 2048);
    for (int half = 0; half < 2; ++half) bulk_copy(codes + half * 256, in, 1024, arrived);
  }
  mbarrier_wait(arrived, 0);
  __syncthreads();
  if (broken) codes[threadIdx.x] = 0;
  __syncthreads();
  float sums[32] = {};
  const uint32_t rows[4] = {};
  warpgroup_mma_packed<__half>(sums, rows, codes);  // products_of_what_threads_wrote
  warpgroup_commit();
  warpgroup_wait<0>();
  out[place()] = sums[0];
}

__global__ void misaligned_codes(const float* in, float* out, bool broken) {
  VQKERNELS_DYNAMIC_SHARED(char, unaligned);
  char* codes = unaligned + (-reinterpret_cast<uintptr_t>(unaligned) & 1023);
  uint64_t* arrived = reinterpret_cast<uint64_t*>(codes + 9216);
  if (threadIdx.x == 0) mbarrier_init(arrived, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(arrived, 9216);
    for (int part = 0; part < 9; ++part) bulk_copy(codes + part * 1024, in, 1024, arrived);
  }
  mbarrier_wait(arrived, 0);
  float sums[32];
  const uint32_t rows[4] = {};
  warpgroup_mma<__half>(sums, rows, codes + (broken ? 512 : 0), 0, false);  // misaligned_codes
  warpgroup_commit();
  warpgroup_wait<0>();
  out[place()] = sums[0];
}

SELFTEST(barrier_left_out, 2, 0)
SELFTEST(divergent_barrier, 2, 0)
SELFTEST(barrier_after_exit, 2, 0)
SELFTEST(exit_before_collective, 2, 0)
SELFTEST(lane_in_barrier, 2, 0)
SELFTEST(two_collectives, 2, 0)
SELFTEST(shuffle_from_outside, 2, 0)
SELFTEST(mask_without_caller, 2, 0)
SELFTEST(deadlock, 2, 0)
SELFTEST(endless, 2, 0)
SELFTEST(global_read_out_of_bounds, 2, 0)
SELFTEST(global_write_out_of_bounds, 2, 0)
SELFTEST(dynamic_out_of_bounds, 2, block * sizeof(float))
SELFTEST(static_out_of_bounds, 2, 0)
SELFTEST(misaligned_global, 2, 0)
SELFTEST(misaligned_shared, 2, block * sizeof(float))
SELFTEST(uninitialized_global, 2, 0)
SELFTEST(uninitialized_shared, 2, block * sizeof(float))
SELFTEST(left_by_the_block_before, 2, 0)
SELFTEST(write_after_read, 2, 0)
SELFTEST(read_after_write, 2, 0)
SELFTEST(write_after_write, 2, 0)
SELFTEST(neighbours_in_one_word, 2, 0)
SELFTEST(warp_race, 2, 0)
SELFTEST(half_warp_race, 2, 0)
SELFTEST(warps_synced_apart, 2, 0)
SELFTEST(race_between_blocks, 2, 0)
SELFTEST(atomic_and_plain, 2, 0)
SELFTEST(copy_without_wait, 2, block * sizeof(float))
SELFTEST(wait_for_the_wrong_group, 2, block * sizeof(float))
SELFTEST(copy_without_barrier, 2, block * sizeof(float))
SELFTEST(copy_into_what_is_read, 2, block * sizeof(float))
SELFTEST(copy_from_out_of_bounds, 2, block * sizeof(float))
SELFTEST(misaligned_copy, 2, block * sizeof(float) + 16)
SELFTEST(misaligned_matrix_row, 2, 0)
SELFTEST(bulk_copy_without_wait, 2, block * sizeof(float) + 16)
SELFTEST(bulk_copy_into_what_is_read, 2, block * sizeof(float) + 16)
SELFTEST(fewer_bytes_than_announced, 2, block * sizeof(float) + 16)
SELFTEST(products_of_what_threads_wrote, 2, 2048 + 16)
SELFTEST(misaligned_codes, 2, 10240 + 16)

// What must work ----------------------------------------------------------------------------------

// One tile a * b + c, its fragments gathered as the PTX manual's formulas for m16n8k16 place them:
// element i of a lane, counted over its registers.
template <typename Half>
__global__ void multiply_tile(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint16_t left[8], right[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = member * 2 + i % 2 + (i >= 4 ? 8 : 0);
    left[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    right[i] = b[(member * 2 + i % 2 + (i >= 2 ? 8 : 0)) * 8 + group];
  }
  uint32_t fragment_a[4], fragment_b[2];
  std::memcpy(fragment_a, left, sizeof(left));
  std::memcpy(fragment_b, right, sizeof(right));
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
  mma_16816<Half>(sums, fragment_a, fragment_b, sums);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
}

EMULATION_EXPORT const char* multiply(const uint16_t* a, const uint16_t* b, const float* c,
                                      float* d, int64_t bfloat16) {
  return emulation::caught([&] {
    if (bfloat16) {
      VQKERNELS_LAUNCH(multiply_tile<__nv_bfloat16>, 1, 32, 0, nullptr)(a, b, c, d);
    } else {
      VQKERNELS_LAUNCH(multiply_tile<__half>, 1, 32, 0, nullptr)(a, b, c, d);
    }
  });
}

// A 16x16 and a 16x8 tile (stored transposed) from shared memory into an mma.
__global__ void load_and_multiply(const uint16_t* a, const uint16_t* b_transposed, float* d) {
  __shared__ __align__(16) uint16_t left[16 * 16];
  __shared__ __align__(16) uint16_t right[8 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b_transposed[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  ldmatrix_x4(fragment_a, left + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2(fragment_b, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sums[4] = {};
  mma_16816<__half>(sums, fragment_a, fragment_b, sums);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

EMULATION_EXPORT const char* load_tiles(const uint16_t* a, const uint16_t* b_transposed, float* d) {
  return emulation::caught(
      [&] { VQKERNELS_LAUNCH(load_and_multiply, 1, 32, 0, nullptr)(a, b_transposed, d); });
}

// A 16x8 tile and an 8x8 tile (stored transposed): half of the products of mma_16816.
template <typename Half>
__global__ void load_and_multiply_half(const uint16_t* a, const uint16_t* b_transposed,
                                       const float* c, float* d) {
  __shared__ __align__(16) uint16_t left[16 * 8];
  __shared__ __align__(16) uint16_t right[8 * 8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) left[i] = a[i];
  for (int i = lane; i < 64; i += 32) right[i] = b_transposed[i];
  __syncwarp();
  uint32_t fragment_a[2], fragment_b[2];
  ldmatrix_x2(fragment_a, left + lane % 16 * 8);
  ldmatrix_x2(fragment_b, right + lane % 8 * 8);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  mma_1688<Half>(sums, fragment_a, fragment_b[0], sums);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

EMULATION_EXPORT const char* multiply_half(const uint16_t* a, const uint16_t* b_transposed,
                                           const float* c, float* d, int64_t bfloat16) {
  return emulation::caught([&] {
    if (bfloat16) {
      VQKERNELS_LAUNCH(load_and_multiply_half<__nv_bfloat16>, 1, 32, 0, nullptr)
      (a, b_transposed, c, d);
    } else {
      VQKERNELS_LAUNCH(load_and_multiply_half<__half>, 1, 32, 0, nullptr)(a, b_transposed, c, d);
    }
  });
}

// A 16x16 and a 16x8 tile, stored as they are, from shared memory into an mma; B by each of the
// loads that transpose.
__global__ void load_transposed_and_multiply(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ __align__(16) uint16_t left[16 * 16];
  __shared__ __align__(16) uint16_t right[16 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    left[i] = a[i];
    right[i] = b[i];
  }
  __syncwarp();
  uint32_t fragment_a[4], both[4], alone[2];
  ldmatrix_x4(fragment_a, left + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4_transposed(both, right + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_transposed(alone, right + lane % 16 * 16 + 8);
  const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
  float sums[3][4] = {};
  mma_16816<__half>(sums[0], fragment_a, first, sums[0]);
  mma_16816<__half>(sums[1], fragment_a, second, sums[1]);
  mma_16816<__half>(sums[2], fragment_a, alone, sums[2]);
  for (int i = 0; i < 12; ++i) {
    const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    d[row * 24 + column] = sums[i / 4][i % 4];
  }
}

EMULATION_EXPORT const char* load_transposed(const uint16_t* a, const uint16_t* b, float* d) {
  return emulation::caught(
      [&] { VQKERNELS_LAUNCH(load_transposed_and_multiply, 1, 32, 0, nullptr)(a, b, d); });
}

// Each of 2 x 3 x 2 blocks of 4 x 5 x 3 threads writes its own place, and what warps make of it.
struct Places {
  int* place;
  int* votes;
  unsigned long long* least;
};

__global__ void indices(Places places) {
  const dim3 size = blockDim;
  const int thread = threadIdx.x + size.x * (threadIdx.y + size.y * threadIdx.z);
  const int index = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int threads = size.x * size.y * size.z;
  places.place[index * threads + thread] = index * threads + thread;
  const unsigned present = thread < 32 ? all : (1u << (threads - 32)) - 1;
  const unsigned odd = __ballot_sync(present, thread % 2);
  const int sum = __syncthreads_count(thread % 3 == 0) + __popc(odd);
  const int and_or = __syncthreads_and(thread < threads) * 2 + __syncthreads_or(thread < 0);
  places.votes[index * threads + thread] = sum * 4 + and_or;
  atomicMin(places.least, static_cast<unsigned long long>(1000 - thread));
}

EMULATION_EXPORT const char* count_indices(int* place, int* votes, unsigned long long* least) {
  return emulation::caught([&] {
    VQKERNELS_LAUNCH(indices, dim3(2, 3, 2), dim3(4, 5, 3), 0, nullptr)({place, votes, least});
  });
}

template <typename T>
__global__ void shuffles(const T* in, T* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(all, in[lane], 5);
  out[32 + lane] = __shfl_sync(all, in[lane], lane + 3, 8);
  out[64 + lane] = __shfl_up_sync(all, in[lane], 3, 16);
  out[96 + lane] = __shfl_down_sync(all, in[lane], 3, 16);
  out[128 + lane] = __shfl_xor_sync(all, in[lane], 5);
  out[160 + lane] = __shfl_xor_sync(all, in[lane], 12, 8);
}

EMULATION_EXPORT const char* shuffle_doubles(const double* in, double* out) {
  return emulation::caught([&] { VQKERNELS_LAUNCH(shuffles<double>, 1, 32, 0, nullptr)(in, out); });
}
EMULATION_EXPORT const char* shuffle_ints(const int* in, int* out) {
  return emulation::caught([&] { VQKERNELS_LAUNCH(shuffles<int>, 1, 32, 0, nullptr)(in, out); });
}

// Sums over a block with a tree of barriers, one of which a test takes out.
template <int threads>
__global__ void __launch_bounds__(threads) tree_sum(const float* in, float* out, int count) {
  __shared__ float part[threads];
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += threads) sum += in[i];
  part[threadIdx.x] = sum;
  __syncthreads();  // first barrier
  for (int width = threads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();  // inner barrier
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

EMULATION_EXPORT const char* sum(const float* in, float* out, int64_t count) {
  return emulation::caught(
      [&] { VQKERNELS_LAUNCH((tree_sum<128>), 3, 128, 0, nullptr)(in, out, int(count)); });
}

EMULATION_EXPORT const char* clear(float* out, int64_t bytes) {
  return emulation::caught([&] { cudaMemsetAsync(out, 0, size_t(bytes), nullptr); });
}

// A variable of the host's code, which no block's beginning may touch.
EMULATION_EXPORT const char* count_launches(const float* in, float* out, int64_t* launches) {
  static int64_t count;
  ++count;
  const char* message = selftest_barrier_left_out(in, out, false);
  *launches = count;
  return message;
}

EMULATION_EXPORT const char* launch(const float* in, float* out, int64_t threads,
                                    int64_t shared_bytes) {
  return emulation::caught([&] {
    VQKERNELS_LAUNCH(barrier_after_exit, 1, unsigned(threads), size_t(shared_bytes), nullptr)
    (in, out, false);
  });
}

}  // namespace
