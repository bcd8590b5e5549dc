// `normal_noise`: about 50 operations an element beside its one write, so that operations decide up
// to 4 bytes an element.
#include "noise_pieces.h"

namespace vqkernels::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, kPieceBlocks)
    noise_pieces(NormalNoise call, Shares shares) {
  constexpr int kCount = kPiece<T>;
  const unsigned sample = shares.sample();
  if (sample >= shares.batch) return;
  const Normals normals = normals_of(call.noise, sample, 0);
  each_level<kCount>(call.grid, shares.piece() * kCount, [&](auto count, int64_t first, int64_t) {
    float z[decltype(count)::value];
    normals.from(first, z);
    store<T>(call.out, sample, first, z);
  });
}

}  // namespace

void normal_noise(const NormalNoise& problem, const Context& context) {
  if (problem.grid.batch * problem.grid.elements == 0) return;
  NormalNoise call = problem;
  with_type(call.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    call.out.packed = is_packed(call.out, call.grid, kPiece<T>);
    const Launches of = launches_for(call.grid, kPiece<T>);
    VQKERNELS_LAUNCH(noise_pieces<T>, of.grid, of.block, 0, context.stream)(call, of.shares);
  });
}

}  // namespace vqkernels::cuda
