// The state of the running block, shared by the emulation's own source files.
#pragma once

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

struct Thread {
  void* stack_pointer = nullptr;
  State state = State::ready;
  uint3 index{};
  Site site{};                  // where it waits
  const char* waits = nullptr;  // in what
  uint32_t mask = 0;
  void* brought = nullptr;
  CopyGroup open;
  std::vector<CopyGroup> groups;
};

struct Engine {
  const Configuration* configuration = nullptr;  // null outside of a launch
  std::vector<Thread> threads;                   // of the running block
  int count = 0;                                 // how many of them there are
  int current = -1;                              // the running one; -1: the scheduler
  void* shared_begin = nullptr;                  // dynamic shared memory, sized exactly
};
extern Engine engine;

// Fibers.
struct Stacks {
  unsigned char *begin, *end;  // all of them, for telling threads' own memory apart
};
extern Stacks stacks;

std::string text(Where where);
std::string text(uint3 index);

// Memory checks (cuda_emulation_memory.cpp). Each does nothing in a build without them.
void memory_begin_launch();
void memory_begin_block(void* shared, size_t bytes);  // also fills shared memory with NaNs
void memory_end_launch();
void memory_barrier();
void memory_warp_barrier(int first_thread, uint32_t mask);
void memory_copy_issued(const void* to, size_t bytes, Site site);
void memory_copy_arrived(const void* to, size_t bytes, Site site);
bool is_shared(const void* address, size_t bytes);

}  // namespace emulation
