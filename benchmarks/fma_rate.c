/* The rate of dependent-free fused multiply-adds on one core: the ceiling of any fp32 product.
 *
 * Each loop keeps enough independent accumulators in registers to cover the latency of the unit.
 * Processors without an FMA run a multiply and an add, which count as the same two operations.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define DEFINE_LOOP(NAME, ATTRIBUTE, BYTES, COUNT)                                     \
  typedef float NAME##_vector __attribute__((vector_size(BYTES)));                     \
  ATTRIBUTE static double NAME(double seconds, float *sink) {                          \
    enum { lanes = (BYTES) / 4, steps = 4096 };                                        \
    NAME##_vector acc[COUNT], factor, term;                                            \
    for (int lane = 0; lane < lanes; ++lane) {                                         \
      factor[lane] = 0.999f;                                                           \
      term[lane] = 1e-3f;                                                              \
      for (int i = 0; i < (COUNT); ++i) acc[i][lane] = (float)(i + lane);              \
    }                                                                                  \
    double best = 0.0;                                                                 \
    const double begin = now();                                                        \
    double end = begin;                                                                \
    do {                                                                               \
      const double start = end;                                                        \
      for (int64_t step = 0; step < steps; ++step) {                                   \
        _Pragma("GCC unroll 32") for (int i = 0; i < (COUNT); ++i) acc[i] =            \
            acc[i] * factor + term;                                                    \
      }                                                                                \
      end = now();                                                                     \
      const double rate = 2.0 * lanes * (COUNT) * (double)steps / (end - start);       \
      if (rate > best) best = rate;                                                    \
    } while (end - begin < seconds);                                                   \
    for (int i = 0; i < (COUNT); ++i) *sink += acc[i][0];                              \
    return best;                                                                       \
  }

#if defined(__x86_64__)
DEFINE_LOOP(loop_avx512, __attribute__((target("avx512f"))), 64, 20)
DEFINE_LOOP(loop_avx2, __attribute__((target("avx2,fma"))), 32, 12)
DEFINE_LOOP(loop_portable, , 16, 12)
#else
DEFINE_LOOP(loop_portable, , 16, 24)
#endif

/* Operations a second of the best block of about ten microseconds within `seconds`. */
double fma_rate(double seconds) {
  volatile float keep;
  float sink = 0.0f;
  double rate;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f"))
    rate = loop_avx512(seconds, &sink);
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    rate = loop_avx2(seconds, &sink);
  else
#endif
    rate = loop_portable(seconds, &sink);
  keep = sink;
  (void)keep;
  return rate;
}
