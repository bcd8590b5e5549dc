// Blocks, threads as fibers, barriers and collectives.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "cuda_emulation_core.h"
#include "cuda_emulation_engine.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace emulation {

Builtins builtins;
Engine engine;
Stacks stacks;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int most_threads = 1024;
constexpr size_t most_shared_bytes = 227 << 10;  // of a block on the devices with the most

struct Disabled {
  std::string file;
  int line;
};

struct Reached {
  Site site;
  int64_t times;
};

struct Scheduler {
  Order order = Order::forward;
  uint64_t seed = 0, random = 0;
  std::vector<int> sequence;
  void* stack_pointer = nullptr;
  void (*call)(void*) = nullptr;
  void* argument = nullptr;
  std::string fault;  // empty: none yet
  std::string kept;
  int arrived = 0, exited = 0;
  int votes = 0, decided = 0;  // of the barrier that fills, of the one passed last
  std::vector<Disabled> disabled;
  int64_t times_disabled = 0;
  std::vector<Reached> reached;
#if !defined(__x86_64__)
  ucontext_t context;
  std::vector<ucontext_t> contexts;
#endif
};
Scheduler scheduler;

Thread& self() { return engine.threads[engine.current]; }

// Fibers ----------------------------------------------------------------------------------------

void run_thread();

#if defined(__x86_64__)

extern "C" void emulation_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

void prepare_stack(int index, unsigned char* end) {
  void** top = reinterpret_cast<void**>(end);
  top[-1] = nullptr;  // a return address for run_thread, which never returns
  top[-2] = reinterpret_cast<void*>(&run_thread);
  for (int saved = 3; saved <= 8; ++saved) top[-saved] = nullptr;
  engine.threads[index].stack_pointer = top - 8;
}

void enter(int index) {
  emulation_switch(&scheduler.stack_pointer, engine.threads[index].stack_pointer);
}

void leave(int index) {
  emulation_switch(&engine.threads[index].stack_pointer, scheduler.stack_pointer);
}

#else

void prepare_stack(int index, unsigned char* end) {
  scheduler.contexts.resize(most_threads);
  ucontext_t& context = scheduler.contexts[index];
  getcontext(&context);
  context.uc_stack.ss_sp = end - stack_bytes;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, run_thread, 0);
}

void enter(int index) { swapcontext(&scheduler.context, &scheduler.contexts[index]); }
void leave(int index) { swapcontext(&scheduler.contexts[index], &scheduler.context); }

#endif

// One stack a thread, each above a page that must not be touched.
void allocate_stacks() {
  if (stacks.begin != nullptr) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), stride = stack_bytes + page;
  void* memory = mmap(nullptr, stride * most_threads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
  stacks.begin = static_cast<unsigned char*>(memory);
  stacks.end = stacks.begin + stride * most_threads;
  for (int index = 0; index < most_threads; ++index) {
    mprotect(stacks.begin + stride * index, page, PROT_NONE);
  }
  engine.threads.resize(most_threads);
}

unsigned char* stack_end(int index) {
  const size_t stride = size_t(stacks.end - stacks.begin) / most_threads;
  return stacks.begin + stride * (index + 1);
}

// Ends the turn of the running thread.
void wait() { leave(engine.current); }

void run_thread() {
  scheduler.call(scheduler.argument);
  Thread& thread = self();
  thread.state = State::exited;
  ++scheduler.exited;
  if (scheduler.arrived > 0) {
    const Thread& waiting =
        *std::find_if(engine.threads.begin(), engine.threads.begin() + engine.count,
                      [](const Thread& other) { return other.state == State::barrier; });
    fault(std::string("barrier with exited threads: this thread has left the kernel and others "
                      "wait in ") +
              waiting.waits,
          {waiting.site, nullptr});
  }
  wait();
}

// Faults ----------------------------------------------------------------------------------------

std::string file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

std::string lane_list(uint32_t lanes) {
  std::string list;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  }
  return list;
}

// The lanes that a collective of `thread` waits for, by where they are.
struct Missing {
  uint32_t gone = 0, elsewhere = 0;
  const Thread* other = nullptr;  // one of those elsewhere, in a block's barrier if any is
};

Missing missing_lanes(int index) {
  const Thread& thread = engine.threads[index];
  Missing missing;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    const Thread& peer = engine.threads[index / 32 * 32 + lane];
    const bool here = peer.state == State::collective && peer.mask == thread.mask &&
                      peer.site.line == thread.site.line;
    if (here) continue;
    (peer.state == State::exited ? missing.gone : missing.elsewhere) |= 1u << lane;
    if (peer.state == State::exited) continue;
    if (missing.other == nullptr || peer.state == State::barrier) missing.other = &peer;
  }
  return missing;
}

// Why nothing can run: called when every thread waits or has left. Lanes that wait for each other
// in collectives are a deadlock; others can never come.
void explain_standstill() {
  int deadlocked = -1;
  for (int index = 0; index < engine.count; ++index) {
    const Thread& thread = engine.threads[index];
    if (thread.state != State::collective) continue;
    const Missing missing = missing_lanes(index);
    if (missing.gone == 0 && missing.other->state == State::collective) {
      if (deadlocked < 0) deadlocked = index;
      continue;
    }
    std::string what = std::string("collective with missing lanes: ") + thread.waits + " names";
    if (missing.gone != 0) what += " lanes " + lane_list(missing.gone) + " that left the kernel";
    if (missing.elsewhere != 0) {
      what += std::string(missing.gone != 0 ? " and" : "") + " lanes " +
              lane_list(missing.elsewhere) + " that wait elsewhere, one in " +
              missing.other->waits + " at " + text(Where{missing.other->site, nullptr});
    }
    return fault(what, {thread.site, nullptr}, index);
  }
  if (deadlocked < 0) return fault("deadlock: no thread can run", {{"unknown", 0}, nullptr}, 0);
  const Thread& thread = engine.threads[deadlocked];
  const Missing missing = missing_lanes(deadlocked);
  fault(std::string("deadlock: ") + thread.waits + " waits for lanes " +
            lane_list(missing.elsewhere) + ", one of which waits in " + missing.other->waits +
            " at " + text(Where{missing.other->site, nullptr}),
        {thread.site, nullptr}, deadlocked);
}

bool is_disabled(Site site) {
  auto known =
      std::find_if(scheduler.reached.begin(), scheduler.reached.end(), [&](const Reached& other) {
        return other.site.line == site.line && other.site.file == site.file;
      });
  if (known == scheduler.reached.end()) {
    scheduler.reached.push_back({site, 0});
    known = scheduler.reached.end() - 1;
  }
  ++known->times;
  for (const Disabled& place : scheduler.disabled) {
    if (place.line == site.line && place.file == file_name(site.file)) {
      ++scheduler.times_disabled;
      return true;
    }
  }
  return false;
}

// Scheduling ------------------------------------------------------------------------------------

void shuffle_sequence() {
  if (scheduler.order != Order::shuffled) return;
  for (int left = engine.count; left > 1; --left) {
    // xorshift64*
    scheduler.random ^= scheduler.random >> 12;
    scheduler.random ^= scheduler.random << 25;
    scheduler.random ^= scheduler.random >> 27;
    const uint64_t drawn = (scheduler.random * 0x2545f4914f6cdd1dull) >> 33;
    std::swap(scheduler.sequence[left - 1], scheduler.sequence[drawn % uint64_t(left)]);
  }
}

void run_block(uint3 block) {
  const dim3 size = engine.configuration->block;
  builtins.block = block;
  scheduler.arrived = scheduler.exited = scheduler.votes = 0;
  for (int index = 0; index < engine.count; ++index) {
    Thread& thread = engine.threads[index];
    thread.state = State::ready;
    thread.index = {unsigned(index) % size.x, unsigned(index) / size.x % size.y,
                    unsigned(index) / (size.x * size.y)};
    thread.open.clear();
    thread.groups.clear();
    prepare_stack(index, stack_end(index));
  }
  memory_begin_block(engine.shared_begin, engine.configuration->shared_bytes);
  shuffle_sequence();
  while (scheduler.exited < engine.count) {
    bool ran = false;
    for (int place = 0; place < engine.count; ++place) {
      const int index = scheduler.sequence[place];
      if (engine.threads[index].state != State::ready) continue;
      ran = true;
      engine.current = index;
      builtins.thread = engine.threads[index].index;
      enter(index);
      engine.current = -1;
      if (!scheduler.fault.empty()) return;
    }
    if (!ran) return explain_standstill();
  }
}

void check_configuration(const Configuration& configuration) {
  const dim3 grid = configuration.grid, block = configuration.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  std::string what;
  if (threads == 0 || threads > most_threads || block.z > 64) what = "its block's size";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    what = "its grid's size";
  }
  if (configuration.shared_bytes > most_shared_bytes) what = "its shared memory's size";
  if (what.empty()) return;
  throw std::runtime_error(std::string("no device launches ") + configuration.name + " with " +
                           what + ": grid " + text({grid.x, grid.y, grid.z}) + ", block " +
                           text({block.x, block.y, block.z}) + ", shared bytes " +
                           std::to_string(configuration.shared_bytes));
}

}  // namespace

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

void fault(const std::string& what, Where where, int thread) {
  if (engine.configuration == nullptr || !scheduler.fault.empty()) return;
  if (thread < 0) thread = engine.current;
  scheduler.fault = what + "\n  at " + text(where) + " in kernel " + engine.configuration->name +
                    ", block " + text(builtins.block);
  if (thread >= 0) scheduler.fault += ", thread " + text(engine.threads[thread].index);
  if (engine.current >= 0) wait();  // the block ends here: nobody resumes this thread
}

void launch(const Configuration& configuration, void (*call)(void*), void* argument) {
  check_configuration(configuration);
  allocate_stacks();
  engine.configuration = &configuration;
  engine.count = int(configuration.block.x * configuration.block.y * configuration.block.z);
  // Allocated anew and no larger than asked for, so that AddressSanitizer knows its end.
  void* shared = nullptr;
  if (posix_memalign(&shared, 16, configuration.shared_bytes) != 0) throw std::bad_alloc();
  engine.shared_begin = shared;
  scheduler.call = call;
  scheduler.argument = argument;
  scheduler.fault.clear();
  scheduler.random = scheduler.seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  scheduler.sequence.resize(engine.count);
  std::iota(scheduler.sequence.begin(), scheduler.sequence.end(), 0);
  if (scheduler.order == Order::reverse) {
    std::reverse(scheduler.sequence.begin(), scheduler.sequence.end());
  }
  builtins.block_size = configuration.block;
  builtins.grid_size = configuration.grid;
  memory_begin_launch();
  const dim3 grid = configuration.grid;
  for (unsigned z = 0; z < grid.z && scheduler.fault.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && scheduler.fault.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && scheduler.fault.empty(); ++x) run_block({x, y, z});
    }
  }
  memory_end_launch();
  if (!scheduler.fault.empty() && __asan_unpoison_memory_region != nullptr) {
    // Threads that never return leave their frames' guards behind.
    for (int index = 0; index < engine.count; ++index) {
      __asan_unpoison_memory_region(stack_end(index) - stack_bytes, stack_bytes);
    }
  }
  std::free(shared);
  engine.shared_begin = nullptr;
  engine.configuration = nullptr;
  if (!scheduler.fault.empty()) throw std::runtime_error(scheduler.fault);
}

void* dynamic_shared() { return engine.shared_begin; }

int barrier(Vote vote, bool predicate, Site site) {
  if (is_disabled(site)) return predicate;
  constexpr const char* names[] = {"__syncthreads", "__syncthreads_and", "__syncthreads_or",
                                   "__syncthreads_count"};
  Thread& thread = self();
  thread.waits = names[int(vote)];
  thread.site = site;
  if (scheduler.exited > 0) {
    fault(std::string("barrier with exited threads: ") + std::to_string(scheduler.exited) +
              " threads of the block have left the kernel before this " + thread.waits,
          {site, nullptr});
  }
  if (scheduler.arrived > 0) {
    for (int index = 0; index < engine.count; ++index) {
      const Thread& other = engine.threads[index];
      if (other.state != State::barrier) continue;
      if (other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0) {
        fault(std::string("divergent barrier: this thread waits in ") + thread.waits + ", thread " +
                  text(other.index) + " waits in " + other.waits + " at " +
                  text(Where{other.site, nullptr}),
              {site, nullptr});
      }
      break;
    }
  }
  scheduler.votes += predicate;
  if (++scheduler.arrived < engine.count) {
    thread.state = State::barrier;
    wait();
  } else {
    scheduler.decided = scheduler.votes;
    scheduler.arrived = scheduler.votes = 0;
    for (int index = 0; index < engine.count; ++index) engine.threads[index].state = State::ready;
    memory_barrier();
    shuffle_sequence();
  }
  if (vote == Vote::all) return scheduler.decided == engine.count;
  if (vote == Vote::any) return scheduler.decided > 0;
  return scheduler.decided;
}

void collective(const char* name, uint32_t mask, void* brought, Work work, Site site) {
  Thread& thread = self();
  const int lane = engine.current % 32, first = engine.current - lane;
  if (!(mask >> lane & 1)) {
    fault(std::string("collective with missing lanes: ") + name + " is called by lane " +
              std::to_string(lane) + ", which its mask leaves out",
          {site, nullptr});
  }
  thread.waits = name;
  thread.site = site;
  thread.mask = mask;
  thread.brought = brought;
  bool complete = true;
  for (int peer = 0; peer < 32; ++peer) {
    if (!(mask >> peer & 1) || peer == lane) continue;
    const Thread* other = first + peer < engine.count ? &engine.threads[first + peer] : nullptr;
    if (other == nullptr || other->state == State::exited) {
      fault(std::string("collective with missing lanes: ") + name + " names lane " +
                std::to_string(peer) +
                (other == nullptr ? ", which the block does not have"
                                  : ", which has left the kernel"),
            {site, nullptr});
    }
    const bool waits = other->state == State::collective && other->mask == mask;
    if (waits && (other->site.line != site.line || std::strcmp(other->waits, name) != 0)) {
      fault(std::string("collective with missing lanes: ") + name + " names lane " +
                std::to_string(peer) + ", which waits in " + other->waits + " at " +
                text(Where{other->site, nullptr}),
            {site, nullptr});
    }
    complete &= waits;
  }
  if (!complete) {
    thread.state = State::collective;
    return wait();
  }
  void* lanes[32] = {};
  for (int peer = 0; peer < 32; ++peer) {
    if (!(mask >> peer & 1)) continue;
    lanes[peer] = engine.threads[first + peer].brought;
    engine.threads[first + peer].state = State::ready;
  }
  work(lanes, first, site);
}

void warp_barrier(uint32_t mask, Site site) {
  if (is_disabled(site)) return;
  uint32_t brought = mask;
  collective(
      "__syncwarp", mask, &brought,
      [](void* const(&lanes)[32], int first, Site) {
        const uint32_t* mask = nullptr;
        for (void* lane : lanes) mask = lane != nullptr ? static_cast<uint32_t*>(lane) : mask;
        memory_warp_barrier(first, *mask);
      },
      site);
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  uint32_t brought = predicate;
  collective(
      name, mask, &brought,
      [](void* const(&lanes)[32], int, Site) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] != nullptr) votes |= *static_cast<uint32_t*>(lanes[lane]) << lane;
        }
        for (void* lane : lanes) {
          if (lane != nullptr) *static_cast<uint32_t*>(lane) = votes;
        }
      },
      site);
  return brought;
}

namespace {

struct Shuffled {
  Shuffle mode;
  uint64_t bits, received;
  int operand, width;
};

int source_lane(const Shuffled& asked, int lane) {
  const int first = lane & ~(asked.width - 1), last = first + asked.width - 1;
  int source = lane;
  if (asked.mode == Shuffle::index) return first + (asked.operand & (asked.width - 1));
  if (asked.mode == Shuffle::up) source = lane - asked.operand;
  if (asked.mode == Shuffle::down) source = lane + asked.operand;
  if (asked.mode == Shuffle::exclusive_or) source = lane ^ asked.operand;
  const bool below = asked.mode == Shuffle::up && source < first;
  return below || source > last ? lane : source;
}

}  // namespace

uint64_t shuffle(Shuffle mode, uint32_t mask, uint64_t bits, int operand, int width, Site site) {
  Shuffled brought{mode, bits, 0, operand, width};
  collective(
      "__shfl_sync", mask, &brought,
      [](void* const(&lanes)[32], int first, Site site) {
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] == nullptr) continue;
          Shuffled& asked = *static_cast<Shuffled*>(lanes[lane]);
          const int source = source_lane(asked, lane);
          if (lanes[source] == nullptr) {
            return fault("collective with missing lanes: a shuffle takes from lane " +
                             std::to_string(source) + ", which its mask leaves out",
                         {site, nullptr}, first + lane);
          }
          asked.received = static_cast<Shuffled*>(lanes[source])->bits;
        }
      },
      site);
  return brought.received;
}

// Asynchronous copies -----------------------------------------------------------------------------

void cp_async_16(void* shared, const void* global, int source_bytes, Site site) {
  if (source_bytes < 0 || source_bytes > 16) {
    fault("cp.async of " + std::to_string(source_bytes) + " bytes into 16", {site, nullptr});
  }
  if (!is_shared(shared, 16)) {
    fault("cp.async out of bounds: its 16 bytes do not lie in shared memory", {site, nullptr});
  }
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fault("misaligned cp.async: its source is not a multiple of 16", {site, nullptr});
  }
  if (source_bytes > 0) access(global, size_t(source_bytes), Access::read, {site, nullptr});
  access(shared, 16, Access::write, {site, nullptr}, -1, 16);
  memory_copy_issued(shared, 16, site);
  self().open.push_back({shared, global, source_bytes, site});
}

void cp_async_commit() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void cp_async_wait(int groups_left, Site site) {
  if (is_disabled(site)) return;
  std::vector<CopyGroup>& groups = self().groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, size_t(16 - copy.bytes));
      memory_copy_arrived(copy.to, 16, copy.site);
    }
    groups.erase(groups.begin());
  }
}

// Tests -------------------------------------------------------------------------------------------

void set_order(Order order, uint64_t seed) {
  scheduler.order = order;
  scheduler.seed = seed;
}

void disable(const std::string& file, int line) { scheduler.disabled.push_back({file, line}); }

void enable_all() {
  scheduler.disabled.clear();
  scheduler.times_disabled = 0;
}

const char* keep(const char* message) {
  scheduler.kept = message;
  return scheduler.kept.c_str();
}

int64_t times_disabled() { return scheduler.times_disabled; }

int64_t times_reached(const std::string& file, int line) {
  int64_t times = 0;
  for (const Reached& place : scheduler.reached) {
    if (place.site.line == line && file == file_name(place.site.file)) times += place.times;
  }
  return times;
}

void forget_reached() { scheduler.reached.clear(); }

Arena::~Arena() {
  for (void* block : blocks_) {
    remove_array(block);
    std::free(block);
  }
}

void* Arena::allocate(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 256, size_t(bytes)) != 0) throw std::bad_alloc();
  std::memset(block, 0xff, size_t(bytes));
  blocks_.push_back(block);
  add_array(block, size_t(bytes), false, "scratch");
  return block;
}

}  // namespace emulation
