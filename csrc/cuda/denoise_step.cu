// `denoise_step`: one step of a sampler, in one launch and without a look at the device's memory
// from the host: which row of the table counts is read by the kernels.
//
// Floor, bytes an element, s the samples' size and o the outputs': s + o read and s written; o more
// for guidance, s for each history and each result beside the next sample. With two dozen fp32
// operations an element memory decides, drawn noise (about 50 more) aside.
//
// Whether guidance is rescaled stands in the table, so blocks of a guided call find out by
// themselves, and each then reads its sample's outputs once for the standard deviations: from the
// cache, and only in steps that rescale. Dynamic thresholds take one block a sample, since a sample
// may be written while another block would still read it.
#include "denoise_statistics.h"

namespace vqkernels::cuda {
namespace {

// Of a multiprocessor: 36 KB are under way with three operands; without guidance 32 with two.
constexpr int kGuidedBlocks = 3;

template <int kCount>
__device__ __forceinline__ void multiply_by_deviation(const DenoiseStep& call, const Row& row,
                                                      const Loaded<kCount>& variance,
                                                      float (&z)[kCount]) {
  float v[kCount];
  variance.read(call.variance, v);
  const float low = row[kVarianceLogMin], high = row[kVarianceLogMax];
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    z[e] *= call.variance_type == VarianceType::learned
                ? sqrtf(v[e])
                : expf((v[e] + 1.0f) * 0.25f * (high - low) + low * 0.5f);
  }
}

template <typename T, bool kWhole, int kCount>
__device__ __forceinline__ void step(const DenoiseStep& call, const Row& row, const Whole& whole,
                                     unsigned sample, int64_t first) {
  const bool drawn = call.noise.key != nullptr;
  const bool noisy = row[kPrevNoise] != 0.0f && (drawn || call.noise.given.data != nullptr);
  const bool varied = noisy && call.variance.data != nullptr;
  Loaded<kCount> loaded, noise, variance;
  Outputs<kCount> outputs;
  loaded.template load_as<T>(call.sample, sample, first);
  outputs.template load<kWhole>(call, sample, first);

  float values[kCount], output[kCount], prediction[kCount], prev[kCount], extra[kCount];
  loaded.template read_as<T>(values);
  outputs.template read<kWhole>(call, row, whole.factor, output);
  predict(row, values, output, prediction);
  if (call.threshold != Threshold::none) {
    const bool dynamic = kWhole && call.threshold == Threshold::dynamic;
    const float limit = dynamic ? whole.limit : row[kClip];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      prediction[e] = clamped(prediction[e], limit);
      if (dynamic) prediction[e] /= limit;
    }
  }

#pragma unroll
  for (int e = 0; e < kCount; ++e) prev[e] = extra[e] = 0;
  const bool wants_extra = call.extra.data != nullptr;
  const auto add = [&](int operand, const float (&of)[kCount]) {
    add_term(row[kPrev + operand], of, prev);
    if (wants_extra) add_term(row[kExtra + operand], of, extra);
  };
  add(0, values);
  add(1, prediction);
  add(2, output);
#pragma unroll
  for (int i = 0; i < kMostHistory; ++i) {
    if (i >= call.histories) break;
    loaded.template load_as<T>(call.history[i], sample, first);
    loaded.template read_as<T>(values);
    add(3 + i, values);
  }
  if (call.prediction.data != nullptr) store<T>(call.prediction, sample, first, prediction);
  if (wants_extra) store<T>(call.extra, sample, first, extra);
  if (noisy) {
    if (!drawn) noise.load(call.noise.given, sample, first);
    if (varied) variance.load(call.variance, sample, first);
    if (drawn) {
      normals_of(call.noise, sample, row.step).from(first, values);
    } else {
      noise.read(call.noise.given, values);
    }
    if (varied) multiply_by_deviation(call, row, variance, values);
    add_term(row[kPrevNoise], values, prev);
  }
  store<T>(call.prev_sample, sample, first, prev);
}

// What a guided step scales outputs by, at 1 exactly them.
template <typename T>
__device__ __forceinline__ float guidance_factor(const DenoiseStep& call, const Row& row,
                                                 unsigned sample, GuidanceSlots& slots) {
  const float rescale = row[kGuidanceRescale];
  if (call.uncond_output.data == nullptr || rescale == 0.0f || call.grid.elements < 2) return 1;
  const float ratio = ratio_of_deviations<kPiece<T>>(call, row, sample, slots);
  return rescale * ratio + 1.0f - rescale;
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, kPieceBlocks)
    denoise_pieces(DenoiseStep call, Shares shares) {
  constexpr int kCount = kPiece<T>;
  const unsigned sample = shares.sample();
  if (sample >= shares.batch) return;
  each_level<kCount>(call.grid, shares.piece() * kCount,
                     [&](auto count, int64_t first, int64_t level) {
                       const Row row(call, sample, level);
                       step<T, false, decltype(count)::value>(call, row, Whole(), sample, first);
                     });
}

// A block has pieces of one sample.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads, kGuidedBlocks)
    denoise_guided(DenoiseStep call, Shares shares) {
  constexpr int kCount = kPiece<T>;
  __shared__ GuidanceSlots slots;
  const unsigned sample = shares.sample();
  Whole whole;
  whole.factor = guidance_factor<T>(call, Row(call, sample, 0), sample, slots);
  each_level<kCount>(call.grid, shares.piece() * kCount,
                     [&](auto count, int64_t first, int64_t level) {
                       const Row row(call, sample, level);
                       step<T, true, decltype(count)::value>(call, row, whole, sample, first);
                     });
}

// A block has a sample, and a thread comes back to the elements that it read before.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) denoise_samples(DenoiseStep call, Rank rank) {
  __shared__ GuidanceSlots slots;
  __shared__ Ranking ranking;
  const unsigned sample = blockIdx.x;
  const Row row(call, sample, 0);
  Whole whole;
  whole.factor = guidance_factor<T>(call, row, sample, slots);
  whole.limit = dynamic_limit<T>(call, row, sample, whole.factor, rank, ranking);
  each_of_sample<kPiece<T>>(call.grid, [&](auto count, int64_t first) {
    step<T, true, decltype(count)::value>(call, row, whole, sample, first);
  });
}

void mark_packed(DenoiseStep& call, int count) {
  Samples* const all[] = {&call.sample,     &call.model_output, &call.uncond_output,
                          &call.variance,   &call.noise.given,  &call.prev_sample,
                          &call.prediction, &call.extra,        &call.history[0],
                          &call.history[1], &call.history[2],   &call.history[3]};
  for (Samples* of : all) of->packed = is_packed(*of, call.grid, count);
}

}  // namespace

void denoise_step(const DenoiseStep& problem, const Context& context) {
  if (problem.grid.batch * problem.grid.elements == 0) return;
  DenoiseStep call = problem;
  const bool guided = call.uncond_output.data != nullptr;
  with_type(call.sample.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    mark_packed(call, kPiece<T>);
    if (call.threshold == Threshold::dynamic) {
      const Launches of = launches_for(call.grid, kPiece<T>, false);
      VQKERNELS_LAUNCH(denoise_samples<T>, dim3(of.shares.batch), of.block, 0, context.stream)
      (call, Rank(call.grid.elements, call.ratio));
    } else if (guided) {
      const Launches of = launches_for(call.grid, kPiece<T>, false);
      VQKERNELS_LAUNCH(denoise_guided<T>, of.grid, of.block, 0, context.stream)(call, of.shares);
    } else {
      const Launches of = launches_for(call.grid, kPiece<T>);
      VQKERNELS_LAUNCH(denoise_pieces<T>, of.grid, of.block, 0, context.stream)(call, of.shares);
    }
  });
}

}  // namespace vqkernels::cuda
