// Philox4x32-10: four random words of a counter and a key. Source: Salmon et al. 2011, "Parallel
// Random Numbers: As Easy as 1, 2, 3". Torch-free.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VQKERNELS_BOTH_SIDES __host__ __device__
#else
#define VQKERNELS_BOTH_SIDES
#endif

namespace vqkernels {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

struct WideProduct {
  VQKERNELS_BOTH_SIDES void operator()(uint32_t factor, uint32_t word, uint32_t& high,
                                       uint32_t& low) const {
    const uint64_t product = uint64_t(factor) * word;
    high = uint32_t(product >> 32);
    low = uint32_t(product);
  }
};

// The counter becomes its random words. `Word` is uint32_t, or a vector of them, which brings its
// `product(factor, word, high, low)`.
template <typename Word, typename Product = WideProduct>
VQKERNELS_BOTH_SIDES inline void philox4x32(Word (&counter)[4], uint64_t key,
                                            const Product& product = Product()) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word high0, low0, high2, low2;
    product(kPhiloxMultiplier0, counter[0], high0, low0);
    product(kPhiloxMultiplier1, counter[2], high2, low2);
    counter[0] = high2 ^ counter[1] ^ key0;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
}

}  // namespace
}  // namespace vqkernels
