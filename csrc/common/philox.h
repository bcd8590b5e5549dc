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
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high2, low2;
    product(0xD2511F53u, counter[0], high0, low0);
    product(0xCD9E8D57u, counter[2], high2, low2);
    counter[0] = high2 ^ counter[1] ^ key0;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace vqkernels
