// Attention, forward: softmax(scale * q k^T + mask) v over tiles of keys as they pass.
//
// Floors, for one H100 (132 multiprocessors at 1.755 GHz; mma.sync reaches about 65% of the 989
// TFLOP/s that wgmma has; 16 exponentials and 128 bytes of shared memory a cycle and
// multiprocessor), B H = 96, N = M = 4096, d = 64, not causal:
//
//   products      4 B H N M d = 0.41 TFLOP: 0.64 ms
//   exponentials  B H N M / (132 16 1.755 GHz): 0.43 ms, beside the products of the other block
//   shared reads  of a warp's 32 queries and a tile of 64 keys: queries, keys and values once each,
//                 (32 + 64 + 64) 2 d bytes for 2 d products of 16 x 8 x 16: 160 bytes, 1.3 cycles,
//                 each, which takes 1.5; with 16 queries a warp they would be 2.3
//   bytes         q, k, v, out once: 0.2 GB, 0.06 ms
//
// A block has 128 queries, 4 warps of 32. Registers of a thread: sums of 2 x d / 8 tiles, 4 each
// (64 at d = 64, 128 at 128); 64 scores, or 32, which become weights and then operands in place;
// operands of one step, 8 + 4. That leaves two blocks a multiprocessor at every d. Queries stay in
// shared memory, beside three tiles of 64 keys or values or five of 32: 36 to 72 KB.
//
// d = 72 costs 72 columns, not 80: q k^T ends with a step of 8, and its sums are 9 tiles wide.
#include <stdexcept>
#include <string>

#include "attention.h"
#include "attention_tiles.h"

namespace vqkernels::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Added in place of anything below it: finfo.min, a usual "no", stays finite as an exponent of two.
constexpr float kLeastBias = -3.0e38f;

// Where a head begins, `size` bytes an element.
__device__ __forceinline__ const char* head_of(const Heads& heads, int batch, int head, int size) {
  return static_cast<const char*>(heads.data) +
         (batch * heads.batch_stride + head * heads.head_stride) * size;
}

// What one warp knows of a tile's scores.
struct Place {
  int first_query, first_key;

  __device__ __forceinline__ int query(int slot) const { return first_query + row_of_slot(slot); }
  __device__ __forceinline__ int key(int n, int i) const {
    return first_key + n * 8 + int(threadIdx.x % 4) * 2 + i;
  }
};

// -inf for keys behind `call.keys` and, where causal, behind the query.
template <int kKeys>
__device__ __forceinline__ void hide_keys(Sums<kKeys>& scores, const Attention& call,
                                          const Place& place) {
#pragma unroll
  for (int slot = 0; slot < kSlotsOfRows; ++slot) {
    const int end = call.causal ? min(place.query(slot) + 1, call.keys) : call.keys;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[slot / 2][n][slot % 2 * 2 + i];
        if (place.key(n, i) >= end) score = -INFINITY;
      }
    }
  }
}

// Calls f(score, element of the mask) where there is such a key. Rows behind the last query read
// its mask.
template <typename T, int kKeys, typename F>
__device__ __forceinline__ void with_mask(Sums<kKeys>& scores, const Attention& call,
                                          const char* mask, const Place& place, const F& f) {
#pragma unroll
  for (int slot = 0; slot < kSlotsOfRows; ++slot) {
    const int query = min(place.query(slot), call.queries - 1);
    const T* at = reinterpret_cast<const T*>(mask) + query * call.mask.row_stride +
                  place.key(0, 0) * call.mask_column_stride;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n, at += 8 * call.mask_column_stride) {
      float (&pair)[4] = scores[slot / 2][n];
      const int key = place.key(n, 0), first = slot % 2 * 2;
      if (key < call.keys) f(pair[first], at[0]);
      if (key + 1 < call.keys) f(pair[first + 1], at[call.mask_column_stride]);
    }
  }
}

// The same in the four threads that share a row.
template <typename F>
__device__ __forceinline__ float of_row(float value, const F& f) {
  value = f(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return f(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

// The softmax of the queries of a warp, as far as keys have passed.
struct Softmax {
  float top[kSlotsOfRows];    // the greatest score, an exponent of two
  float total[kSlotsOfRows];  // this thread's part of the sum of weights

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int slot = 0; slot < kSlotsOfRows; ++slot) {
      top[slot] = -INFINITY;
      total[slot] = 0;
    }
  }

  // Turns scores, which `factor` > 0 makes exponents of two, into weights; fades `out`.
  template <int kDim, int kKeys>
  __device__ __forceinline__ void take(Sums<kKeys>& scores, Sums<kDim>& out, float factor) {
#pragma unroll
    for (int slot = 0; slot < kSlotsOfRows; ++slot) {
      const int m = slot / 2, first = slot % 2 * 2;
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(scores[m][n][first], scores[m][n][first + 1]));
      }
      highest = of_row(highest, [](float a, float b) { return fmaxf(a, b); });
      const float risen = fmaxf(top[slot], highest * factor);
      // A query that has not seen a key yet: its exponents stay -inf.
      const float shift = risen == -INFINITY ? 0.0f : risen;
      const float faded = exp2_approximate(top[slot] - shift);
      top[slot] = risen;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = first; i < first + 2; ++i) {
          scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], factor, -shift));
          sum += scores[m][n][i];
        }
      }
      total[slot] = fmaf(total[slot], faded, sum);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[m][n][first] *= faded;
        out[m][n][first + 1] *= faded;
      }
    }
  }
};

template <typename Half, int kDim, bool kMasked>
__global__ void __launch_bounds__(kAttentionThreads, 2) attend(Attention call) {
  using Tile = HeadRows<kDim>;
  using Layout = AttentionLayout<kDim, kMasked>;
  constexpr int kKeys = Layout::kKeys, kSlots = Layout::kSlots;
  VQKERNELS_DYNAMIC_SHARED(char, shared);
  const int blocks = (call.queries + kQueries - 1) / kQueries;
  const int head = blockIdx.x / blocks % call.heads, batch = blockIdx.x / blocks / call.heads;
  const int number = blockIdx.x % blocks;
  // Those with the most keys start first.
  const int first_query = (call.causal ? blocks - 1 - number : number) * kQueries;
  const int key_head = head / (call.heads / call.key_heads);
  const char* k = head_of(call.k, batch, key_head, 2);
  const char* v = head_of(call.v, batch, key_head, 2);
  const int end = call.causal ? min(call.keys, first_query + kQueries) : call.keys;
  const int tiles = (end + kKeys - 1) / kKeys * 2;  // keys and values in turn

  char* const slots = shared + Layout::kQueryBytes;
  int loaded = 0, load_slot = 0, read_slot = 0;
  const auto start_load = [&] {
    if (loaded == 0 && tiles > 0) {
      copy_rows<kDim, kQueries>(shared, head_of(call.q, batch, head, 2), call.q.row_stride,
                                first_query, call.queries);
    }
    if (loaded < tiles) {
      const bool values = loaded % 2 != 0;
      copy_rows<kDim, kKeys>(slots + load_slot * Layout::kTileBytes, values ? v : k,
                             values ? call.v.row_stride : call.k.row_stride, loaded / 2 * kKeys,
                             call.keys);
    }
    cp_async_commit();
    ++loaded;
    load_slot = load_slot + 1 == kSlots ? 0 : load_slot + 1;
  };
  // The tile after the one before, which no warp reads any longer: its slot is filled anew.
  const auto next_tile = [&] {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    start_load();
    const char* tile = slots + read_slot * Layout::kTileBytes;
    read_slot = read_slot + 1 == kSlots ? 0 : read_slot + 1;
    return tile;
  };
  for (int i = 0; i < kSlots - 1; ++i) start_load();

  const int warp = threadIdx.x / kWarp;
  char* const own = shared + warp * kWarpQueries * Tile::kRowBytes;
  Place place{first_query + warp * kWarpQueries, 0};
  const int last_query = place.first_query + kWarpQueries - 1;
  const bool added = kMasked && call.mask_kind == MaskKind::additive;
  // Else a positive scale is multiplied in as exponents are formed.
  const bool shifted = added || !(call.scale > 0);
  const float scale = call.scale * kLog2E, factor = shifted ? 1.0f : scale;
  const char* mask = head_of(call.mask, batch, head, added ? 2 : 1);
  Softmax softmax;
  softmax.clear();
  float out[kRowTiles][kDim / 8][4] = {};
  for (; place.first_key < end; place.first_key += kKeys) {
    const bool seen = !call.causal || place.first_key <= last_query;
    float scores[kRowTiles][kKeys / 8][4] = {};
    const char* keys = next_tile();
    if (seen) {
      multiply_keys<Half, kDim, kKeys>(scores, own, keys);
      if (shifted) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) scores[m][i / 4][i % 4] *= scale;
        }
      }
      if (kMasked && !added) {
        with_mask<uint8_t, kKeys>(scores, call, mask, place, [](float& score, uint8_t kept) {
          if (kept == 0) score = -INFINITY;
        });
      }
      if (kMasked && added) {
        with_mask<Half, kKeys>(scores, call, mask, place, [](float& score, Half given) {
          const float bias = element(given);
          score += fmaxf(bias * kLog2E, bias == -INFINITY ? bias : kLeastBias);
        });
      }
      const int last_key = place.first_key + kKeys - 1;
      if (last_key >= call.keys || (call.causal && last_key > place.first_query)) {
        hide_keys<kKeys>(scores, call, place);
      }
      softmax.take<kDim, kKeys>(scores, out, factor);
    }
    const char* values = next_tile();
    if (seen) multiply_values<Half, kDim, kKeys>(out, scores, values);
  }

  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(batch) * call.heads + head) * call.queries;
#pragma unroll
  for (int slot = 0; slot < kSlotsOfRows; ++slot) {
    const float total = of_row(softmax.total[slot], [](float a, float b) { return a + b; });
    const float inverse = total == 0 ? 0.0f : 1.0f / total;
    const int query = place.query(slot);
    if (lane % 4 == 0 && query < call.queries) {
      call.lse[first + query] = (softmax.top[slot] + log2f(total)) * kLn2;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float (&sums)[4] = out[slot / 2][n];
      const uint32_t pair =
          pair_of<Half>(sums[slot % 2 * 2] * inverse, sums[slot % 2 * 2 + 1] * inverse);
      *reinterpret_cast<uint32_t*>(own + Tile::at(row_of_slot(slot), n) + lane % 4 * 4) = pair;
    }
  }
  __syncwarp();
  char* const to = const_cast<char*>(head_of(call.out, batch, head, 2));
  for (int i = lane; i < kWarpQueries * Tile::kPieces; i += kWarp) {
    const int row = i / Tile::kPieces, piece = i % Tile::kPieces, query = place.first_query + row;
    if (query >= call.queries) break;
    *reinterpret_cast<uint4*>(to + (query * call.out.row_stride + piece * kHalfPiece) * 2) =
        *reinterpret_cast<const uint4*>(own + Tile::at(row, piece));
  }
}

template <typename Half, int kDim, bool kMasked>
void launch_attend(const Attention& problem, const Context& context) {
  const int64_t heads = int64_t(problem.batches) * problem.heads;
  const int64_t blocks = blocks_for(problem.queries, kQueries) * heads;
  constexpr int kBytes = AttentionLayout<kDim, kMasked>::kBytes;
  VQKERNELS_LAUNCH((attend<Half, kDim, kMasked>), dim3(unsigned(blocks)), dim3(kAttentionThreads),
                   kBytes, context.stream)
  (problem);
}

template <typename Half, int kDim>
void launch_masked(const Attention& problem, const Context& context) {
  if (problem.mask_kind == MaskKind::none)
    return launch_attend<Half, kDim, false>(problem, context);
  launch_attend<Half, kDim, true>(problem, context);
}

template <typename Half>
void launch_dim(const Attention& problem, const Context& context) {
  switch (problem.dim) {
    case 64:
      return launch_masked<Half, 64>(problem, context);
    case 72:
      return launch_masked<Half, 72>(problem, context);
    case 80:
      return launch_masked<Half, 80>(problem, context);
    case 96:
      return launch_masked<Half, 96>(problem, context);
    case 128:
      return launch_masked<Half, 128>(problem, context);
  }
}

}  // namespace

bool attention_serves(DType dtype, int64_t dim) {
  return dtype != DType::f32 && (dim == 64 || dim == 72 || dim == 80 || dim == 96 || dim == 128);
}

void attention(const Attention& problem, const Context& context) {
  if (!attention_serves(problem.dtype, problem.dim)) {
    throw std::invalid_argument(
        "CUDA attention takes float16 and bfloat16 heads of 64, 72, 80, 96 or 128 columns, got " +
        std::to_string(problem.dim));
  }
  if (int64_t(problem.batches) * problem.heads * problem.queries == 0) return;
  if (problem.dtype == DType::f16) {
    launch_dim<__half>(problem, context);
  } else {
    launch_dim<__nv_bfloat16>(problem, context);
  }
}

}  // namespace vqkernels::cuda
