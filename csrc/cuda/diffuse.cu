// `diffuse`: samples and their training targets at a level of noise, in one pass.
//
// Floor, bytes an element, s the samples' size: s read and 2 s written, and what noise that is
// given has. Drawn noise takes about 50 operations an element, as many as an H100 has time for at 6
// bytes an element and half as many as at 12.
#include "noise_pieces.h"

namespace vqkernels::cuda {
namespace {

template <typename T, int kCount>
__device__ __forceinline__ void diffuse_elements(const Diffuse& call, unsigned sample,
                                                 int64_t first, int64_t level) {
  Loaded<kCount> loaded, noise;
  const bool given = call.noise.given.data != nullptr;
  loaded.template load_as<T>(call.x0, sample, first);
  if (given) noise.load(call.noise.given, sample, first);
  const int64_t at = sample * call.grid.levels + level;
  const float alpha = call.alpha[at], sigma = call.sigma[at];

  float z[kCount], data[kCount], out[kCount];
  if (given) {
    noise.read(call.noise.given, z);
  } else {
    normals_of(call.noise, sample, 0).from(first, z);
  }
  loaded.template read_as<T>(data);
#pragma unroll
  for (int e = 0; e < kCount; ++e) out[e] = fmaf(sigma, z[e], alpha * data[e]);
  store<T>(call.x_t, sample, first, out);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    out[e] = call.target == Target::epsilon  ? z[e]
             : call.target == Target::sample ? data[e]
             : call.target == Target::v      ? fmaf(alpha, z[e], -(sigma * data[e]))
                                             : z[e] - data[e];
  }
  store<T>(call.wanted, sample, first, out);
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, kPieceBlocks)
    diffuse_pieces(Diffuse call, Shares shares) {
  constexpr int kCount = kPiece<T>;
  const unsigned sample = shares.sample();
  if (sample >= shares.batch) return;
  each_level<kCount>(call.grid, shares.piece() * kCount,
                     [&](auto count, int64_t first, int64_t level) {
                       diffuse_elements<T, decltype(count)::value>(call, sample, first, level);
                     });
}

}  // namespace

void diffuse(const Diffuse& problem, const Context& context) {
  if (problem.grid.batch * problem.grid.elements == 0) return;
  Diffuse call = problem;
  with_type(call.x0.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (Samples* of : {&call.x0, &call.x_t, &call.wanted, &call.noise.given}) {
      of->packed = is_packed(*of, call.grid, kPiece<T>);
    }
    const Launches of = launches_for(call.grid, kPiece<T>);
    VQKERNELS_LAUNCH(diffuse_pieces<T>, of.grid, of.block, 0, context.stream)(call, of.shares);
  });
}

}  // namespace vqkernels::cuda
