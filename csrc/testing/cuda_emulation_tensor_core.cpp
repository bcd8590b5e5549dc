// ldmatrix, mma.sync.m16n8k16 and m16n8k8, and wgmma.m64n64k16 for all lanes of a warp at once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/dtypes.h"
#include "cuda_emulation_engine.h"

namespace emulation {
namespace {

struct Tiles {
  uint32_t* registers;
  const void* row;
  int count;
  bool transposed;
};

struct Fragments {
  bool bfloat16;
  int steps;  // of eight columns of A
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

using Sixteen = double[16];

// A lane's part of 16 rows of 16 columns, or of 8.
void place_rows(Sixteen (&rows)[16], int lane, const uint32_t* a, bool bfloat16, int steps = 2) {
  for (int part = 0; part < 2 * steps; ++part) {
    for (int which = 0; which < 2; ++which) {
      rows[lane / 4 + part % 2 * 8][lane % 4 * 2 + part / 2 * 8 + which] =
          half_value(a[part], which, bfloat16);
    }
  }
}

// A lane's part of d = a b^T + c, 16 rows times 8.
void sum_products(int lane, const Sixteen* a, const Sixteen* b, const float* c, float* d,
                  int steps = 2) {
  for (int part = 0; part < 4; ++part) {
    const int row = lane / 4 + part / 2 * 8, column = lane % 4 * 2 + part % 2;
    float sum = c[part];
    for (int k = 0; k < steps * 8; k += 8) {
      double products[8];
      for (int step = 0; step < 8; ++step) products[step] = a[row][k + step] * b[column][k + step];
      sum = fused_sum(sum, products);
    }
    d[part] = sum;
  }
}

void multiply(void* const (&lanes)[32], int, Site) {
  Sixteen a[16], b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    place_rows(a, lane, own.a, own.bfloat16, own.steps);
    for (int which = 0; which < 2; ++which) {
      for (int part = 0; part < own.steps; ++part) {
        b[lane / 4][lane % 4 * 2 + part * 8 + which] = half_value(own.b[part], which, own.bfloat16);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    sum_products(lane, a, b, own.c, own.d, own.steps);
  }
}

constexpr int warpgroup_codes = 64;

// 16 bytes of a code: its columns are permuted in pieces of 16 bytes by the code's number.
const char* piece_of(const Product& product, int code, int side) {
  if (product.step == packed_codes) {
    return product.codes + code / 8 * 256 + side * 128 + code % 8 * 16;
  }
  return product.codes + code * 128 + (((product.step * 2 + side) ^ (code & 7)) << 4);
}

void read_codes(void* const (&lanes)[32], int first_thread, Site site) {
  const Product& any = *static_cast<const Product*>(lanes[0]);
  for (int code = 0; code < warpgroup_codes; ++code) {
    for (int side = 0; side < 2; ++side) {
      memory_async_read(piece_of(any, code, side), 16, site, first_thread);
    }
  }
}

// Does the products that stand at `at` of the lanes' first groups.
void do_product(int first_thread, size_t at) {
  const auto product_of = [&](int lane) -> const Product& {
    return engine.threads[first_thread + lane].product_groups.front()[at];
  };
  const Product& any = product_of(0);
  Sixteen a[16], b[warpgroup_codes];
  for (int lane = 0; lane < 32; ++lane) place_rows(a, lane, product_of(lane).a, any.bfloat16);
  for (int code = 0; code < warpgroup_codes; ++code) {
    for (int side = 0; side < 2; ++side) {
      uint16_t bits[8];
      memory_async_read(piece_of(any, code, side), 16, any.site, first_thread);
      std::memcpy(bits, piece_of(any, code, side), 16);
      for (int i = 0; i < 8; ++i) b[code][side * 8 + i] = half_value(bits[i], 0, any.bfloat16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = product_of(lane);
    const bool follows = at > 0 && product_of(lane).adds;
    for (int tile = 0; tile < warpgroup_codes / 8; ++tile) {
      const float none[4] = {};
      const float* from = follows ? own.d + tile * 4 : own.adds ? own.before + tile * 4 : none;
      sum_products(lane, a, b + tile * 8, from, own.d + tile * 4);
    }
  }
}

void do_groups(void* const (&lanes)[32], int first_thread, Site site) {
  const int left = *static_cast<const int*>(lanes[0]);
  Thread* threads = &engine.threads[first_thread];
  while (int(threads[0].product_groups.size()) > left) {
    for (int lane = 1; lane < 32; ++lane) {
      if (threads[lane].product_groups.size() != threads[0].product_groups.size() ||
          threads[lane].product_groups.front().size() != threads[0].product_groups.front().size()) {
        return fault("divergent wgmma: lanes of a warp have issued different products",
                     {site, nullptr}, first_thread + lane);
      }
    }
    const size_t count = threads[0].product_groups.front().size();
    for (size_t at = 0; at < count; ++at) do_product(first_thread, at);
    for (int lane = 0; lane < 32; ++lane) {
      threads[lane].product_groups.erase(threads[lane].product_groups.begin());
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
      const auto row = [&](int i) {
        return static_cast<const char*>(static_cast<const Tiles*>(lanes[tile * 8 + i])->row);
      };
      const Tiles& own = *static_cast<const Tiles*>(lanes[lane]);
      if (own.transposed) {
        char* const to = reinterpret_cast<char*>(own.registers + tile);
        std::memcpy(to, row(lane % 4 * 2) + lane / 4 * 2, 2);
        std::memcpy(to + 2, row(lane % 4 * 2 + 1) + lane / 4 * 2, 2);
      } else {
        std::memcpy(own.registers + tile, row(lane / 4) + lane % 4 * 4, 4);
      }
    }
  }
}

}  // namespace

void mma_16816(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               const float (&c)[4], Site site) {
  Fragments brought{bfloat16, 2, d, a, b, c};
  collective("mma_16816", 0xffffffffu, &brought, multiply, site);
}

void mma_1688(bool bfloat16, float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
              Site site) {
  Fragments brought{bfloat16, 1, d, a, &b, c};
  collective("mma_1688", 0xffffffffu, &brought, multiply, site);
}

void warpgroup_mma(bool bfloat16, float (&d)[32], const uint32_t (&a)[4], const void* codes,
                   int step, bool adds, Site site) {
  const int alignment = step == packed_codes ? 16 : 1024;
  if (reinterpret_cast<uintptr_t>(codes) % alignment != 0) {
    fault("misaligned wgmma: its codes do not begin at a multiple of " + std::to_string(alignment),
          {site, nullptr});
  }
  Product product{bfloat16, adds, d, {}, {}, static_cast<const char*>(codes), step, site};
  std::copy_n(a, 4, product.a);
  std::copy_n(d, 32, product.before);
  std::fill_n(d, 32, std::numeric_limits<float>::quiet_NaN());
  engine.threads[engine.current].open_products.push_back(product);
  collective("wgmma", 0xffffffffu, &product, read_codes, site);
}

void warpgroup_commit() {
  Thread& thread = engine.threads[engine.current];
  thread.product_groups.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}

void warpgroup_wait(int groups_left, Site site) {
  if (is_disabled(site)) return;
  collective("wgmma wait", 0xffffffffu, &groups_left, do_groups, site);
}

void ldmatrix(uint32_t* registers, int tiles, const void* row, Site site) {
  Tiles brought{registers, row, tiles, false};
  collective("ldmatrix", 0xffffffffu, &brought, load_tiles, site);
}

void ldmatrix_transposed(uint32_t* registers, int tiles, const void* row, Site site) {
  Tiles brought{registers, row, tiles, true};
  collective("ldmatrix.trans", 0xffffffffu, &brought, load_tiles, site);
}

}  // namespace emulation
