// ldmatrix and mma.sync.m16n8k16 for all lanes of a warp at once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/dtypes.h"
#include "cuda_emulation_core.h"

namespace emulation {
namespace {

struct Tiles {
  uint32_t* registers;
  const void* row;
  int count;
};

struct Fragments {
  bool bfloat16;
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

double half_value(uint32_t pair, int which, bool bfloat16) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  return bfloat16 ? vqkernels::to_float(vqkernels::bfloat16_t{bits})
                  : vqkernels::to_float(vqkernels::half_t{bits});
}

uint64_t magnitude(double value) {  // bits that are ordered like absolute values
  return vqkernels::bit_cast<uint64_t>(value) & ~(uint64_t(1) << 63);
}

double power_of_two(int exponent) {
  return vqkernels::bit_cast<double>(uint64_t(exponent + 1023) << 52);
}

// Rounds toward zero.
float truncated(double value) {
  const float nearest = float(value);
  if (std::fabs(double(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

// The accumulator and eight products, summed as tensor cores do at their least accurate (Fasi,
// Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): products are
// exact, every term is cut off below 24 bits of the largest one, the sum is exact and cut off to
// float.
float fused_sum(float accumulator, const double (&products)[8]) {
  uint64_t largest = magnitude(accumulator);
  for (double product : products) largest = std::max(largest, magnitude(product));
  if (largest == 0) return 0;
  const int top = int(largest >> 52) - 1023;  // halves' products are all normal doubles
  if (top == 1024) {                          // infinite or not a number
    double total = accumulator;
    for (double product : products) total += product;
    return float(total);
  }
  const double scale = power_of_two(23 - top);
  int32_t sum = int32_t(double(accumulator) * scale);  // nine terms below 2^24
  for (double product : products) sum += int32_t(product * scale);
  return truncated(double(sum) * power_of_two(top - 23));
}

void multiply(void* const (&lanes)[32], int, Site) {
  double a[16][16], b[8][16];  // b transposed
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, column = lane % 4 * 2;
    for (int which = 0; which < 2; ++which) {
      for (int part = 0; part < 4; ++part) {
        a[group + part % 2 * 8][column + part / 2 * 8 + which] =
            half_value(own.a[part], which, own.bfloat16);
      }
      for (int part = 0; part < 2; ++part) {
        b[group][column + part * 8 + which] = half_value(own.b[part], which, own.bfloat16);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    for (int part = 0; part < 4; ++part) {
      const int row = lane / 4 + part / 2 * 8, column = lane % 4 * 2 + part % 2;
      float sum = own.c[part];
      for (int k = 0; k < 16; k += 8) {
        double products[8];
        for (int step = 0; step < 8; ++step)
          products[step] = a[row][k + step] * b[column][k + step];
        sum = fused_sum(sum, products);
      }
      own.d[part] = sum;
    }
  }
}

void load_tiles(void* const (&lanes)[32], int first_thread, Site site) {
  const int count = static_cast<const Tiles*>(lanes[0])->count;
  for (int lane = 0; lane < 8 * count; ++lane) {
    const Tiles& given = *static_cast<const Tiles*>(lanes[lane]);
    access(given.row, 16, Access::read, {site, nullptr}, first_thread + lane, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int tile = 0; tile < count; ++tile) {
      const Tiles& given = *static_cast<const Tiles*>(lanes[tile * 8 + lane / 4]);
      std::memcpy(static_cast<Tiles*>(lanes[lane])->registers + tile,
                  static_cast<const char*>(given.row) + lane % 4 * 4, 4);
    }
  }
}

}  // namespace

void mma_16816(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               const float (&c)[4], Site site) {
  Fragments brought{bfloat16, d, a, b, c};
  collective("mma_16816", 0xffffffffu, &brought, multiply, site);
}

void ldmatrix(uint32_t* registers, int tiles, const void* row, Site site) {
  Tiles brought{registers, row, tiles};
  collective("ldmatrix", 0xffffffffu, &brought, load_tiles, site);
}

}  // namespace emulation
