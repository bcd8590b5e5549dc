// What the emulated CUDA language is made of: launches, barriers, collectives, checked memory.
// Kernels see it through cuda_emulation.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

struct CUstream_st;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// For code that the race build must not see: it works on behalf of a thread, not as one.
#define EMULATION_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

#define EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulation {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Builtins {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Builtins builtins;

// Launches ------------------------------------------------------------------------------------

struct Configuration {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
};

// Runs `call(argument)` as every thread; throws std::runtime_error with the first fault.
void launch(const Configuration& configuration, void (*call)(void*), void* argument);

template <typename... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  Configuration configuration;

  void operator()(Parameters... arguments) const {
    auto call = [&] { kernel(arguments...); };
    launch(
        configuration, [](void* argument) { (*static_cast<decltype(call)*>(argument))(); }, &call);
  }
};

template <typename... Parameters>
Launch<Parameters...> prepare(void (*kernel)(Parameters...), const char* name, dim3 grid,
                              dim3 block, size_t shared_bytes, CUstream_st*) {
  return {kernel, {name, grid, block, shared_bytes}};
}

void* dynamic_shared();

// Barriers and collectives ----------------------------------------------------------------------

enum class Vote { none, all, any, count };
int barrier(Vote vote, bool predicate, Site site);
void warp_barrier(uint32_t mask, Site site);
uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site);

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle mode, uint32_t mask, uint64_t bits, int operand, int width, Site site);

// Waits for the lanes in `mask`; the last one calls `work` with what each lane brought, null for
// a lane outside the mask.
using Work = void (*)(void* const (&lanes)[32], int first_thread, Site site);
void collective(const char* name, uint32_t mask, void* brought, Work work, Site site);

// Each lane brings its part of the tiles as tensor_core.h lays them out.
void mma_16816(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               const float (&c)[4], Site site);
void mma_1688(bool bfloat16, float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
              Site site);
// Fills `registers` of the running lane from `tiles` (2 or 4) tiles.
void ldmatrix(uint32_t* registers, int tiles, const void* row, Site site);
void ldmatrix_transposed(uint32_t* registers, int tiles, const void* row, Site site);

// One product of a warpgroup, for the running lane: done in a wait, until when `d` holds NaNs. Each
// warp multiplies on its own, since it has its own rows. `step`: of codes in rows of 128 bytes.
constexpr int packed_codes = -1;  // as a step: codes of 16 columns, eight by eight
void warpgroup_mma(bool bfloat16, float (&d)[32], const uint32_t (&a)[4], const void* codes,
                   int step, bool adds, Site site);
void warpgroup_commit();
void warpgroup_wait(int groups_left, Site site);

// Memory ----------------------------------------------------------------------------------------

// An mbarrier: a phase ends when `count` arrivals have come and the bytes that they announced have
// been copied.
void mbarrier_init(void* barrier, int count, Site site);
void mbarrier_arrive_expecting(void* barrier, int bytes, Site site);
void mbarrier_wait(void* barrier, int parity, Site site);
// Bytes that arrive at the end of the barrier's phase.
void bulk_copy(void* shared, const void* global, int bytes, void* barrier, Site site);
void cp_async_16(void* shared, const void* global, int source_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left, Site site);

struct Where {
  Site site;
  const void* pc;  // the place where `site` has no file
};
enum class Access { read, write, atomic };

// Checks bounds, alignment, initialization and races for an access by `thread` of the block (-1:
// the running one). Does nothing in builds without memory checks, except for alignment.
void access(const void* address, size_t bytes, Access kind, Where where, int thread = -1,
            size_t alignment = 1);

void add_array(const void* data, size_t bytes, bool initialized, const std::string& name);
void remove_array(const void* data);
// cudaMemset: writes memory outside of a kernel.
void fill(void* data, int value, size_t bytes);

// Ends the launch with this fault; the first one counts.
void fault(const std::string& what, Where where, int thread = -1);

// Tests -----------------------------------------------------------------------------------------

enum class Order { forward = 0, reverse = 1, shuffled = 2 };
void set_order(Order order, uint64_t seed);

// Makes the __syncthreads*, __syncwarp or cp_async_wait at this place do nothing.
void disable(const std::string& file, int line);
void enable_all();
// How often a place that is disabled was reached.
int64_t times_disabled();
// How often the barrier or wait at this place was reached since `forget_reached`.
int64_t times_reached(const std::string& file, int line);
void forget_reached();
void release_stacks();

// Keeps a message until the next one.
const char* keep(const char* message);

// For entry points: runs `call`, returns the message of what it threw, or null.
template <typename Call>
const char* caught(Call&& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

// Scratch memory as torch would give it: exact size, aligned to 256 bytes, holding garbage.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();
  void* allocate(int64_t bytes);

 private:
  std::vector<void*> blocks_;
};

}  // namespace emulation
