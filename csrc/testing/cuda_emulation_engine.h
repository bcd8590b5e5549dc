// The state of the running block, shared by the emulation's own source files.
#pragma once

#include <map>
#include <vector>

#include "cuda_emulation_core.h"

namespace emulation {

enum class State : uint8_t { ready, barrier, collective, exited };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  Site site;
};
using CopyGroup = std::vector<Copy>;

// A lane's part of a product of a warpgroup that is not done yet.
struct Product {
  bool bfloat16, adds;
  float* d;
  uint32_t a[4];
  float before[32];
  const char* codes;
  int step;
  Site site;
};
using ProductGroup = std::vector<Product>;

// A barrier in shared memory that copies end a phase of.
struct CopyBarrier {
  int count, arrived, phase;
  int64_t announced, issued;  // bytes
  std::vector<Copy> copies;
};

struct Thread {
  State state = State::ready;
  uint3 index{};
  Site site{};                  // where it waits
  const char* waits = nullptr;  // in what
  uint32_t mask = 0;
  void* brought = nullptr;
  CopyGroup open;
  std::vector<CopyGroup> groups;
  ProductGroup open_products;
  std::vector<ProductGroup> product_groups;
};

struct Engine {
  const Configuration* configuration = nullptr;  // null outside of a launch
  std::vector<Thread> threads;                   // of the running block
  std::map<void*, CopyBarrier> copy_barriers;    // of the running block
  int count = 0;                                 // how many of them there are
  int arrived = 0, exited = 0;                   // of them in a barrier, at the kernel's end
  int votes = 0, decided = 0;    // of the barrier that fills, of the one passed last
  int current = -1;              // the running one; -1: the scheduler
  void* shared_begin = nullptr;  // dynamic shared memory, sized exactly
};
extern Engine engine;

constexpr int most_threads = 1024;  // of a block

// Fibers (cuda_emulation_fibers.cpp).
struct Stacks {
  unsigned char *begin, *end;  // all of them, for telling threads' own memory apart
};
extern Stacks stacks;
void allocate_stacks();                        // where there are none yet
void prepare_stack(int index, void (*run)());  // the thread's next turn begins `run`
void enter(int index);                         // from the scheduler to a thread
void leave(int index);                         // and back, from within it
// Threads that a fault ended never return: clears their frames' guards.
void forget_frames(int count);

// Whether a test has disabled the barrier or wait at this place; counts the visit.
bool is_disabled(Site site);
// In the order that is shuffled, draws the next one.
void shuffle_sequence();
// Reports why nothing can run, when every thread waits or has left. Lanes that wait for each other
// in collectives are a deadlock; others can never come.
void explain_standstill();

std::string text(Where where);
std::string text(uint3 index);

// Says that kernels report their accesses: before constructors of the memory checks have run.
void check_memory();

// Memory checks (cuda_emulation_memory.cpp). Each does nothing in a build without them.
void memory_begin_launch();
void memory_begin_block(void* shared, size_t bytes);  // also fills shared memory with NaNs
void memory_end_launch();
void memory_barrier();
void memory_warp_barrier(int first_thread, uint32_t mask);
void memory_copy_issued(const void* to, size_t bytes, Site site);
void memory_copy_arrived(const void* to, size_t bytes, Site site);
// Bytes of a bulk copy are there, for whoever waited.
void memory_bulk_arrived(const void* to, size_t bytes);
// A read by tensor cores, which need a fence before they see what threads wrote to shared memory:
// only what bulk copies wrote is theirs.
void memory_async_read(const void* from, size_t bytes, Site site, int thread);
bool is_shared(const void* address, size_t bytes);

}  // namespace emulation
